"""Sweeps over features that no dtype holds: keys in the scale of the greatest key so far.

Features such as `exp(w . k - |k|^2 / 2)` underflow for long keys, all of them at once, and W with
them; what they stand for is a quotient, which is well defined. A mechanism that gives `scaled_map`
has rows whose sums fell out of the range of the fast sweep swept again, here, in float64: each key
has its own scale, the state that of the greatest before it, and a query that of the greatest key
it sees, so that nothing of a later key reaches it. Which rows those are depends on their own sums
alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import widest
from .plan import Step
from .sweeps import Sweeps

# More keys than any call: what they lose by underflow, together, is below a rounding of the sum.
_MOST_KEYS = 2**24


def out_of_range(sums: Tensor, features: int) -> Tensor:
    """Which row sums are too small, too great or no numbers, for their dtype: bool, as sums."""
    held = torch.finfo(sums.dtype)
    least = features * _MOST_KEYS * held.tiny / held.eps
    return ~((sums >= least) & (sums < torch.inf))


class _Noting(Sweeps):
    """Sweeps that remember the sums of their rows."""

    def note(self, step: Step, sums: Tensor) -> None:
        self._sums[:, :, self.rows(step)] = sums

    def forward(self, out: Tensor) -> None:
        self._sums = out.new_ones(out.shape[:3], dtype=self.fine)
        super().forward(out)

    def out_of_range(self, sums: Tensor) -> Tensor:
        return out_of_range(sums.to(self.dtype), self.features)


class Guarded(_Noting):
    """Sweeps in the dtype asked for, and `Scaled` ones for the rows that it does not hold.

    Costs no more than a look at the row sums, until a row needs it.
    """

    def _again(self) -> Scaled:
        return Scaled(self.mechanism, self.q, self.k, self.v, self.call)

    def forward(self, out: Tensor) -> None:
        super().forward(out)
        lost = self.out_of_range(self._sums)
        if lost.any():
            result = torch.zeros_like(out, dtype=widest(out.device))
            self._again().forward(result)
            out.copy_(torch.where(lost[..., None], result.to(out.dtype), out))

    def backward(self, grad_out: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        rows = self.write_queries(grad_out, dq)
        if self.out_of_range(rows[..., 0]).any():
            self._again().backward(grad_out, dq, dk, dv)
        else:
            self.write_keys(grad_out, rows, dk, dv)


class Scaled(_Noting):
    """As `Sweeps`: `exp(log_scale_j - scale of what it meets)` stands where a decay does.

    A row whose sum not even this holds is NaN.
    """

    def __init__(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> None:
        super().__init__(mechanism, q, k, v, call.to_dtype(widest(q.device)))
        self._log = torch.empty(k.shape[:3], dtype=self.dtype, device=k.device)
        for step in self.steps:
            if step.keys:
                self._log[:, :, step.key_rows] = self._scaled(self.key_input(step), step)[1]
        self._greatest = self._log.cummax(-1).values

    def forward(self, out: Tensor) -> None:
        super().forward(out)
        out.masked_fill_(self.out_of_range(self._sums)[..., None], torch.nan)

    def backward(self, grad_out: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        rows = self.write_queries(grad_out, dq)
        lost = self.out_of_range(rows[..., :1])
        dq.masked_fill_(lost, torch.nan)
        self.write_keys(grad_out.masked_fill(lost, torch.nan), rows, dk, dv)

    def _scaled(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        at = self.positions(step.key_rows.start, step.key_rows.stop)
        phi, log = self.mechanism.scaled_map(x, at, self.call)
        log = log.squeeze(-1)
        if self.call.key_mask is not None:
            hidden = ~self.call.key_mask[:, None, step.key_rows]
            phi, log = phi.masked_fill(hidden[..., None], 0.0), log.masked_fill(hidden, -torch.inf)
        return phi, log

    def key_features(self, x: Tensor, step: Step) -> Tensor:
        return self._scaled(x, step)[0].to(self.dtype)

    def _top(self, key: Tensor) -> Tensor:
        """The greatest scale among keys 0 to `key`: `[b, Hkv, *key.shape]`."""
        at = key.clamp(0, self._greatest.shape[-1] - 1)
        return self._greatest[:, :, at]

    def _ends(self, step: Step) -> tuple[Tensor, Tensor]:
        """The scales of the state before and after each chunk: `[b, Hkv, chunks]`."""
        start = step.key_rows.start if step.keys else self._log.shape[-1]  # after all keys
        starts = torch.arange(step.chunks, device=self.q.device) * step.size + start
        return self._top(starts - 1), self._top(starts + step.key_size - 1)

    def _of_queries(self, step: Step) -> Tensor:
        """The scale of each query: `[b, Hkv, chunks, size]`."""
        at = torch.arange(step.start, step.stop, device=self.q.device)
        at = at if self.call.causal else torch.full_like(at, self._log.shape[-1])
        return self._top(at.view(step.chunks, step.size))

    def _of_keys(self, step: Step) -> Tensor:
        return self._log[:, :, step.key_rows].unflatten(-1, (step.chunks, step.key_size))

    def across(self, step: Step) -> Tensor:
        before, after = self._ends(step)
        return (before - after).exp()[..., None, None]

    def decayed(self, x: Tensor, step: Step, powers: str) -> Tensor:
        before, after = self._ends(step)
        if powers == "since_start":
            by = (before[..., None] - self._of_queries(step)).exp()
        else:
            by = (self._of_keys(step) - after[..., None]).exp()
        shape = (*by.shape[:3], -1, by.shape[3], x.shape[-1])
        return (x.reshape(shape) * by[..., None, :, None]).view(x.shape)

    def mask(self, pairs: Tensor, step: Step) -> Tensor:
        by = self._of_keys(step)[..., None, :] - self._of_queries(step)[..., None]
        by = by.clamp_(max=0.0).exp_()  # above 0 only where it is hidden
        pairs.view(*by.shape[:3], -1, *by.shape[3:]).mul_(by[:, :, :, None])
        return self.hide(pairs, step)
