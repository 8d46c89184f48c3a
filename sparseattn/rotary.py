"""Rotary positions: queries and keys turned by where they stand."""

from __future__ import annotations

import torch
from torch import Tensor

from .digits import wide, widest


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions: pairs `(x[i], x[i + D/2])` turned by `position * base ** (-2 i / D)`.

    The halves are split as in GPT-NeoX and Llama; Su et al. 2021, RoFormer (arXiv:2104.09864),
    eq. 34, pairs neighbours instead, which is the same up to an order of the features.

    Args:
        x: `[B, H, n, D]`, D even. positions: int64 `[B or 1, n]`.

    Returns:
        `[B, H, n, D]` in x's dtype; the products are taken in float32 or wider.
    """
    half = x.shape[3] // 2
    # A float32 angle of position 10^6 is off by 0.03; these are few numbers, so they may be wide.
    exact = widest(x.device)
    steps = torch.arange(half, dtype=exact, device=x.device) / half
    angles = positions.to(exact)[:, None, :, None] * base**-steps
    dtype = wide(x.dtype)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    a, b = x.to(dtype).split(half, dim=3)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=3).to(x.dtype)
