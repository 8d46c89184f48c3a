"""Ranking of keys and blocks that no device, length or cut of the queries can change."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import sparseattn as sa

_SLAB_ELEMENTS = 2**21  # scores held together: some 60 MiB with what ranking them takes
_LEAST = -(2**63)


def slabs(n: int, per_row: int) -> Iterator[tuple[int, int]]:
    """Ranges of the n queries whose scores, `per_row` a query, fit in bounded memory."""
    # Traced lengths are symbols: one slab keeps them so.
    rows = n if torch.compiler.is_compiling() else max(1, _SLAB_ELEMENTS // max(per_row, 1))
    for start in range(0, n, max(rows, 1)):
        yield start, min(start + rows, n)


def positions(call: sa.AttentionCall, start: int, stop: int) -> Tensor:
    """The positions of some queries, int64 `[n]`."""
    return torch.arange(start, stop, device=call.device) + call.offset


def grouped(q: Tensor, k: Tensor) -> Tensor:
    """`q . k` in float64, for grouped heads: `[B, Hq, n, D]`, `[B, Hkv, m, D]` -> `[B, Hq, n, m]`.

    Matrix products add in an order that depends on shape and device, so equal keys may get scores
    that differ in the last bits. In float64 those bits are far below what `best` compares.
    """
    b, hq, n, d = q.shape
    hkv, m = k.shape[1], k.shape[2]
    folded = q.to(torch.float64).reshape(b, hkv, hq // max(hkv, 1) * n, d)
    return (folded @ k.to(torch.float64).transpose(-1, -2)).reshape(b, hq, n, m)


def logits(q: Tensor, k: Tensor, call: sa.AttentionCall, start: int, stop: int) -> Tensor:
    """The call's logits of queries `start:stop`, float64 `[B, Hq, n, m]`, before any mask."""
    scores = grouped(q[:, :, start:stop], k) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        bias = call.bias if call.bias.shape[2] == 1 else call.bias[:, :, start:stop]
        scores = scores + bias.to(torch.float64)
    return scores


def allowed(call: sa.AttentionCall, start: int, stop: int) -> Tensor:
    """The pairs that the call's masks allow queries `start:stop`: bool `[B or 1, 1, n, m]`."""
    i = positions(call, start, stop)
    j = torch.arange(call.m, device=call.device)
    mask = (j <= i[:, None]) if call.causal else torch.ones_like(j <= i[:, None])
    mask = mask[None, None]
    return mask if call.key_mask is None else mask & call.key_mask[:, None, None, :]


def best(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The `count` best candidates of each row, the best first: int32 `[..., min(count, S)]`.

    Scores are compared in float32; ties go to the lowest index; -1 pads where candidates run out. A
    NaN ranks above every number, so that it stays visible in what the selection is used for.

    Args:
        scores: `[..., S]`, floating point.
        candidates: bool, broadcastable to `scores`. Nothing else is ever chosen.
    """
    size = scores.shape[-1]
    rank = scores.to(torch.float32) + 0.0  # -0.0 and 0.0 are one number with two patterns of bits
    bits = rank.masked_fill(rank.isnan(), torch.nan).view(torch.int32)
    # Negative floats order backwards as integers: flip all but their sign.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    # One integer holds the score and, below it, the index: no two are equal, so topk has no choice.
    index = torch.arange(size - 1, -1, -1, device=scores.device)
    keys = (ordered * 2**32 + index).masked_fill(~candidates, _LEAST)
    top = keys.topk(min(count, size), dim=-1).values
    chosen = size - 1 - (top & (2**32 - 1))
    return chosen.masked_fill(top == _LEAST, -1).to(torch.int32)
