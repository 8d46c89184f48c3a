"""The running state of a sweep: a sum over many chunks, whose rounding does not grow with them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...digits import all_finite, widest

# Chunks of this many rows together are summed in the sweep's own dtype, then added to all before.
_RECENT_ROWS = 1024


class State:
    """`sum_j phi(k_j) v_j^T`, or its mirror image: `[b, heads, F, E]`.

    One sum in float32 would round every chunk to the size of all before it. So recent chunks are
    summed apart, and what was carried from the earlier ones is held in float64: what a chunk meets
    is rounded once. A decaying state is scaled with every chunk, so all of it is in float64.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._carried = torch.zeros(shape, dtype=widest(device), device=device)
        self._rounded = torch.zeros(shape, dtype=dtype, device=device)
        self._recent = torch.zeros_like(self._rounded)
        self._rows = 0

    def read(self, out: Tensor) -> Tensor:
        """Write the state to `out`, in the sweep's dtype, and return it."""
        if self._rows == 0:
            return out.copy_(self._rounded)
        return torch.add(self._rounded, self._recent, out=out)

    def advance(self, added: Tensor | None, rows: int, decay: Tensor | None) -> None:
        """Pass a chunk of so many rows: times `decay` (float64), plus what it adds."""
        if decay is not None:
            self._carried.mul_(decay)
            if added is not None:
                self._carried.add_(added)
            self._rounded.copy_(self._carried)
            return
        if added is None:
            return
        self._recent.add_(added)
        self._rows += rows
        if self._rows >= _RECENT_ROWS:
            self._carried.add_(self._recent)
            self._rounded.copy_(self._carried)
            self._recent.zero_()
            self._rows = 0


def without_later(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """k and v that are finite, and what was not: bool `[b, Hkv, m, Dv]`, from its key onwards.

    Under causal, a NaN times the 0 of a later key would reach the earlier rows of its chunk. It is
    taken out, to be put back into the rows that see it; None where there is none.
    """
    if all_finite(k, v):
        return k, v, None
    bad_key, bad_value = ~torch.isfinite(k).all(-1, keepdim=True), ~torch.isfinite(v)
    later = (bad_key | bad_value).cumsum(2) > 0
    return k.masked_fill(bad_key, 0.0), v.masked_fill(bad_value, 0.0), later
