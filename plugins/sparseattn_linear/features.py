"""Random projections of FAVOR+: drawn once for a seed, never again."""

from __future__ import annotations

import operator
from functools import lru_cache

import torch
from torch import Tensor


def draw(features: int, dim: int, seed: int, orthogonal: bool) -> Tensor:
    """Rows w that are each N(0, I): float64 `[features, dim]` on the CPU.

    With `orthogonal`, the rows within each block of `dim` are orthogonal to each other, and each
    has the length of a row of independent normals (Choromanski et al. 2021, section 3.2). The Q of
    a QR decomposition is uniform over rotations only with the signs of R's diagonal multiplied in
    (Mezzadri 2007, arXiv:math-ph/0609050): without them every estimate is biased.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator, dtype=torch.float64, device="cpu")

    if not orthogonal:
        return normal(features)
    blocks = []
    for _ in range(-(-features // dim)):
        rotation, upper = torch.linalg.qr(normal(dim))
        rotation = rotation * upper.diagonal().sign()
        lengths = normal(dim).square().sum(1, keepdim=True).sqrt()
        blocks.append(rotation.T * lengths)
    return torch.cat(blocks)[:features]


@lru_cache(maxsize=64)
def _held(
    features: int, dim: int, seed: int, orthogonal: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, float]:
    # A tensor made in inference mode could not be saved for a later backward.
    with torch.inference_mode(False), torch.no_grad():
        w = draw(features, dim, seed, orthogonal)
        longest = float(w.square().sum(1).amax())
        return w.to(device, dtype), longest


def _constant(
    features: int, dim: int, seed: int, orthogonal: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, float]:
    return _held(features, dim, seed, orthogonal, dtype, device)


# What `torch.compiler.assume_constant_result` sets; it imports the compiler to do so, which takes a
# second in every process that compiles nothing.
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def projection(
    features: int, dim: int, seed: int, orthogonal: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, float]:
    """`draw`, in the dtype and on the device wanted, and the greatest `|w|^2` of its rows."""
    # Under dynamic shapes the head width is a symbol; `index` makes it the number it is.
    return _constant(features, operator.index(dim), seed, orthogonal, dtype, device)
