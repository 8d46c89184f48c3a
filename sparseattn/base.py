"""What an author writes: `Mechanism`, `MaskedSoftmax`, `KernelizedLinear`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import reference
from .cache import Cache, KeyCache
from .cache_ring import RingCache, bound_of, sees_all
from .cache_state import StateCache
from .call import AttentionCall
from .digits import wide
from .engines.linear.maps import FusedMap
from .engines.softmax import pattern, selection
from .implementation import EngineImplementation, Implementation, engine_implementations
from .layout import Grid, Layout

NATURES = ("exact", "masked_softmax", "softmax_estimate", "different_function")


def format_option(value: Any) -> str:
    """How an option's value stands in a spec: a literal, or `<digest>` for an object."""
    digest = getattr(value, "digest", None)
    return f"<{digest}>" if isinstance(digest, str) else repr(value)


def format_spec(mechanism: Mechanism) -> str:
    """The spec of a mechanism, with every option: `windowed(window=256, sinks=0)`."""
    if not dataclasses.is_dataclass(mechanism):
        return mechanism.name
    options = ", ".join(
        f"{f.name}={format_option(getattr(mechanism, f.name))}"
        for f in dataclasses.fields(mechanism)
    )
    return f"{mechanism.name}({options})" if options else mechanism.name


class Mechanism:
    """An attention mechanism: its weight matrix, in a frozen dataclass of options.

    Class attributes:
        name: how users call it, `[a-z][a-z0-9_]{0,63}`. Not an option, so not annotated.
        nature: one of `exact`, `masked_softmax`, `softmax_estimate`, `different_function`.
        source: the paper, and equation, of the maths.
        looks_ahead: a later token may change an earlier output (prefill only).
        honours: which of `scale`, `softcap`, `sink_logits`, `bias`, `lse` the definition uses. What
            is not honoured is refused, never ignored.
    """

    name: ClassVar[str] = ""
    nature: ClassVar[str] = "different_function"
    source: ClassVar[str] = ""
    looks_ahead: ClassVar[bool] = False
    honours: ClassVar[frozenset[str]] = frozenset({"scale"})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # @dataclass runs after this and leaves a __repr__ found in the class alone.
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = format_spec  # type: ignore[assignment]

    def weights(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
        """The definition: the dense map W `[B, Hq, N, M]`, in q's dtype.

        Args:
            q: `[B, Hq, N, D]`, k: `[B, Hkv, M, D]`; `call.allowed()` is what the masks allow.
        """
        raise NotImplementedError(
            f"mechanism {self.name!r} must define weights(q, k, call) -> [B, Hq, N, M]"
        )

    def definition(self, q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """`weights`, and lse `[B, Hq, N]` where the nature has one."""
        return self.weights(q, k, call), None

    def implementations(self) -> tuple[Implementation, ...]:
        """Implementations, in the order that `impl="auto"` tries; `reference` always follows."""
        return ()

    def supports(self, call: AttentionCall) -> list[str]:
        """Reasons why no implementation can serve the call; empty when some can."""
        return []

    def refusals(self, call: AttentionCall) -> list[str]:
        """All reasons against a call: what is not honoured, and `supports`."""
        given = {
            "scale": call.scale_given,
            "softcap": call.softcap is not None,
            "sink_logits": call.sink_logits is not None,
            "bias": call.bias is not None,
            "lse": call.needs_lse,
        }
        reasons = [
            f"its definition has no {word}" + (" (return_lse)" if word == "lse" else "")
            for word, is_given in given.items()
            if is_given and word not in self.honours
        ]
        if self.looks_ahead and call.cached:
            reasons.append("it looks ahead, so it is fit for prefill only and takes no cache")
        if self.looks_ahead and call.needs_grad:
            reasons.append(
                "it looks ahead, so it is fit for prefill only and takes no inputs that require "
                "gradients"
            )
        return reasons + list(self.supports(call))

    def new_cache(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        q_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Cache:
        """An empty decode cache, for `attention(..., causal=True, cache=cache)`.

        Args:
            batch, kv_heads, head_dim, value_dim: of k `[B, Hkv, n, D]` and v `[B, Hkv, n, Dv]`.
            q_heads: of q; None leaves it to the first call.
            device, dtype: of q, k and v; torch's defaults where None.

        Raises:
            InvalidInputError: a size, dtype or device that no call could have.
            UnsupportedCallError: the mechanism looks ahead, so it takes no cache.
        """
        cache, options = self._cache_kind()
        return cache(
            self,
            batch,
            kv_heads,
            head_dim,
            value_dim,
            q_heads=q_heads,
            device=device,
            dtype=dtype,
            **options,
        )

    def _cache_kind(self) -> tuple[type[Cache], dict[str, Any]]:
        """The least that decoding needs to keep: a kind of cache, and what it must know."""
        return KeyCache, {}

    def _uses(self, engine: str) -> bool:
        return any(
            isinstance(one, EngineImplementation) and one.engine == engine
            for one in self.implementations()
        )

    def with_selection(self, q: Tensor, k: Tensor, call: AttentionCall) -> AttentionCall:
        """The call with a dynamic mechanism's selection made; the same call for all others."""
        return call

    def mask(self, call: AttentionCall) -> Tensor:
        """The pairs the mechanism uses: bool `[B or 1, Hq or 1, N, M]`, dense: for small N.

        A dynamic mechanism needs `with_selection` first.
        """
        return call.allowed()

    def density(self, call: AttentionCall) -> float:
        """Pairs used over pairs that the call's own masks allow; 0 where none are allowed."""
        used = total = 0.0
        rows = reference.slab_rows(call)
        for start in range(0, call.n, rows):
            part = call.take_rows(slice(start, min(start + rows, call.n)))
            mask = self.mask(part)
            allowed = part.allowed().expand(mask.shape[0], mask.shape[1], -1, -1)
            used += float(mask.sum())
            total += float(allowed.sum())
        return used / total if total else 0.0


class MaskedSoftmax(Mechanism):
    """Softmax over a subset of the keys, renormalised.

    A static pattern gives `visible`, and for speed `layout`. A dynamic one gives `select` and
    `block`.
    """

    nature: ClassVar[str] = "masked_softmax"
    honours: ClassVar[frozenset[str]] = frozenset(
        {"scale", "softcap", "sink_logits", "bias", "lse"}
    )
    block: int  # of a dynamic mechanism: keys a selected block. An option or a class attribute.

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """The definition: may query position i see key position j? Broadcast int64 tensors."""
        raise NotImplementedError(
            f"mechanism {self.name!r} must define visible(i, j), or select(q, k, call)"
        )

    def visible_in(self, i: Tensor, j: Tensor, extent: Tensor, causal: bool) -> Tensor:
        """`visible` for a pattern that also depends on how many keys there are.

        Args:
            extent: int64, broadcast to i: key positions that the query's run spans.
            causal: whether the call is.
        """
        return self.visible(i, j)

    def layout(self, grid: Grid) -> Layout:
        """The same pattern in clauses. Without one the engine is correct and slow."""
        return grid.pattern(
            lambda i, j: self.visible_in(i, j, torch.tensor(grid.m, device=i.device), grid.causal)
        )

    def clauses(self, grid: Grid) -> Layout:
        """What the engine calls: `layout(grid)`, also where an option bears the name `layout`."""
        return self.layout(grid)

    def select(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
        """Key blocks for each query and head: int32 `[B, Hq, N, S]`, -1 pads.

        Block b holds the keys at positions `b * block` to `(b + 1) * block - 1`. The engine calls
        this for each run alone: no segments, `call.key_mask` only where keys within are masked, and
        `call.offset` the position of query 0. q and k are float32 or wider.
        """
        raise NotImplementedError(f"mechanism {self.name!r} is not dynamic")

    @property
    def is_dynamic(self) -> bool:
        """Whether the pattern depends on q and k."""
        return type(self).select is not MaskedSoftmax.select

    def _cache_kind(self) -> tuple[type[Cache], dict[str, Any]]:
        # A pattern that depends on the number of keys may come to need any of them.
        fixed = type(self).visible_in is MaskedSoftmax.visible_in
        if not fixed or self.is_dynamic or not self._uses("softmax"):
            return KeyCache, {}
        bound = bound_of(self)
        if bound is not None:
            return RingCache, {"bound": bound}
        return KeyCache, {"sees_all": sees_all(self)}

    def with_selection(self, q: Tensor, k: Tensor, call: AttentionCall) -> AttentionCall:
        if not self.is_dynamic or call.selection is not None:
            return call
        return selection.attach(self, q, k, call)

    def mask(self, call: AttentionCall) -> Tensor:
        return call.allowed() & pattern.dense(self, call)

    def weights(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
        return self.definition(q, k, call)[0]

    def definition(self, q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        call = self.with_selection(q, k, call)
        scores = reference.logits(q, k, call)
        return reference.masked_softmax(scores, self.mask(call), call.sink_logits)

    def density(self, call: AttentionCall) -> float:
        masked = call.key_mask is not None or call.q_segments is not None
        placed = call.fixed_placement is not None or isinstance(call.q_offset, Tensor)
        if masked or placed or self.is_dynamic:
            return super().density(call)
        grid = Grid(call.n, call.m, call.causal, int(call.offset))
        return self.clauses(grid).density()

    def implementations(self) -> tuple[Implementation, ...]:
        found = engine_implementations("softmax")
        # The native kernels have no selections yet.
        return tuple(x for x in found if not (self.is_dynamic and x.name == "native"))


class KernelizedLinear(Mechanism):
    """`W[i, j] = phi(q_i) . phi(k_j)`, over visible pairs, divided by its row sum.

    O(N) time and O(1) state: `feature_map` sees each row by itself.
    """

    nature: ClassVar[str] = "different_function"
    honours: ClassVar[frozenset[str]] = frozenset()
    normalize: ClassVar[bool] = True

    def feature_map(self, x: Tensor, positions: Tensor, call: AttentionCall) -> Tensor:
        """phi, row by row: x `[B, H, n, D]` -> `[B, H, n, F]`, float32 in and out.

        float64 for float64 calls. `positions` is int64 `[B or 1, 1, n]`. The engine evaluates any
        cut of the rows, so a row may not depend on another.
        """
        raise NotImplementedError(
            f"mechanism {self.name!r} must define feature_map(x, positions, call)"
        )

    def query_map(self, x: Tensor, positions: Tensor, call: AttentionCall) -> Tensor:
        """phi of the queries, where it differs from that of the keys; shapes as `feature_map`."""
        return self.feature_map(x, positions, call)

    def fused_maps(self, call: AttentionCall) -> tuple[FusedMap, FusedMap] | None:
        """`query_map` and `feature_map` in words, for kernels that evaluate them on the way.

        They must give the same features; the two may differ in their scale, and in what lowers the
        exponents of a projection. None leaves the features to torch, which makes them in slabs.
        """
        return None

    def decay(self, call: AttentionCall) -> Tensor | None:
        """Decay a position and query head, in (0, 1]: `[Hq]`; weights get `gamma ** (i - j)`."""
        return None

    def weights(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
        # Feature maps are float32 or wider by contract; the products are in q's dtype, so that the
        # same lines serve as the oracle (float64) and as the naive computation (q's dtype).
        acc = wide(q.dtype)
        place = call.placement()
        phi_q = self.query_map(q.to(acc), place.q[:, None], call).to(q.dtype)
        phi_k = self.feature_map(k.to(acc), place.k[:, None], call).to(q.dtype)
        scores = reference.grouped_scores(phi_q, phi_k)
        mask = call.allowed()
        gamma = self.decay(call)
        if gamma is not None:
            distance = (place.q[:, :, None] - place.k[:, None, :])[:, None].to(acc)
            powers = gamma.to(q.device, acc)[None, :, None, None] ** distance.clamp(min=0)
            scores = scores * powers.to(q.dtype)
        scores = scores.masked_fill(~mask, 0.0)
        if not self.normalize:
            return scores
        total = scores.sum(-1, keepdim=True)
        return scores / total.masked_fill(total == 0, 1.0)

    def supports(self, call: AttentionCall) -> list[str]:
        return []

    def implementations(self) -> tuple[Implementation, ...]:
        found = engine_implementations("linear")
        # The native kernels evaluate feature maps on the way: they need them in words.
        said = type(self).fused_maps is not KernelizedLinear.fused_maps
        return tuple(x for x in found if said or x.name != "native")

    def _cache_kind(self) -> tuple[type[Cache], dict[str, Any]]:
        return (StateCache if self._uses("linear") else KeyCache), {}
