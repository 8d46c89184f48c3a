"""Patterns selected from q and k, for each query and head: block top-k, lines, and the oracle.

A selection is a set: a row's ids may come in any order, and -1 names nothing. Scores are computed
in float64 and compared in float32, ties to the lowest index (see `ranking`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

import sparseattn as sa

from .options import check_count, refuse
from .ranking import allowed, best, grouped, logits, positions, slabs


@dataclass(frozen=True)
class TopKBlocks(sa.MaskedSoftmax):
    """For each query and head: the first and the nearest blocks, and the best of the past ones.

    The first `first` blocks, the last `local` blocks up to the query's own, and of the other
    blocks the `top` with the greatest `q_i . mean(k of the block)`. Under causal only complete
    blocks are scored, those whose last position is not after i, so that a mean never holds a later
    key. Without causality all other blocks are; a ragged last block counts by the mean of its real
    keys. Masked keys enter no mean, and a block of masked keys alone is never selected. Equal
    scores: the lowest block first.

    Refuses: nothing. Cost: selection O(N M D / block), attention O(N (first + local + top) block).

    Attributes:
        block: keys in a block.
        top: scored blocks a query.
        first: the first blocks of a document, taken unscored.
        local: the nearest blocks up to the query's own, taken unscored.
    """

    name = "topk_blocks"
    source = "Lu et al. 2025, MoBA, section 2.2 (arXiv:2502.13189)"

    block: int = 64
    top: int = 16
    first: int = 1
    local: int = 1

    def __post_init__(self) -> None:
        check_count(self, "block", 1)
        for option in ("top", "first", "local"):
            check_count(self, option, 0)
        if self.top == self.first == self.local == 0:
            refuse(self, "top", 0, "at least one block a query: top, first and local are all 0")

    def select(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        sums, sizes = self._sums(k, call)
        count = sums.shape[2]
        parts = [
            self._rows(q, sums, sizes, call, start, stop)
            for start, stop in slabs(call.n, call.batch * call.q_heads * max(count, 1))
        ]
        empty = torch.empty(*q.shape[:2], 0, 1, dtype=torch.int32, device=q.device)
        return torch.cat(parts, dim=2) if parts else empty

    def _sums(self, k: Tensor, call: sa.AttentionCall) -> tuple[Tensor, Tensor]:
        """The sum of the allowed keys of each block, float64 `[B, Hkv, J, D]`, and their number,
        int64 `[B or 1, J]`."""
        size = min(self.block, max(call.m, 1))  # a block longer than the keys needs no padding
        short = -call.m % size
        k = k.to(torch.float64)
        mask = torch.ones(1, call.m, dtype=torch.bool, device=k.device)
        if call.key_mask is not None:
            mask = call.key_mask
            k = k.masked_fill(~mask[:, None, :, None], 0.0)
        sums = pad(k, (0, 0, 0, short)).unflatten(2, (-1, size)).sum(3)
        return sums, pad(mask, (0, short)).unflatten(1, (-1, size)).sum(2)

    def _rows(
        self,
        q: Tensor,
        sums: Tensor,
        sizes: Tensor,
        call: sa.AttentionCall,
        start: int,
        stop: int,
    ) -> Tensor:
        count, real = sums.shape[2], sizes > 0
        i = positions(call, start, stop)[:, None]
        own = i // self.block
        block = torch.arange(count, device=q.device)
        near = (block > own - self.local) & (block <= own)
        first = (block < self.first).expand_as(near)
        if call.causal:
            first = first & (block * self.block <= i)
        parts = []
        # Unscored blocks, as ids: the first ones, then the near ones that are not among them.
        width = min(self.first, count)
        parts.append(torch.where(first & real[:, None], block, -1)[..., :width])
        width = min(self.local, count)
        ids = own.clamp(max=count - 1) - torch.arange(width, device=q.device)
        at = ids.clamp(min=0)
        taken = (near & ~first & real[:, None]).gather(2, at.expand(real.shape[0], -1, -1))
        parts.append(torch.where(taken & (ids >= 0), ids, -1))
        shape = (q.shape[0], q.shape[1], stop - start, -1)
        unscored = torch.cat(parts, dim=-1).to(torch.int32)[:, None].expand(shape)
        if not self.top:
            return unscored
        others = ~near & ~first & real[:, None]
        if call.causal:
            others = others & (block < (i + 1) // self.block)
        # The mean's division comes last: before it, the sums of round numbers are exact, and ties
        # that cancel to 0 stay ties.
        scores = grouped(q[:, :, start:stop], sums) / sizes.clamp(min=1)[:, None, None]
        return torch.cat([unscored, best(scores, others[:, None], self.top)], dim=-1)


@dataclass(frozen=True)
class VerticalSlash(sa.MaskedSoftmax):
    """The key columns and the diagonals that the last queries weigh most, one choice a head.

    The exact attention weights of the last `last` queries are summed over columns (keys j) and
    over diagonals (distances i - j); the `verticals` greatest columns and the `slashes` greatest
    diagonals are then seen by every query, as far as they are visible to it. Queries before the
    first key or past the last one are padding, and are passed over in the estimate unless there are
    no others. Equal sums: the lowest key, or the lowest distance, first.

    `looks_ahead`: the last tokens decide what the earlier ones see, so it is fit for prefill only.

    Refuses: a cache, and inputs that require gradients. Cost: selection O(last M D), attention
    O(N (verticals + slashes)) pairs, scattered over single keys: correct everywhere, no promise of
    speed.

    Attributes:
        verticals: key columns.
        slashes: diagonals.
        last: queries that the estimate uses.
    """

    name = "vertical_slash"
    source = "Jiang et al. 2024, MInference 1.0, section 3.2 (arXiv:2407.02490)"
    looks_ahead = True
    block = 1

    verticals: int = 64
    slashes: int = 64
    last: int = 64

    def __post_init__(self) -> None:
        check_count(self, "verticals", 0)
        check_count(self, "slashes", 0)
        check_count(self, "last", 1)
        if self.verticals == self.slashes == 0:
            refuse(self, "verticals", 0, "at least one line: verticals and slashes are both 0")

    def select(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        if call.n == 0 or call.m == 0:
            shape = (*q.shape[:3], 1)
            return torch.full(shape, -1, dtype=torch.int32, device=q.device)
        columns, distances, real = self._lines(q, k, call)
        width = columns.shape[-1] + distances.shape[-1]
        # Which keys lie on a column: a key is named once. Slot m takes the padding.
        on_column = torch.zeros(*q.shape[:2], call.m + 1, dtype=torch.bool, device=q.device)
        on_column = on_column.scatter(-1, torch.where(columns < 0, call.m, columns).long(), True)
        parts = [
            self._rows(columns, on_column, distances, real, call, start, stop)
            for start, stop in slabs(call.n, call.batch * call.q_heads * width)
        ]
        return torch.cat(parts, dim=2)

    def _lines(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """Columns `[B, Hq, V]` (-1 pads), distances `[B, Hq, S]` and which of those are real."""
        first, stop = max(0, -call.offset), min(call.n, call.m - call.offset)
        if first >= stop:
            first, stop = 0, call.n
        begin = max(first, stop - self.last)
        per_column = per_diagonal = torch.zeros((), dtype=torch.float64, device=q.device)
        seen = crossed = torch.zeros((), dtype=torch.int64, device=q.device)
        k = k.to(torch.float64)  # once, not in every slab
        # A slab of r rows crosses r + m - 1 diagonals.
        per_row = call.batch * call.q_heads * (call.m + stop - begin)
        for low, high in slabs(stop - begin, per_row):
            mask = allowed(call, begin + low, begin + high)
            weights = _softmax(logits(q, k, call, begin + low, begin + high), mask, call)
            edges = (low, stop - begin - high)  # the slab's place among all diagonals
            per_column = per_column + weights.sum(2)
            per_diagonal = per_diagonal + pad(_diagonal_sums(weights), edges)
            seen = seen + mask.sum(2)
            crossed = crossed + pad(_diagonal_sums(mask.to(torch.int32)), edges)
        columns = best(per_column, seen > 0, self.verticals)
        diagonals = best(per_diagonal, crossed > 0, self.slashes).to(torch.int64)
        # Diagonal 0 joins the first of these queries with the last key.
        return columns, diagonals + (begin + call.offset - (call.m - 1)), diagonals >= 0

    def _rows(
        self,
        columns: Tensor,
        on_column: Tensor,
        distances: Tensor,
        real: Tensor,
        call: sa.AttentionCall,
        start: int,
        stop: int,
    ) -> Tensor:
        i = positions(call, start, stop)[:, None]
        vertical = columns.to(torch.int64)[:, :, None]
        keep = vertical <= i if call.causal else (vertical >= 0).expand(-1, -1, stop - start, -1)
        vertical = torch.where(keep, vertical, -1)
        slash = i - distances[:, :, None]
        keep = real[:, :, None] & (slash >= 0) & (slash < call.m)
        if call.causal:
            keep = keep & (slash <= i)
        at = slash.clamp(0, call.m - 1)
        if call.key_mask is not None:
            mask = call.key_mask[:, None, None].expand(*at.shape[:3], -1)
            keep = keep & mask.gather(3, at)
        keep = keep & ~on_column[:, :, None].expand(*at.shape[:3], -1).gather(3, at)
        return torch.cat([vertical, torch.where(keep, slash, -1)], dim=-1).to(torch.int32)


@dataclass(frozen=True)
class OracleTopK(sa.MaskedSoftmax):
    """The largest logits of each query and head: the greatest retained mass at that budget.

    The `keys` largest of the logits that the call's masks allow, with its scale, softcap and bias.
    It computes all logits to choose among them: a control that says what a selection could reach,
    not a way to save time. Equal logits: the lowest key first.

    Refuses: nothing. Cost: O(N M D) time, as exact attention, in slabs of bounded memory.

    Attributes:
        keys: keys a query.
    """

    name = "oracle_topk"
    source = "exact top-k attention; Gupta et al. 2021 (arXiv:2106.06899)"
    block = 1

    keys: int = 64

    def __post_init__(self) -> None:
        check_count(self, "keys", 1)

    def select(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        k = k.to(torch.float64)  # once, not in every slab
        parts = [
            self._rows(q, k, call, start, stop)
            for start, stop in slabs(call.n, call.batch * call.q_heads * call.m)
        ]
        empty = torch.empty(*q.shape[:2], 0, 1, dtype=torch.int32, device=q.device)
        return torch.cat(parts, dim=2) if parts else empty

    def _rows(self, q: Tensor, k: Tensor, call: sa.AttentionCall, start: int, stop: int) -> Tensor:
        if call.causal and not torch.compiler.is_compiling():
            # Later keys are no candidates: they need no logits.
            seen = max(1, min(call.m, int(call.offset) + stop))
            call = call.replace(
                m=seen,
                q_offset=call.offset,
                key_mask=None if call.key_mask is None else call.key_mask[:, :seen],
                bias=None if call.bias is None else call.bias[..., :seen],
            )
            k = k[:, :, :seen]
        chosen = best(logits(q, k, call, start, stop), allowed(call, start, stop), self.keys)
        return pad(chosen, (0, self.keys - chosen.shape[-1]), value=-1)


def _softmax(scores: Tensor, mask: Tensor, call: sa.AttentionCall) -> Tensor:
    """Attention weights, all 0 in a row that sees nothing; sink logits take their share."""
    scores = scores.masked_fill(~mask, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    if call.sink_logits is not None:
        total = torch.logaddexp(total, call.sink_logits.to(scores.dtype)[None, :, None, None])
    return torch.exp(scores - total.masked_fill(total == -torch.inf, 0.0))


def _diagonal_sums(x: Tensor) -> Tensor:
    """Sums of `[..., r, m]` along its diagonals: `[..., r + m - 1]`; entry e is the diagonal on
    which row t meets column `m - 1 + t - e`."""
    rows, m = x.shape[-2:]
    # Rows that are one longer than their stride shift by one a row: columns become diagonals. Plain
    # sums, unlike scattered additions, come out the same on every run.
    skewed = pad(x.flip(-1), (0, rows)).flatten(-2)[..., : rows * (m + rows - 1)]
    return skewed.unflatten(-1, (rows, m + rows - 1)).sum(-2)
