"""Selections on the CPU: only the chosen pairs are computed, whatever each query and head chose.

Two ways, by the width of the blocks. Wide blocks are served from their own side: all queries that
chose a block form tiles against it, on the fused kernel, and what the blocks of one query gave is
merged by its log normalisers. Narrow ones are pairs of one query and one key: sampled products,
and weighted sums of rows. Either way time follows the number of pairs, nothing of size N x M is
formed, and a query's numbers depend on no later one: its place in a tile is counted from earlier
queries, tiles have one size, and everything else is row by row.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import doubled, wide
from . import tiles
from .primitive import weighted_sums

# Keys in a block from which on tiles pay.
_WIDE = 16
# Pairs of queries and keys that are held together.
_PAIRS_AT_ONCE = 2**19
_LAST = np.iinfo(np.int32).max


def serves(call: AttentionCall) -> bool:
    """Whether this file can compute a call that has a selection."""
    return call.device.type == "cpu" and call.softcap is None and call.bias is None


class Pairs(NamedTuple):
    """The visible pairs of some rows, row after row, keys ascending.

    Attributes:
        rows: the rows, a slice into G * n of one key head. keep: bool `[R, S]`, with the visible
            choices of each row. starts: int64 `[R + 1]`. keys: int64 `[P]`.
    """

    rows: slice
    keep: Tensor
    starts: Tensor
    keys: Tensor


def _pairs(mechanism: Any, call: AttentionCall, b: int, head: int) -> Iterator[Pairs]:
    """The pairs of one key head, in slabs of bounded memory."""
    assert call.selection is not None
    groups = slice(head * call.groups, (head + 1) * call.groups)
    ids = call.selection[b, groups].reshape(-1, call.selection.shape[-1])
    block, offset = mechanism.block, int(call.offset)
    mask = None if call.key_mask is None else call.key_mask[b].numpy()
    step = max(1, _PAIRS_AT_ONCE // max(1, ids.shape[1] * block))
    for start in range(0, ids.shape[0], step):
        chosen = ids[start : start + step].numpy().astype(np.int64)
        chosen[chosen < 0] = _LAST
        chosen.sort(axis=1)
        chosen[:, 1:][chosen[:, 1:] == chosen[:, :-1]] = (
            _LAST  # a set: what is named twice counts once
        )
        keys = chosen
        if block > 1:
            keys = (chosen[:, :, None] * block + np.arange(block)).reshape(len(chosen), -1)
        last = call.m - 1
        if call.causal:
            place = offset + np.arange(start, start + len(keys)) % call.n
            keep = keys <= np.minimum(place, last)[:, None]
        else:
            keep = keys <= last
        if mask is not None:
            keep &= mask[np.where(keep, keys, 0)]
        starts = np.concatenate(([0], np.cumsum(keep.sum(1))))
        yield Pairs(
            slice(start, start + len(keys)),
            torch.from_numpy(keep),
            torch.from_numpy(starts),
            torch.from_numpy(keys[keep]),
        )


@cache
def _quiet() -> None:
    """torch says once in a process that its sparse tensors are young; nobody here asked for one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def _dots(pairs: Pairs, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * a[row] . b[key]` of every pair: a `[R, D]`, b `[M, D]` -> `[P]`."""
    _quiet()
    size = (a.shape[0], b.shape[0])
    zeros = a.new_zeros(len(pairs.keys))
    pattern = torch.sparse_csr_tensor(pairs.starts, pairs.keys, zeros, size, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, a, b.t(), beta=0.0, alpha=scale).values()


def forward(
    mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Attention over one run: q `[b, Hkv, G, n, D]`, k, v `[b, Hkv, m, .]`.

    Returns:
        out `[b, Hkv, G, n, Dv]` in q's dtype, lse `[b, Hkv, G, n]`.
    """
    if mechanism.block >= _WIDE:
        return tiles.forward(mechanism, q, k, v, call)
    acc = wide(q.dtype)
    out = q.new_zeros(*q.shape[:4], v.shape[-1])
    lse = q.new_full(q.shape[:4], -torch.inf, dtype=acc)
    for b in range(call.batch):
        for head in range(call.kv_heads):
            rows = q[b, head].reshape(-1, q.shape[-1]).to(acc)
            keys, values = k[b, head].to(acc).contiguous(), v[b, head].to(acc).contiguous()
            o, s = out[b, head].view(-1, v.shape[-1]), lse[b, head].view(-1)
            for pairs in _pairs(mechanism, call, b, head):
                scores = _dots(pairs, rows[pairs.rows], keys, call.scale)
                whole = len(scores) == pairs.keep.numel()
                if whole:
                    powers = scores.view(pairs.keep.shape)
                else:
                    powers = rows.new_full(pairs.keep.shape, -torch.inf)
                    powers.masked_scatter_(pairs.keep, scores)
                top = powers.amax(1, keepdim=True)
                top.masked_fill_(top == -torch.inf, 0.0)
                total = powers.sub_(top).exp_().sum(1, keepdim=True)
                weights = powers.view(-1) if whole else powers[pairs.keep]
                mixed = weighted_sums(pairs.starts, pairs.keys, values, weights)
                o[pairs.rows] = mixed.div_(total.masked_fill(total == 0, 1.0)).to(q.dtype)
                s[pairs.rows] = total.log_().add_(top)[:, 0]  # log(0) = -inf: an empty row
    return out, lse


def backward(
    mechanism: Any,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, wide; shapes as `forward`."""
    if mechanism.block >= _WIDE:
        return tiles.backward(mechanism, grad_out, grad_lse, q, k, v, out, lse, call)
    # One key may take from every query, and sums of rows go one by one: float32 needs more digits.
    acc = doubled(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=acc) for x in (q, k, v))
    for b in range(call.batch):
        for head in range(call.kv_heads):
            rows, g, o = (x[b, head].reshape(-1, x.shape[-1]).to(acc) for x in (q, grad_out, out))
            keys, values = k[b, head].to(acc).contiguous(), v[b, head].to(acc).contiguous()
            slope = (g * o).sum(1)
            if grad_lse is not None:
                slope -= grad_lse[b, head].reshape(-1).to(acc)
            norm = lse[b, head].reshape(-1).to(acc)
            total = dq[b, head].view(-1, q.shape[-1])
            for pairs in _pairs(mechanism, call, b, head):
                at, index = pairs.rows, pairs.keys
                count = pairs.starts.diff()
                row = torch.repeat_interleave(count)
                weights = _dots(pairs, rows[at], keys, call.scale).sub_(norm[at][row]).exp_()
                d_scores = _dots(pairs, g[at], values, 1.0).sub_(slope[at][row]).mul_(weights)
                d_scores *= call.scale
                total[at] = weighted_sums(pairs.starts, index, keys, d_scores)
                # By key, rows in order: plain sums, the same bits every time.
                ordered, order = index.sort(stable=True)
                starts = torch.searchsorted(ordered, torch.arange(call.m + 1))
                row = row[order]
                dk[b, head] += weighted_sums(starts, row, rows[at], d_scores[order])
                dv[b, head] += weighted_sums(starts, row, g[at], weights[order])
    return dq, dk, dv
