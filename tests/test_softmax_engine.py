"""The softmax engine against the float64 definition: every call feature, by the exact budget.

The mechanisms here are chosen for the engine's paths: a band, a band with sinks, one wider than
the sequence, a pattern without clauses, and a selection that differs by head and query.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import sparseattn as sa
from sparseattn.call import AttentionCall
from sparseattn.testing.budgets import Budgets


@dataclass(frozen=True)
class Band(sa.MaskedSoftmax):
    """A band, and the first keys."""

    name = "band"
    window: int = 5
    sinks: int = 0

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return ((i - j).abs() < self.window) | (j < self.sinks)

    def layout(self, grid: Any) -> Any:
        band = grid.band(self.window - 1, self.window - 1)
        return band | grid.first_keys(self.sinks) if self.sinks else band


@dataclass(frozen=True)
class Hashed(sa.MaskedSoftmax):
    """Two pairs in five, in no order that clauses could state."""

    name = "hashed"

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i * 7 + j * 3) % 5 < 2


@dataclass(frozen=True)
class Turning(sa.MaskedSoftmax):
    """Three blocks of four keys, others for each query and head."""

    name = "turning"
    block: int = 4

    def select(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
        blocks = max(1, -(-call.m // self.block))
        row = torch.arange(q.shape[2])[:, None] + torch.arange(3)
        head = torch.arange(q.shape[1])[:, None, None]
        ids = ((row + head) % blocks).to(torch.int32)
        return ids.expand(q.shape[0], -1, -1, -1).contiguous()


MECHANISMS = [Band(5), Band(100, 3), Band(400), Hashed(), Turning()]
FEATURES = ["", "holes", "left", "right", "segments", "offset", "offsets", "cap", "sink", "bias"]
SIZES = [(1, 1), (63, 65), (100, 100), (65, 63), (1, 100)]


def arguments(feature: str, n: int, m: int, heads: int, dtype: torch.dtype) -> dict[str, Any]:
    """Keywords of one feature, for a batch of 2."""
    thirds = (torch.arange(n) // max(1, n // 3))[None].expand(2, -1)
    starts = torch.tensor([0, m // 3])[:, None]
    made: dict[str, dict[str, Any]] = {
        "": {},
        "holes": {"key_mask": torch.rand(2, m) > 0.3},
        "left": {"key_mask": torch.arange(m)[None] >= starts},
        "right": {"key_mask": torch.arange(m)[None] < m - starts},
        "segments": {"q_segments": thirds},
        "offset": {"q_offset": -5},
        "offsets": {"q_offset": torch.tensor([3, -7])},
        "cap": {"softcap": 2.0},
        "sink": {"sink_logits": torch.randn(heads, dtype=dtype, requires_grad=True)},
        "bias": {"bias": torch.randn(1, heads, 1, m, dtype=dtype, requires_grad=True)},
    }
    return made[feature]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
def test_output_lse_and_gradients(mechanism, feature, dtype):
    torch.manual_seed(0)
    sizes = [*SIZES, (257, 257)] if dtype == torch.float32 else SIZES
    for (n, m), (causal, kv_heads) in itertools.product(sizes, ((True, 1), (False, 2))):
        if n != m and feature == "segments":
            continue
        q = torch.randn(2, 2, n, 8, dtype=dtype, requires_grad=True)
        k = torch.randn(2, kv_heads, m, 8, dtype=dtype, requires_grad=True)
        v = torch.randn(2, kv_heads, m, 6, dtype=dtype, requires_grad=True)
        given = arguments(feature, n, m, 2, dtype)
        extra = [given[name] for name in ("sink_logits", "bias") if name in given]
        out, lse = sa.attention(
            q, k, v, mechanism, causal=causal, impl="torch", return_lse=True, **given
        )
        seeds = torch.randn_like(out), torch.randn_like(lse)
        empty = lse == -torch.inf
        grads = torch.autograd.grad(
            [out, lse], [q, k, v, *extra], [seeds[0], seeds[1].masked_fill(empty, 0)]
        )
        call = AttentionCall.make(q, k, v, causal=causal, needs_lse=True, **given)
        budgets = Budgets(mechanism, q, k, v, call, seeds)
        verdicts = {"out": budgets.out(out), "lse": budgets.lse(lse)}
        verdicts |= zip(("dq", "dk", "dv", "dextra"), budgets.grads(grads), strict=False)
        case = f"N={n}, M={m}, causal={causal}, kv_heads={kv_heads}"
        for what, verdict in verdicts.items():
            assert verdict.error <= verdict.budget, f"{what} at {case}: {verdict}"
