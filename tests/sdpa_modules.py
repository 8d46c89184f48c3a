"""Modules that call torch's scaled_dot_product_attention in every way, for the tests of swaps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as early_bound

from sparseattn.testing import budgets

WINDOW = 4
SPEC = "windowed(window=4, sinks=0)"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def band(n: int, m: int, offset: int) -> Tensor:
    """True where a window of 4 sees, with query 0 at key position `offset`."""
    return (torch.arange(n)[:, None] + offset - torch.arange(m)).abs() < WINDOW


class Calls(nn.Module):
    """A person's own module: whatever it is called with goes to torch's attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(*args, **kwargs)


class CallsEarlyBound(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return early_bound(*args, **kwargs)


class CallsHelper(nn.Module):
    """As diffusers does: a processor that is no module makes the call."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = lambda *args, **kwargs: torch.nn.functional.scaled_dot_product_attention(
            *args, **kwargs
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.processor(*args, **kwargs)


def close(found: Tensor, wanted: Any, *args: Tensor) -> None:
    """Within the budget of `wanted`, a function of tensors, in float64."""
    ref = wanted(*(x.double() for x in args))
    naive = wanted(*args)
    assert found.shape == ref.shape
    assert budgets.distance(found, ref) <= budgets.rule(naive, ref, torch.float32)


def layers(kind: str, dropout: float = 0.0, **words: Any) -> nn.Module:
    torch.manual_seed(3)
    given: dict[str, Any] = {"batch_first": True, "dropout": dropout, **words}
    if kind == "encoder layer":
        return nn.TransformerEncoderLayer(32, 4, 48, **given).eval()
    if kind == "encoder":
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, **given), 2).eval()
    if kind == "decoder layer":
        return nn.TransformerDecoderLayer(32, 4, 48, **given).eval()
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, **given), 2).eval()
