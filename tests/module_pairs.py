"""What the tests of `sa.MultiheadAttention` share: modules, inputs, when results are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sparseattn as sa
from sparseattn.testing.budgets import distance

B, N, M, E, H = 2, 7, 11, 24, 4
EPS = torch.finfo(torch.float64).eps


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def torch_module(**keywords: Any) -> nn.MultiheadAttention:
    torch.manual_seed(1)
    module = nn.MultiheadAttention(E, H, dtype=torch.float64, **keywords)
    for p in module.parameters():  # biases begin at 0, where a forgotten one shows nothing
        nn.init.normal_(p, std=0.5)
    return module


def grouped(**keywords: Any) -> sa.MultiheadAttention:
    torch.manual_seed(5)
    module = sa.MultiheadAttention(
        E, H, batch_first=True, dtype=torch.float64, num_kv_heads=2, **keywords
    )
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def close(x: Tensor, y: Tensor) -> bool:
    """Two float64 results by the rule for float64, 64 eps of the magnitudes summed: here E numbers,
    each of no more than the greatest in the result, or 1."""
    return distance(x, y) <= 64 * EPS * max(1.0, float(y.detach().abs().max())) * E


def banded(n: int, window: int) -> Tensor:
    at = torch.arange(n)
    return (at[None] > at[:, None]) | (at[:, None] - at[None] >= window)


PAD = torch.tensor([[False] * M, [False] * 8 + [True] * 3])
RIGHT = torch.arange(M)[None] >= torch.tensor([[M], [6]])  # what TransformerEncoder packs
ADDED = randn(N, M, seed=7)
CAUSAL = torch.ones(M, M, dtype=torch.bool).triu(1)
