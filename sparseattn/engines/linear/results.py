"""Where results are written: zeroed only where not every row is."""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import AttentionCall
from ...runs import Run, trim_future


def whole(runs: list[Run], call: AttentionCall) -> tuple[bool, bool]:
    """Whether one run writes every query, and every key: results then need no zeroing."""
    if len(runs) != 1 or runs[0].batch != slice(0, call.batch):
        return False, False
    alone = runs[0].subcall(call)
    queries = alone.n == call.n and not (call.causal and runs[0].offset < 0)
    return queries, trim_future(alone) == call.m


def result(shape: tuple[int, ...], like: Tensor, whole: bool) -> Tensor:
    make = torch.empty if whole else torch.zeros
    return make(shape, dtype=like.dtype, device=like.device)
