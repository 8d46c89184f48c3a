"""What a pattern and the sizes of a call decide: FlexAttention's lists of blocks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparseattn as sa

from .clauses import Table, lists_of, table_of, terms_of

BLOCK = 128  # FlexAttention's own default, which its kernels' tiles divide
_BLOCKS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything about a pattern that FlexAttention is given.

    Attributes:
        terms, tables: of `clauses.visible`.
        offset: the position of query 0, an int32 tensor of no dimension.
        blocks: `kv_num_blocks`, `kv_indices`, `full_kv_num_blocks`, `full_kv_indices`: int32
            `[1, 1, rows]` and `[1, 1, rows, columns]`, by query block.
        transposed: the same four by key block, for the backward.
        unseen: bool `[M]`, the keys that no query sees; None where there are none.
    """

    terms: Any
    tables: tuple[Table, ...]
    offset: Tensor
    blocks: tuple[Tensor, ...]
    transposed: tuple[Tensor, ...]
    unseen: Tensor | None


@functools.lru_cache(maxsize=64)
def _layout(mechanism: sa.MaskedSoftmax, n: int, m: int, causal: bool, offset: int) -> sa.Layout:
    return mechanism.clauses(sa.Grid(n, m, causal, offset)).with_causal()


def layout_of(mechanism: sa.MaskedSoftmax, call: sa.AttentionCall) -> sa.Layout:
    """The pattern of a call, causality included, without its key_mask and segments."""
    return _layout(mechanism, call.n, call.m, call.causal, int(call.offset))


def make(mechanism: Any, call: sa.AttentionCall) -> Plan:
    """The plan of a call; kept for the next calls like it."""
    # Within documents or holes, no block is known to be full.
    masked = call.key_mask is not None or call.q_segments is not None
    return _plan(layout_of(mechanism, call), masked, call.needs_grad, call.device)


@functools.lru_cache(maxsize=16)
def _plan(layout: sa.Layout, masked: bool, backward: bool, device: torch.device) -> Plan:
    csr = layout.lower(BLOCK, BLOCK)
    full = np.zeros_like(csr.full) if masked else csr.full

    def lists(csr: Any, full: Any) -> tuple[Tensor, ...]:
        both = [_dense(csr, which) for which in (~full, full)]
        return tuple(torch.from_numpy(x)[None, None].to(device) for pair in both for x in pair)

    transposed: tuple[Tensor, ...] = ()
    if backward:
        by_key = csr.transpose()
        transposed = lists(by_key, by_key.full & (not masked))
    unseen = ~_seen(csr)
    return Plan(
        terms_of(layout),
        tuple(table_of(x, device) for x in lists_of(layout)),
        torch.tensor(int(layout.grid.offset or 0), dtype=torch.int32, device=device),
        lists(csr, full),
        transposed,
        unseen.to(device) if unseen.any() else None,
    )


def _dense(csr: Any, which: Any) -> tuple[Any, Any]:
    """Some of the entries as FlexAttention lists them: how many in each row, and their columns,
    packed to the left of `[rows, columns]`."""
    rows, columns = csr.shape
    row = csr.row_ids()[which]
    count = np.bincount(row, minlength=rows)
    place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    listed = np.zeros((rows, columns), dtype=np.int32)
    listed[row, place] = csr.indices[which]
    return count.astype(np.int32), listed


def _seen(csr: Any) -> Tensor:
    """The keys that some query sees, bool `[M]`: O(entries), partial blocks are looked into only
    until all of their keys are known to be seen."""
    by_key = csr.transpose()
    blocks, m = by_key.shape[0], csr.frame.m
    seen = torch.zeros(blocks, BLOCK, dtype=torch.bool)
    seen[by_key.row_ids()[by_key.full]] = True
    seen.view(-1)[m:] = True
    start, stop = by_key.indptr[:-1].copy(), by_key.indptr[1:]
    width = 1
    while True:
        left = np.flatnonzero(~seen.all(1).numpy() & (start < stop))
        if not len(left):
            return seen.view(-1)[:m]
        for rows in np.array_split(left, -(-len(left) * width // _BLOCKS_AT_ONCE)):
            if not len(rows):
                continue
            entries = start[rows, None] + np.arange(width)
            real = entries < stop[rows, None]
            columns = np.where(real, by_key.indices[entries * real], -1)
            seen[rows] |= by_key.entry_masks(rows, columns).any(-1)
        start[left] += width
        width = min(2 * width, _BLOCKS_AT_ONCE)
