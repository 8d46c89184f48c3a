"""Sizes of tiles of the linear kernels, from a short table: by target, dtype and width alone.

Never by the length or the batch: a row then has the same bits in any call, and no new length
compiles anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...triton_launch import Target

MOST_WIDTH = 256  # of a head that a kernel takes, for keys and for values
MOST_PROJECTED = 128  # of a head that is projected: a tile holds whole rows
SPAN = 256  # positions whose pairs are weighed one by one
LONG_SPAN = 1024  # positions that a program carries a state through
_HELD = 64 * 128  # elements of a state that a program carries, at most
_MOST_FEATURES, _MOST_PROJECTIONS = 256, 128  # of such a state


class Tiles(NamedTuple):
    """How kernels are cut: `rows` of a tile, `features` and `values` of a block."""

    rows: int
    features: int
    values: int
    warps: int
    stages: int


class Carry(NamedTuple):
    """How kernels are cut that carry a state: `rows` of a chunk, `values` of a block."""

    rows: int
    values: int
    warps: int
    stages: int


def padded(width: int) -> int:
    """The width of a tile that holds rows of `width`: a power of two from 16 on."""
    return max(16, 1 << (width - 1).bit_length())


_HALF = Tiles(64, 64, 64, 8, 2)
_SINGLE = Tiles(32, 32, 32, 4, 1)
_DOUBLE = Tiles(16, 16, 16, 4, 1)
_INTERPRETED = Tiles(64, 128, 128, 4, 1)
_CARRIED = Tiles(64, 128, 128, 8, 2)  # of the sums that a carried state begins with


def tiles(target: Target, dtype: torch.dtype, carried: bool = False) -> Tiles:
    """The tiles of a kernel whose products are of `dtype`; of sums, where states are carried."""
    if carried:
        return _CARRIED
    if target.backend == "interpreter":
        return _INTERPRETED
    if dtype == torch.float64:
        return _DOUBLE
    return _SINGLE if dtype == torch.float32 else _HALF


_CARRY = {"outputs": (64, 4, 2)}


def carry(
    target: Target, dtype: torch.dtype, features: int, values: int, projected: bool, kernel: str
) -> Carry | None:
    """How a kernel is cut that carries a state, of all its features; None where none does.

    Args:
        dtype: of products. features: of both parts, projected or not. kernel: outputs, say.
    """
    served = kernel in _CARRY and dtype == torch.bfloat16 and target.backend != "hip"
    if not served or features > (_MOST_PROJECTIONS if projected else _MOST_FEATURES):
        return None
    features, whole = padded(features), padded(values)
    block = min(whole, _HELD // features)
    if kernel != "outputs" and block < whole:
        return None
    rows, warps, stages = _CARRY[kernel]
    return Carry(rows, block, warps, stages)


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
    return {torch.float32: "tf32x3", torch.float16: "tf32"}.get(dtype, "ieee")
