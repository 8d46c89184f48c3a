"""Decode caches: what attention over new tokens needs of the tokens before them.

`mechanism.new_cache(...)` makes one, and `attention(..., causal=True, cache=cache)` serves prefill
in chunks and single steps alike: any cutting of a run into calls equals one call for all of it.

- here: what all caches share, and `KeyCache`, which keeps every key;
- `cache_ring.py`: patterns of bounded reach keep the last keys, and the first;
- `cache_state.py`: kernelised mechanisms keep sums.

A call has three steps, and only the last changes the cache: `admit` checks it, `attend` computes,
`append` keeps the new tokens. So whatever fails leaves the cache as it was.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import DTYPES, check_bias, describe
from .cache_rows import ROW_KERNELS, attend_rows
from .call import AttentionCall
from .clauses import as_int
from .errors import InvalidInputError, UnsupportedCallError

if TYPE_CHECKING:
    from .base import Mechanism
    from .implementation import Implementation

# A static pattern's few new queries weigh all kept keys by its definition, at no more than this
# many rows: a layout for each length would cost more than it saves.
_FEW_ROWS = 16
_LEAST_ROOM = 64  # keys


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """For what a cache holds: outside of autograd, and no inference tensors, which could not be
    written to later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _first_allowed(mask: Tensor) -> list[int]:
    """Of each row of a bool `[B, n]`, the first True, or -1."""
    found: list[int] = torch.where(mask.any(1), mask.to(torch.int8).argmax(1), -1).tolist()
    return found


def starts(
    first: list[int] | None, length: int, call: AttentionCall, mask: Tensor | None
) -> list[int] | None:
    """The first allowed token of each row, -1 where there is none yet; None where all are token 0.

    Args:
        first: the same before the new tokens, of which there were `length`.
        mask: bool `[B, n]` of the new tokens, or None where all are allowed.
    """
    if call.n == 0 or (first is None and (length or mask is None)):
        return first
    found = [-1] * call.batch if first is None else list(first)
    if mask is None:
        return [length if x < 0 else x for x in found]
    new = _first_allowed(mask)
    found = [length + y if x < 0 <= y else x for x, y in zip(found, new, strict=True)]
    return None if not any(found) else found


class Cache(abc.ABC):
    """What every cache shares; made by `Mechanism.new_cache`.

    Attributes:
        mechanism: whose cache it is.
        batch, kv_heads, q_heads, head_dim, value_dim, dtype, device: of the calls it takes; q_heads
            is None until it is given or the first call shows it.
        length: tokens seen.
    """

    keeps_keys = False  # all of them
    _first: list[int] | None

    def __init__(
        self,
        mechanism: Mechanism,
        batch: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        q_heads: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        way_out = "give the sizes of k [B, Hkv, n, D] and v [B, Hkv, n, Dv]"
        self.mechanism = mechanism
        self.batch = as_int("batch", batch, 0, way_out)
        self.kv_heads = as_int("kv_heads", kv_heads, 0, way_out)
        self.head_dim = as_int("head_dim", head_dim, 1, way_out)
        self.value_dim = as_int("value_dim", value_dim, 0, way_out)
        if q_heads is not None:
            q_heads = as_int("q_heads", q_heads, 0, "give the heads of q, or None")
            if q_heads % self.kv_heads if self.kv_heads else q_heads:
                raise InvalidInputError(
                    f"q_heads is {q_heads}, which is not a multiple of kv_heads={kv_heads}"
                )
        self.q_heads = q_heads
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise InvalidInputError(
                f"dtype got {dtype!r:.80}; expected float64, float32, bfloat16 or float16"
            )
        self.dtype = dtype
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, TypeError, AssertionError) as error:
            raise InvalidInputError(f"device got {device!r:.80}: {str(error)[:200]}") from error
        if mechanism.looks_ahead:
            raise UnsupportedCallError(
                f"mechanism {mechanism!r} takes no cache: it looks ahead, so it is fit for prefill "
                "only"
            )
        self.length = 0
        self._own_q_heads = q_heads
        # What `attend` has made ready for `append`, and of which call.
        self._ready: tuple[AttentionCall, Any] | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.mechanism!r}, length={self.length}, "
            f"k [{self.batch}, {self.kv_heads}, {self.length}, {self.head_dim}], "
            f"value_dim={self.value_dim}, {self.dtype}, {self.device}, {self.nbytes} bytes)"
        )

    @property
    def nbytes(self) -> int:
        """The memory held, in bytes."""
        return sum(x.untyped_storage().nbytes() for x in self._tensors())

    @property
    def first(self) -> list[int] | None:
        """The first token of each row that may be seen, from which absolute positions count: -1
        where there is none yet; None where all are token 0."""
        return self._first

    # What a kind of cache gives.

    @abc.abstractmethod
    def _tensors(self) -> list[Tensor]:
        """All that is held."""

    @abc.abstractmethod
    def serves(self, implementation: Implementation, call: AttentionCall) -> list[str]:
        """Why an implementation cannot compute a call on what is kept; empty when it can."""

    @abc.abstractmethod
    def attend(
        self, implementation: Implementation, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the new tokens over everything seen and themselves; the cache stays.

        Args:
            implementation: one that `serves` the call.
            q, k, v: of the new tokens, `[B, Hq, n, D]`, `[B, Hkv, n, D]`, `[B, Hkv, n, Dv]`.
            call: from `admit`.

        Returns:
            out `[B, Hq, n, Dv]` in q's dtype; lse `[B, Hq, n]` or None, as an implementation's.
        """

    @abc.abstractmethod
    def _append(self, k: Tensor, v: Tensor, call: AttentionCall, ready: Any) -> None:
        """Keep new tokens; `ready` is what `attend` made for them, or None."""

    @abc.abstractmethod
    def _select(self, index: Tensor) -> None:
        """Row b becomes what row `index[b]` was."""

    @abc.abstractmethod
    def _clear(self) -> None:
        """Hold nothing."""

    # What all have.

    def reset(self) -> None:
        """Forget all tokens."""
        self.length, self.q_heads, self._ready = 0, self._own_q_heads, None
        with keeping():
            self._clear()

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row `index[b]` was, as beam search asks.

        Args:
            index: int64 `[B]`, rows of the batch in any order, some perhaps more than once.

        Raises:
            InvalidInputError: another dtype, shape or device, or a row that there is not.
        """
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise InvalidInputError(f"index must be an int64 tensor [B], got {describe(index)}")
        if tuple(index.shape) != (self.batch,):
            raise InvalidInputError(
                f"index must have shape [B] = [{self.batch}], got {list(index.shape)}; a cache "
                "keeps its batch size"
            )
        if index.device != self.device:
            raise InvalidInputError(f"index is on {index.device} but the cache on {self.device}")
        if self.batch and not 0 <= int(index.min()) <= int(index.max()) < self.batch:
            raise InvalidInputError(
                f"index names rows {int(index.min())} to {int(index.max())}; expected rows 0 to "
                f"{self.batch - 1}"
            )
        self._ready = None
        with keeping():
            self._select(index)

    def admit(
        self, mechanism: Mechanism, call: AttentionCall, bias: Tensor | None = None
    ) -> AttentionCall:
        """The request for the new tokens among all tokens, once it is known to fit the cache.

        Args:
            call: the new tokens alone, without a bias: `call.n == call.m`.
            bias: of the new queries and all keys, `[B or 1, Hq or 1, n or 1, length + n]`.

        Returns:
            the call with `m` counting all tokens, and their `key_mask` (in caches that do not keep
            every key, the earlier ones of it are True; None where nothing is masked).

        Raises:
            InvalidInputError: tensors of other sizes, dtype or device; another mechanism.
            UnsupportedCallError: what no cache can serve.
        """
        self._ready = None
        if type(mechanism) is not type(self.mechanism) or mechanism != self.mechanism:
            raise InvalidInputError(
                f"mechanism {mechanism!r} was given with a cache of {self.mechanism!r}; make a "
                "cache of its own with mechanism.new_cache(...)"
            )
        if call.n != call.m:
            raise InvalidInputError(
                f"q has length {call.n} but k has {call.m}; with a cache, q, k and v hold the new "
                "tokens alone"
            )
        for name, axes, came, own in (
            ("k", "batch", call.batch, self.batch),
            ("k", "heads", call.kv_heads, self.kv_heads),
            ("q", "heads", call.q_heads, self.q_heads),
            ("k", "width", call.head_dim, self.head_dim),
            ("v", "width", call.value_dim, self.value_dim),
            ("q", "dtype", call.dtype, self.dtype),
            ("q", "device", call.device, self.device),
        ):
            if own is not None and came != own:
                raise InvalidInputError(
                    f"{name} has {axes} {came} but the cache was made for {axes} {own}"
                )
        reasons = self._refusals(call, bias)
        if reasons:
            raise UnsupportedCallError.of("a cache", reasons)
        total = self.length + call.n
        if bias is not None:
            check_bias(bias, call.batch, call.q_heads, call.n, total, call.device)
        mask = call.key_mask
        mask = None if mask is None or bool(mask.all()) else mask.clone()
        mask = self._whole_mask(mask, call.n)
        return call.replace(m=total, key_mask=mask, bias=bias, cached=True)

    def _refusals(self, call: AttentionCall, bias: Tensor | None) -> list[str]:
        reasons = []
        if bias is not None and not self.keeps_keys:
            reasons.append("a bias is a number for each key, and this one does not keep all keys")
        if not call.causal:
            reasons.append("tokens to come are not known: pass causal=True")
        if call.q_segments is not None:
            reasons.append("q_segments and kv_segments are not remembered: give each row its own")
        if call.q_offset is not None:
            reasons.append("new tokens stand after those seen: leave q_offset out")
        bias_grad = bias is not None and getattr(bias, "requires_grad", False)
        if call.needs_grad or (bias_grad and torch.is_grad_enabled()):
            reasons.append(
                "what it keeps has no gradient: use torch.no_grad(), or detach the inputs"
            )
        return reasons

    def _whole_mask(self, mask: Tensor | None, n: int) -> Tensor | None:
        if mask is None or self.length == 0:
            return mask
        return torch.cat([mask.new_ones(1, 1).expand(self.batch, self.length), mask], dim=1)

    def new_mask(self, call: AttentionCall) -> Tensor | None:
        """The mask of the new tokens alone, `[B, n]`, of a call from `admit`."""
        return None if call.key_mask is None else call.key_mask[:, self.length :]

    def append(self, k: Tensor, v: Tensor, call: AttentionCall) -> None:
        """Keep a call's new tokens: a copy of them, or what they add."""
        ready = None
        if self._ready is not None and self._ready[0] is call:
            ready = self._ready[1]
        with keeping():
            self._append(k.detach(), v.detach(), call, ready)
        self._ready = None
        self.q_heads = call.q_heads
        self.length = call.m


class KeyCache(Cache):
    """Keeps every key, in buffers that double; serves any mechanism and implementation."""

    keeps_keys = True

    def __init__(self, *args: Any, sees_all: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sees_all = sees_all  # the mechanism uses every pair
        with keeping():
            self._clear()

    def _clear(self) -> None:
        shape = (self.batch, self.kv_heads, 0)
        self._k, self._v = (
            torch.zeros(*shape, width, dtype=self.dtype, device=self.device)
            for width in (self.head_dim, self.value_dim)
        )
        self._mask: Tensor | None = None  # [B, length], once any key was masked

    def _tensors(self) -> list[Tensor]:
        return [x for x in (self._k, self._v, self._mask) if x is not None]

    @property
    def k(self) -> Tensor:
        """The keys seen, `[B, Hkv, length, D]`: a view, not to be written to."""
        return self._k[:, :, : self.length]

    @property
    def v(self) -> Tensor:
        """The values seen, `[B, Hkv, length, Dv]`: a view, not to be written to."""
        return self._v[:, :, : self.length]

    @property
    def key_mask(self) -> Tensor | None:
        """Which keys may be seen, bool `[B, length]`; None where all may."""
        return self._mask

    @property
    def first(self) -> list[int] | None:
        return None if self._mask is None else _first_allowed(self._mask)

    def _whole_mask(self, mask: Tensor | None, n: int) -> Tensor | None:
        if self._mask is None:
            return super()._whole_mask(mask, n)
        if mask is None:
            return torch.nn.functional.pad(self._mask, (0, n), value=True)
        return torch.cat([self._mask, mask], dim=1)

    def serves(self, implementation: Implementation, call: AttentionCall) -> list[str]:
        return []

    def _written(self, held: Tensor, new: Tensor, total: int) -> Tensor:
        """A buffer with the new tokens behind those seen: the same one where it has room, since
        what stands beyond `length` is no part of the cache."""
        room = held.shape[2]
        if total > room:
            room = max(total, 2 * room, _LEAST_ROOM)
            grown = torch.zeros(
                *held.shape[:2], room, held.shape[3], dtype=self.dtype, device=self.device
            )
            grown[:, :, : self.length] = held[:, :, : self.length]
            held = grown
        held[:, :, self.length : total] = new
        return held

    def _with(self, k: Tensor, v: Tensor, total: int) -> tuple[Tensor, Tensor]:
        with keeping():
            k, v = k.detach(), v.detach()
            return self._written(self._k, k, total), self._written(self._v, v, total)

    def attend(
        self, implementation: Implementation, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        buffers = self._with(k, v, call.m)
        keys, values = (x[:, :, : call.m] for x in buffers)
        mechanism: Any = self.mechanism
        kernel = getattr(implementation, "kernel", "")
        if (
            kernel in ROW_KERNELS
            and call.n <= _FEW_ROWS
            and call.n < call.m
            and call.bias is None
            and not getattr(mechanism, "is_dynamic", True)
        ):
            known = self.sees_all and call.n == 1 and call.key_mask is None
            result: tuple[Tensor, Tensor | None]
            result = attend_rows(mechanism, q, keys, values, call, known, kernel)
        else:
            result = implementation.run(mechanism, q, keys, values, call)
        self._ready = (call, buffers)
        return result

    def _append(self, k: Tensor, v: Tensor, call: AttentionCall, ready: Any) -> None:
        buffers = self._with(k, v, call.m) if ready is None else ready
        self._k, self._v = buffers
        self._mask = call.key_mask

    def _select(self, index: Tensor) -> None:
        k, v = self._k[index], self._v[index]
        self._mask = None if self._mask is None else self._mask[index]
        self._k, self._v = k, v
