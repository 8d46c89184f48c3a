"""Decode caches of kernelised mechanisms: sums over the keys seen, and no key.

`S = sum_j gamma ** (i - j) phi(k_j) [v_j, 1]^T`, i being the last token. Sums and features are in
float64 where the device has it: a sum over any number of tokens is then as exact as the definition
in float32, however it was cut into calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .cache import Cache, keeping, starts
from .call import AttentionCall
from .digits import widest
from .engines.linear.state import without_later
from .engines.linear.triton_step import reasons_against_step, step

if TYPE_CHECKING:
    from .implementation import Implementation

_CHUNK = 64  # tokens whose pairs are weighed one by one
_MOST_KEYS = 2**24  # what so many keys lose by underflow is below a rounding of the sum


class _Sums(NamedTuple):
    """What is kept of the tokens seen.

    `s` is `[B, heads, F, E]`: heads are those of k, or of q where they decay apart; E is Dv, and
    one more for the sums of the weights. Where keys have scales of their own, `s` is in that of the
    greatest, `exp(top)`, with `top` `[B, heads, 1, 1]`, -inf where no key was seen.
    """

    s: Tensor
    top: Tensor | None


class _Factors(NamedTuple):
    """By what the parts of a chunk are multiplied; each broadcasts to `[B, heads, rows, keys]`.

    within: pairs in the chunk; before: a row's product with the sums; adding: a key's part in the
    new sums; kept: the old sums' part.
    """

    within: Tensor
    before: Tensor
    adding: Tensor
    kept: Tensor


class StateCache(Cache):
    """Keeps a running state of constant size."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.wide = widest(self.device)
        self._clear()

    def _clear(self) -> None:
        self._sums: _Sums | None = None  # until a call shows how many features there are
        self._first: list[int] | None = None
        self._scale: float | None = None

    def _tensors(self) -> list[Tensor]:
        return [] if self._sums is None else [x for x in self._sums if x is not None]

    def _select(self, index: Tensor) -> None:
        if self._sums is not None:
            s, top = self._sums
            self._sums = _Sums(s[index], None if top is None else top[index])
        if self._first is not None:
            self._first = [self._first[row] for row in index.tolist()]

    def _refusals(self, call: AttentionCall, bias: Tensor | None) -> list[str]:
        reasons = super()._refusals(call, bias)
        if self._scale is not None and call.scale != self._scale:
            reasons.append(
                f"its sums were made with scale {self._scale}, so a call with scale {call.scale} "
                "needs a cache of its own"
            )
        return reasons

    def serves(self, implementation: Implementation, call: AttentionCall) -> list[str]:
        kernel = getattr(implementation, "kernel", None)
        if self.length == 0 or kernel == "linear:torch":
            return []
        if kernel == "linear:triton":
            reasons = reasons_against_step(self.mechanism, call)
            if call.key_mask is not None:
                reasons.append("its decoding step takes no key_mask")
            return reasons
        return [
            'it takes whole calls, and this cache keeps a running state; the engine "torch" can '
            "use that"
        ]

    def attend(
        self, implementation: Implementation, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        if self.length == 0:
            return implementation.run(self.mechanism, q, k, v, call)
        if getattr(implementation, "kernel", None) == "linear:triton" and self._sums is not None:
            with keeping():
                first = starts(self._first, self.length, call, None)
                places = self._places(slice(0, 1), first)
                out, s = step(self.mechanism, q, k, v, call, self._sums.s, places)
            self._ready = (call, _Sums(s, None))
            return out, None
        made, after = self._pass(q, k, v, call)
        self._ready = (call, after)
        assert made is not None
        return made, None

    def _append(self, k: Tensor, v: Tensor, call: AttentionCall, ready: Any) -> None:
        after = self._pass(None, k, v, call)[1] if ready is None else ready
        self._first = starts(self._first, self.length, call, self.new_mask(call))
        if call.n:
            self._scale = call.scale
        self._sums = after

    def _pass(
        self, q: Tensor | None, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor | None, _Sums | None]:
        """The outputs of new tokens (None without q), and the sums after them."""
        with keeping():
            mask, later = self.new_mask(call), None
            if mask is not None:
                hidden = ~mask[:, None, :, None]
                k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
            if call.n > 1:
                k, v, later = without_later(k, v)
            first = starts(self._first, self.length, call, mask)
            wide = call.to_dtype(self.wide)
            sums = self._sums
            parts: list[Tensor] = []
            for start in range(0, call.n, _CHUNK):
                rows = slice(start, min(start + _CHUNK, call.n))
                part, sums = self._chunk(
                    None if q is None else q[:, :, rows],
                    k[:, :, rows],
                    v[:, :, rows],
                    None if mask is None else mask[:, rows],
                    self._places(rows, first),
                    sums,
                    wide,
                )
                if part is not None:
                    parts.append(part)
            if later is not None and sums is not None:
                sums = sums._replace(s=self._lost(sums.s, later, call))
            if q is None:
                return None, sums
            if not parts:
                return q.new_zeros(*q.shape[:3], call.value_dim), sums
            out = torch.cat(parts, dim=2).to(q.dtype)
            if later is not None:
                out = out.unflatten(1, (call.kv_heads, call.groups))
                out = out.masked_fill(later[:, :, None], torch.nan).flatten(1, 2)
            return out, sums

    def _places(self, rows: slice, first: list[int] | None) -> Tensor:
        """Positions of new tokens: `[1 or B, 1, c]`."""
        at = torch.arange(rows.start, rows.stop, device=self.device)[None, None] + self.length
        if first is None:
            return at
        begun = [max(x, 0) for x in first]  # a row that has not begun adds nothing anyway
        return at - torch.tensor(begun, device=self.device)[:, None, None]

    def _lost(self, s: Tensor, later: Tensor, call: AttentionCall) -> Tensor:
        """Sums with NaN where a new key or value was: `later` is `[B, Hkv, n, Dv]`."""
        bad = later[:, :, -1:]
        if s.shape[-1] > call.value_dim:
            bad = torch.nn.functional.pad(bad, (0, 1))
        return s.masked_fill(bad.repeat_interleave(s.shape[1] // bad.shape[1], dim=1), torch.nan)

    def _chunk(
        self,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        places: Tensor,
        sums: _Sums | None,
        call: AttentionCall,
    ) -> tuple[Tensor | None, _Sums]:
        """As `_pass`, for few tokens: `call` is in the wide dtype."""
        mechanism: Any = self.mechanism
        k, v = k.to(self.wide), v.to(self.wide)
        log = None
        if hasattr(mechanism, "scaled_map"):
            phi_k, log = mechanism.scaled_map(k, places, call)
            log = log.to(self.wide).transpose(2, 3)
            if mask is not None:
                log = log.masked_fill(~mask[:, None, None], -torch.inf)
        else:
            phi_k = mechanism.feature_map(k, places, call)
        phi_k = phi_k.to(self.wide)
        if mask is not None:
            phi_k = phi_k.masked_fill(~mask[:, None, :, None], 0.0)
        gamma = mechanism.decay(call)
        if gamma is not None:
            repeats = call.q_heads // max(call.kv_heads, 1)
            phi_k, v = (x.repeat_interleave(repeats, dim=1) for x in (phi_k, v))
        if mechanism.normalize:
            v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], dim=-1)
        rows, top = k.shape[2], None
        factors = seen = None
        if log is not None:
            factors, seen = _scales(log, None if sums is None else sums.top)
            top = seen[:, :, -1:].clone()  # not a view of all rows
        elif gamma is not None:
            factors = _decays(gamma.to(self.device, self.wide), rows)
        added = phi_k if factors is None else phi_k * factors.adding.transpose(2, 3)
        new = added.transpose(2, 3) @ v
        if sums is not None:
            new += sums.s if factors is None else sums.s * factors.kept
        after = _Sums(new, top)
        if q is None:
            return None, after
        phi_q = mechanism.query_map(q.to(self.wide), places, call).to(self.wide)
        heads = phi_k.shape[1]
        groups = call.q_heads // max(heads, 1)
        flat = phi_q.reshape(*phi_q.shape[:1], heads, groups * rows, *phi_q.shape[3:])
        pairs = (flat @ phi_k.transpose(2, 3)).unflatten(2, (groups, rows))
        if factors is not None:
            pairs = pairs * factors.within[:, :, None]
        pairs = pairs.tril_()
        total = pairs.flatten(2, 3) @ v
        if sums is not None:
            met = flat @ sums.s
            if factors is not None:
                met = met.unflatten(2, (groups, rows)) * factors.before[:, :, None]
                met = met.flatten(2, 3)
            total += met
        total = total.unflatten(2, (groups, rows)).flatten(1, 2)
        if not mechanism.normalize:
            return total, after
        out, weight = total[..., :-1], total[..., -1:]
        if seen is not None:
            # Queries that see keys, all of them too small to tell: NaN, as the engine says.
            held = torch.finfo(self.wide)
            least = phi_k.shape[-1] * _MOST_KEYS * held.tiny / held.eps
            some = (seen > -torch.inf).repeat_interleave(groups, dim=1)
            weight = weight.masked_fill((weight < least) & some, torch.nan)
        return out / weight.masked_fill(weight == 0, torch.inf), after


def _decays(gamma: Tensor, rows: int) -> _Factors:
    """Powers of each query head's decay `[Hq]`, of distances alone."""
    at = torch.arange(rows, device=gamma.device)
    gamma = gamma[None, :, None, None]
    return _Factors(
        within=gamma ** (at[:, None] - at).clamp(min=0),
        before=gamma ** (at[:, None] + 1),
        adding=gamma ** (rows - 1 - at)[None],
        kept=gamma**rows,
    )


def _scales(log: Tensor, top: Tensor | None) -> tuple[_Factors, Tensor]:
    """Each row in the scale of the greatest key that it sees, so that no later one reaches it.

    Args:
        log: the logarithm of each key's own factor, `[B, heads, 1, c]`, -inf where it is masked.
        top: that of the sums, `[B, heads, 1, 1]`.

    Returns:
        the factors, and the logarithm of each row's scale, `[B, heads, c, 1]`, -inf where it sees
        no key.
    """
    top = torch.full_like(log[..., :1], -torch.inf) if top is None else top
    seen = torch.maximum(log.cummax(-1).values, top).transpose(2, 3)
    base = seen.masked_fill(seen == -torch.inf, 0.0)
    last = base[:, :, -1:]
    factors = _Factors(
        within=(log - base).clamp(max=0.0).exp(),
        before=(top - base).exp(),
        adding=(log - last).exp(),
        kept=(top - last).exp(),
    )
    return factors, seen
