"""Tile sizes of each kernel, from a short table: chosen by target, dtype and head width alone.

Never by the length or the batch: a row then has the same bits in any batch, and no new length
compiles anything. The entries are the largest tiles found to compile for each target within its
shared memory, on tensor cores, and with few or no registers spilled: docs/gpu.md lists what each
spills. None was measured on a GPU yet.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from ...triton_launch import Target


class Tiles(NamedTuple):
    """How a kernel is cut: `rows` of queries (grouped heads are rows of their own) by `keys`."""

    rows: int
    keys: int
    warps: int
    stages: int


def padded(width: int) -> int:
    """The width of a tile that holds heads of `width`: a power of two from 16 on."""
    return max(16, 1 << (width - 1).bit_length())


_Table = dict[int, Tiles]  # by the padded width of the wider of keys and values
_Families = dict[str, _Table]

_HALF: dict[str, _Families] = {
    "forward": {
        "sm_90": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 8, 2)},
        "sm_80": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
        "gfx": {64: Tiles(128, 64, 8, 1), 128: Tiles(128, 32, 8, 1), 256: Tiles(64, 32, 8, 1)},
    },
    "grad_queries": {
        "sm_90": {64: Tiles(64, 64, 4, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(32, 32, 8, 1)},
        "sm_80": {64: Tiles(32, 64, 4, 2), 128: Tiles(64, 64, 8, 1), 256: Tiles(32, 32, 8, 1)},
        "gfx": {64: Tiles(64, 64, 4, 1), 128: Tiles(64, 32, 4, 1), 256: Tiles(32, 32, 4, 1)},
    },
    "grad_keys": {
        "sm_90": {64: Tiles(64, 32, 4, 2), 128: Tiles(32, 32, 4, 1), 256: Tiles(32, 32, 8, 1)},
        "sm_80": {64: Tiles(32, 32, 4, 1), 128: Tiles(64, 64, 8, 1), 256: Tiles(32, 32, 8, 1)},
        "gfx": {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 4, 1), 256: Tiles(32, 16, 8, 1)},
    },
}
# float32 through three tf32 products needs about three times the registers.
_SINGLE: dict[str, _Families] = {
    "forward": {
        "sm_90": {64: Tiles(64, 32, 8, 2), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
        "sm_80": {64: Tiles(32, 32, 8, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
        "gfx": {64: Tiles(64, 32, 8, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(32, 16, 8, 1)},
    },
    "grad_queries": {
        "sm_90": {64: Tiles(64, 32, 8, 2), 128: Tiles(32, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
        "sm_80": {64: Tiles(32, 32, 8, 1), 128: Tiles(32, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
        "gfx": {64: Tiles(64, 32, 8, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
    },
    "grad_keys": {
        "sm_90": {64: Tiles(32, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
        "sm_80": {64: Tiles(32, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
        "gfx": {64: Tiles(32, 32, 8, 1), 128: Tiles(32, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
    },
}
# float64 serves calls of few pairs alone.
_DOUBLE: dict[str, _Table] = {
    "forward": {64: Tiles(32, 16, 4, 1), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 16, 8, 1)},
    "grad_queries": {64: Tiles(16, 16, 4, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
    "grad_keys": {64: Tiles(16, 16, 4, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
}
_INTERPRETED = Tiles(64, 64, 4, 1)


def _family(target: Target) -> str:
    if target.backend == "hip":
        return "gfx"
    return "sm_90" if int(target.arch) >= 90 else "sm_80"


def tiles(target: Target, dtype: torch.dtype, width: int, kernel: str = "forward") -> Tiles:
    """The tiles of a kernel: `forward`, `grad_queries` or `grad_keys`.

    Args:
        width: the greater of the head widths of keys and values.
    """
    if target.backend == "interpreter":
        return _INTERPRETED
    at = max(64, padded(width))
    if dtype == torch.float64:
        return _DOUBLE[kernel][at]
    return (_SINGLE if dtype == torch.float32 else _HALF)[kernel][_family(target)][at]


# Capabilities for which `forward_specialised` was measured to be faster than `forward` (`make gpu`
# races the two and says so). Empty until then: what was not measured is not chosen.
_SPECIALISED_ON: frozenset[int] = frozenset()
_SPECIALISED = {64: Tiles(128, 128, 4, 2), 128: Tiles(128, 128, 4, 2)}


def specialised(target: Target, dtype: torch.dtype, width: int) -> Tiles | None:
    """The tiles of the forward kernel with warps that only load, where it serves and is chosen.

    `SPARSEATTN_TRITON_SPECIALISED=1` chooses it wherever it serves, and 0 nowhere.
    """
    asked = os.environ.get("SPARSEATTN_TRITON_SPECIALISED", "")
    interpreted = target.backend == "interpreter"
    serves = interpreted or (target.backend == "cuda" and target.arch == 90)
    chosen = serves and (asked == "1" or (asked != "0" and target.arch in _SPECIALISED_ON))
    if not chosen or dtype not in (torch.float16, torch.bfloat16) or padded(width) > 128:
        return None
    return _INTERPRETED if interpreted else _SPECIALISED[max(64, padded(width))]


def decode_tiles(target: Target, dtype: torch.dtype, width: int) -> Tiles:
    """The tiles of a decoding step, which has rows of its own: memory-bound, so small ones."""
    if target.backend == "interpreter":
        return _INTERPRETED
    keys = max(16, min(64, 64 * 256 // padded(width) // dtype.itemsize // 2))
    return Tiles(16, keys, 4, 2)


def precision(target: Target, dtype: torch.dtype) -> str:
    """How products of float32 are made: through tensor cores in three parts, or as IEEE has it."""
    return "tf32x3" if dtype == torch.float32 and target.backend == "cuda" else "ieee"
