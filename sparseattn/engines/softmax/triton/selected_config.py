"""Tile sizes of the kernels over selections: a table as in `config.py`, chosen by the same facts.

Tiles of queries have 16 rows, the fewest that a tensor core takes, so that few rows meet a block
that they did not choose. Tiles of keys gather the rows of their lists, and take more of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...triton_launch import Target
from .config import Tiles, padded


class Selected(NamedTuple):
    """The tiles of the three kernels; the keys of each are the most that a step takes."""

    forward: Tiles
    grad_queries: Tiles
    grad_keys: Tiles


_HALF: dict[str, dict[int, Selected]] = {
    "sm_90": {
        64: Selected(Tiles(16, 64, 4, 3), Tiles(16, 64, 4, 2), Tiles(32, 64, 4, 2)),
        128: Selected(Tiles(16, 64, 4, 3), Tiles(16, 64, 4, 2), Tiles(32, 64, 8, 2)),
        256: Selected(Tiles(16, 64, 8, 2), Tiles(16, 64, 8, 1), Tiles(32, 32, 8, 1)),
    },
    "sm_80": {
        64: Selected(Tiles(16, 64, 4, 2), Tiles(16, 64, 4, 2), Tiles(32, 64, 4, 1)),
        128: Selected(Tiles(16, 64, 4, 2), Tiles(16, 64, 8, 2), Tiles(32, 64, 8, 1)),
        256: Selected(Tiles(16, 64, 8, 2), Tiles(16, 32, 8, 1), Tiles(32, 32, 8, 1)),
    },
    "gfx": {
        64: Selected(Tiles(16, 64, 4, 1), Tiles(16, 64, 4, 1), Tiles(32, 64, 4, 1)),
        128: Selected(Tiles(16, 64, 4, 1), Tiles(16, 64, 4, 1), Tiles(32, 64, 4, 1)),
        256: Selected(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(32, 32, 4, 1)),
    },
}
_SINGLE: dict[int, Selected] = {
    64: Selected(Tiles(16, 64, 4, 1), Tiles(16, 64, 4, 1), Tiles(32, 32, 4, 1)),
    128: Selected(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1)),
    256: Selected(Tiles(16, 32, 8, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
}
_DOUBLE: dict[int, Selected] = {
    64: Selected(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
    128: Selected(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
    256: Selected(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
}
_INTERPRETED = Selected(Tiles(16, 64, 4, 1), Tiles(16, 64, 4, 1), Tiles(64, 64, 4, 1))


def selected(target: Target, dtype: torch.dtype, width: int) -> Selected:
    """The tiles of a call whose keys and values are at most `width` wide."""
    if target.backend == "interpreter":
        return _INTERPRETED
    at = max(64, padded(width))
    if dtype == torch.float64:
        return _DOUBLE[at]
    if dtype == torch.float32:
        return _SINGLE[at]
    if target.backend == "hip":
        return _HALF["gfx"][at]
    return _HALF["sm_90" if int(target.arch) >= 90 else "sm_80"][at]
