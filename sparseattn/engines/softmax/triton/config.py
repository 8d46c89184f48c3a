"""Tile sizes of each kernel, from a short table: chosen by target, dtype and head width alone.

Never by the length or the batch: a row then has the same bits in any batch, and no new length
compiles anything. Those of half precision on sm_90 are the fastest of a race on an H100, whose rows
are in benchmarks/results/gpu_tiles.json; the others are the largest tiles found to compile within
the target's shared memory, on tensor cores, and with few or no registers spilled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...triton_launch import Target, padded


class Tiles(NamedTuple):
    """How a kernel is cut: `rows` of queries (grouped heads are rows of their own) by `keys`."""

    rows: int
    keys: int
    warps: int
    stages: int


_Table = dict[int, Tiles]  # by the padded width of the wider of keys and values
_Families = dict[str, _Table]

_HALF: dict[str, _Families] = {
    "forward": {
        "sm_90": {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 128, 8, 3), 256: Tiles(64, 32, 8, 2)},
        "sm_80": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(64, 32, 8, 2)},
        "gfx": {64: Tiles(128, 32, 8, 1), 128: Tiles(128, 32, 8, 1), 256: Tiles(16, 32, 4, 1)},
    },
    "grad_queries": {
        "sm_90": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(32, 32, 4, 1)},
        "sm_80": {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(64, 64, 8, 1)},
        "gfx": {64: Tiles(64, 32, 4, 1), 128: Tiles(64, 32, 4, 1), 256: Tiles(32, 16, 4, 1)},
    },
    "grad_keys": {
        "sm_90": {64: Tiles(64, 64, 4, 2), 128: Tiles(32, 64, 4, 3), 256: Tiles(32, 32, 8, 1)},
        "sm_80": {64: Tiles(32, 64, 4, 1), 128: Tiles(32, 64, 8, 1), 256: Tiles(32, 32, 8, 1)},
        "gfx": {64: Tiles(64, 64, 4, 1), 128: Tiles(32, 32, 4, 1), 256: Tiles(16, 32, 4, 1)},
    },
}
# Where a row sees fewer keys than NARROW, by its pattern and not by the length, or chosen blocks,
# smaller tiles waste less at the edges.
NARROW = 2048
_HALF_NARROW: dict[str, _Families] = {
    "forward": {"sm_90": {128: Tiles(64, 64, 4, 3)}},
    "grad_queries": {"sm_90": {128: Tiles(64, 64, 4, 2)}},
}
# float32 through several products of fewer digits needs about three times the registers.
_SINGLE: dict[str, _Families] = {
    "forward": {
        "sm_90": {64: Tiles(64, 32, 4, 2), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
        "sm_80": {64: Tiles(32, 32, 4, 1), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 16, 8, 1)},
        "gfx": {64: Tiles(64, 32, 4, 1), 128: Tiles(32, 32, 4, 1), 256: Tiles(32, 16, 8, 1)},
    },
    "grad_queries": {
        "sm_90": {64: Tiles(64, 32, 4, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
        "sm_80": {64: Tiles(32, 32, 8, 1), 128: Tiles(16, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
        "gfx": {64: Tiles(64, 32, 4, 1), 128: Tiles(32, 16, 4, 1), 256: Tiles(16, 16, 4, 1)},
    },
    "grad_keys": {
        "sm_90": {64: Tiles(16, 64, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
        "sm_80": {64: Tiles(32, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
        "gfx": {64: Tiles(32, 32, 4, 1), 128: Tiles(16, 32, 8, 1), 256: Tiles(16, 16, 4, 1)},
    },
}
# float64 serves calls of few pairs alone.
_DOUBLE: dict[str, _Table] = {
    "forward": {64: Tiles(32, 16, 4, 1), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 16, 8, 1)},
    "grad_queries": {64: Tiles(16, 16, 2, 1), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 16, 8, 1)},
    "grad_keys": {64: Tiles(16, 16, 4, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
}
_INTERPRETED = Tiles(64, 64, 4, 1)


def _family(target: Target) -> str:
    if target.backend == "hip":
        return "gfx"
    return "sm_90" if int(target.arch) >= 90 else "sm_80"


def tiles(
    target: Target, dtype: torch.dtype, width: int, kernel: str = "forward", narrow: bool = False
) -> Tiles:
    """The tiles of a kernel: `forward`, `grad_queries` or `grad_keys`.

    Args:
        width: the greater of the head widths of keys and values.
        narrow: whether a row sees fewer keys than `NARROW` at any length, or chosen blocks.
    """
    if target.backend == "interpreter":
        return _INTERPRETED
    at = max(64, padded(width))
    if dtype == torch.float64:
        return _DOUBLE[kernel][at]
    family = _family(target)
    if dtype == torch.float32:
        return _SINGLE[kernel][family][at]
    found = _HALF[kernel][family][at]
    return _HALF_NARROW.get(kernel, {}).get(family, {}).get(at, found) if narrow else found


def decode_tiles(target: Target, dtype: torch.dtype, width: int, rows: int) -> Tiles:
    """The tiles of a decoding step, which has `rows` of its own, from 16 on: as many keys at once
    as there is room for (of half precision 32 KiB, and as much of values, in each of two stages).
    """
    if target.backend == "interpreter":
        return _INTERPRETED._replace(rows=rows)
    room = 2**15 if dtype.itemsize == 2 and target.backend == "cuda" else 2**14
    keys = min(128, room // (padded(width) * dtype.itemsize)) * 16 // rows
    return Tiles(rows, max(16, keys), 4, 2)


def precision(target: Target, dtype: torch.dtype) -> str:
    """How products of float32 are made: through tensor cores in parts, or as IEEE has it.

    Six products of bfloat16 take as long as three of tf32, and keep all 24 digits: on an H100 no
    gradient of 40 calls was over its budget so, and 13 with tf32
    (benchmarks/results/gpu_float32.json).
    """
    return "bf16x6" if dtype == torch.float32 and target.backend == "cuda" else "ieee"
