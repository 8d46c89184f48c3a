"""The running state of a sweep: a sum over many chunks, whose rounding does not grow with them."""

from __future__ import annotations

import torch
from torch import Tensor

# Chunks of this many rows together are summed in the sweep's own dtype, then added to all before.
_RECENT_ROWS = 1024


def widest(device: torch.device) -> torch.dtype:
    """The widest dtype that a device computes in."""
    return torch.float32 if device.type == "mps" else torch.float64


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
