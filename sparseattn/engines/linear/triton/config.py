"""Sizes of tiles of the linear kernels, from a short table: by target, dtype and width alone.

Never by the length or the batch: a row then has the same bits in any call, and no new length
compiles anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...triton_launch import Target, padded

MOST_PROJECTED = 128  # of a head that is projected: a tile holds whole rows
SPAN = 256  # positions whose pairs are weighed one by one
LONG_SPAN = 1024  # positions that a program carries a state through
_HELD = 64 * 128  # elements of a state that a program carries, at most
_MOST_FEATURES, _MOST_PROJECTIONS, _MOST_VALUES = 256, 128, 128  # of such a state


class Tiles(NamedTuple):
    """How kernels are cut: `rows` of a tile or a chunk, `features` and `values` of a block."""

    rows: int
    features: int
    values: int
    warps: int
    stages: int


_HALF = Tiles(64, 64, 64, 8, 2)
_SINGLE = Tiles(32, 32, 32, 4, 1)
_DOUBLE = Tiles(16, 16, 16, 4, 1)
_INTERPRETED = Tiles(64, 128, 128, 4, 1)
# Of the sums that a carried state begins with. On an H100 (the call below) they took 0.13 ms, and
# 0.14 to 0.26 with 128 features in a block.
_CARRIED = Tiles(64, 64, 128, 4, 3)


def tiles(target: Target, dtype: torch.dtype, carried: bool = False) -> Tiles:
    """The tiles of a kernel whose products are of `dtype`; of sums, where states are carried."""
    if carried:
        return _CARRIED
    if target.backend == "interpreter":
        return _INTERPRETED
    if dtype == torch.float64:
        return _DOUBLE
    return _SINGLE if dtype == torch.float32 else _HALF


# Rows, warps and stages. Of ten cuts of the outputs this one led on an H100: a causal call in
# bfloat16 of 2 x 16384 x 16 x 128 took 0.86 ms, and 0.90 to 1.92 with the others.
_BY_VALUES = {"outputs": (64, 4, 2), "means": (64, 4, 2), "grad_values": (64, 4, 2)}
_BY_FEATURES = {"grad_queries": (64, 4, 2), "grad_keys": (64, 4, 2)}


def carry(
    target: Target,
    dtype: torch.dtype,
    features: int,
    parts: int,
    values: int,
    projected: bool,
    kernel: str,
) -> Tiles | None:
    """How a kernel is cut that carries a state; None where none does.

    Args:
        dtype: of products. features: of all parts; projected: whether by a projection.
        values: the width of values. kernel: its name in the tables: a program of some holds all
            features and a block of values, one of the others all values and a block of features.
    """
    most = _MOST_PROJECTIONS if projected else _MOST_FEATURES
    if dtype != torch.bfloat16 or target.backend == "hip" or features > most:
        return None
    whole, wide = padded(features), padded(values)
    if kernel in _BY_VALUES:
        rows, warps, stages = _BY_VALUES[kernel]
        return Tiles(rows, whole, min(wide, _HELD // whole), warps, stages)
    if wide > _MOST_VALUES:
        return None
    block = min(whole, _HELD // wide)
    # A gradient through a projection, or through two parts, is a sum over features.
    summed = projected or parts > 1
    uneven = whole != features or wide != values
    if (summed and block < whole) or (parts > 1 and uneven):
        return None
    rows, warps, stages = _BY_FEATURES[kernel]
    return Tiles(rows, block, wide, warps, stages)


def products(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the operands of products, for inputs of a dtype.

    float16 holds neither sums over many keys nor features near 0: float32, whose products of one
    tf32 have as many digits, stands for it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def precision(target: Target, dtype: torch.dtype) -> str:
    """How products of float32 are made, for inputs of a dtype."""
    if target.backend != "cuda":
        return "ieee"
    return {torch.float32: "bf16x6", torch.float16: "tf32"}.get(dtype, "ieee")
