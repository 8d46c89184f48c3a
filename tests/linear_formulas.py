"""The kernelised mechanisms, written densely from the table of their definitions.

Nothing here is shared with what it convicts, but for the random rows of `performer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import sparseattn as sa
from sparseattn_linear import Cosformer, Linear, Performer, Retention, Taylor
from sparseattn_linear.features import draw

FEATURES, HORIZON = 64, 700

# kernel(q, k, i, j, scale): weights before masks and division, for q `[H, N, D]`, k `[H, M, D]` and
# positions i `[N]`, j `[M]`.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def linear(q: Tensor, k: Tensor, i: Tensor, j: Tensor, scale: float) -> Tensor:
    def phi(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))

    return phi(q) @ phi(k).mT


def performer(q: Tensor, k: Tensor, i: Tensor, j: Tensor, scale: float) -> Tensor:
    rows = draw(FEATURES, q.shape[-1], 0, True).to(q.dtype)

    def phi(x: Tensor) -> Tensor:
        x = x * math.sqrt(scale)
        return torch.exp(x @ rows.T - (x**2).sum(-1, keepdim=True) / 2) / math.sqrt(FEATURES)

    return phi(q) @ phi(k).mT


def taylor(q: Tensor, k: Tensor, i: Tensor, j: Tensor, scale: float) -> Tensor:
    x = scale * (q @ k.mT)
    return 1 + x + x * x / 2


def cosformer(q: Tensor, k: Tensor, i: Tensor, j: Tensor, scale: float) -> Tensor:
    distance = (i[:, None] - j).double()
    near = torch.cos(math.pi * distance / (2 * HORIZON)).to(q.dtype)
    return q.clamp(min=0) @ k.clamp(min=0).mT * near


def retention(q: Tensor, k: Tensor, i: Tensor, j: Tensor, scale: float) -> Tensor:
    distance = (i[:, None] - j).clamp(min=0).double()
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(q.shape[0])], dtype=torch.float64)
    return scale * (q @ k.mT) * (gamma[:, None, None] ** distance).to(q.dtype)


CASES: list[tuple[sa.KernelizedLinear, Kernel]] = [
    (Linear(), linear),
    (Performer(features=FEATURES), performer),
    (Taylor(), taylor),
    (Cosformer(horizon=HORIZON), cosformer),
    (Retention(), retention),
]
KERNELS = {mechanism.name: kernel for mechanism, kernel in CASES}


@dataclass
class Row:
    """Positions of one row of a batch, and which pairs its masks allow."""

    i: Tensor
    j: Tensor
    allowed: Tensor


def place(
    n: int,
    m: int,
    causal: bool,
    offset: int,
    key_mask: list[bool] | None,
    q_ids: list[int] | None,
    k_ids: list[int] | None,
) -> Row:
    """Loops over documents, queries and keys: DESIGN's table of semantics, word for word."""
    q_ids, k_ids = q_ids or [0] * n, k_ids or [0] * m
    packed = len({*q_ids, *k_ids}) > 1
    key_mask = [True] * m if key_mask is None else key_mask
    i, j = [0] * n, [0] * m
    allowed = [[False] * m for _ in range(n)]
    for document in {*q_ids, *k_ids}:
        queries = [r for r in range(n) if q_ids[r] == document]
        keys = [c for c in range(m) if k_ids[c] == document]
        shown = [at for at, c in enumerate(keys) if key_mask[c]]
        start = len(keys) - len(queries) if packed else offset
        for at, c in enumerate(keys):
            j[c] = at - (shown[0] if shown else 0)
        for at, r in enumerate(queries):
            i[r] = start + at - (shown[0] if shown else 0)
            for c in keys:
                allowed[r][c] = key_mask[c] and (not causal or j[c] <= i[r])
    mask = torch.tensor(allowed, dtype=torch.bool).view(n, m)
    return Row(torch.tensor(i, dtype=torch.int64), torch.tensor(j, dtype=torch.int64), mask)


def weights(
    mechanism: sa.KernelizedLinear, q: Tensor, k: Tensor, rows: list[Row], scale: float
) -> Tensor:
    """W `[B, Hq, N, M]`, in q's dtype."""
    maps = []
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    for b, row in enumerate(rows):
        w = KERNELS[mechanism.name](q[b], k[b], row.i, row.j, scale)
        w = w.masked_fill(~row.allowed, 0.0)
        if mechanism.name != "retention":
            total = w.sum(-1, keepdim=True)
            w = w / total.masked_fill(total == 0, torch.inf)
        maps.append(w)
    return torch.stack(maps)


def dense(
    mechanism: sa.KernelizedLinear, q: Tensor, k: Tensor, v: Tensor, rows: list[Row], scale: float
) -> Tensor:
    """W @ v `[B, Hq, N, Dv]`, in q's dtype."""
    groups = q.shape[1] // k.shape[1]
    return weights(mechanism, q, k, rows, scale) @ v.repeat_interleave(groups, dim=1)


def place_call(q: Tensor, k: Tensor, options: dict[str, Any]) -> list[Row]:
    """`place` for every row of a batch, from the keywords of `sa.attention`."""
    n, m = q.shape[2], k.shape[2]
    offset = options.get("q_offset")
    rows = []
    for b in range(q.shape[0]):
        own = m - n if offset is None else offset[b].item() if torch.is_tensor(offset) else offset
        q_ids, k_ids = options.get("q_segments"), options.get("kv_segments")
        q_ids, k_ids = (q_ids, k_ids) if k_ids is not None else (q_ids, q_ids)
        lists = (
            None if x is None else x[b].tolist() for x in (options.get("key_mask"), q_ids, k_ids)
        )
        rows.append(place(n, m, options.get("causal", False), own, *lists))
    return rows


def budget(ref: Tensor, naive: Tensor) -> float:
    """DESIGN section 6: twice the naive computation's error in its dtype, and twice a rounding."""
    in_dtype = ref.to(naive.dtype)
    rounding = ((in_dtype + 0.3 - 0.3).double() - in_dtype.double()).abs().max()
    return 2 * (naive.double() - ref).abs().max().item() + 2 * rounding.item()


MECHANISMS = [mechanism for mechanism, _ in CASES]
every = pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
either = pytest.mark.parametrize(
    ("mechanism", "causal"),
    [
        pytest.param(m, causal, id=f"{m.name}-{'causal' if causal else 'all'}")
        for m in MECHANISMS
        for causal in ((True,) if m.name == "retention" else (False, True))
    ],
)
