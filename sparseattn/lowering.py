"""How a union of clauses becomes blocks in CSR, without ever forming n x m.

Lowering clips the strip of keys of every query block, walks the key blocks that are left, and clips
those.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .clauses import (
    Band,
    CellClause,
    Ints,
    Rect,
    Term,
    Terms,
    clip_all,
    nonempty,
    ragged,
    refuse,
    take,
)

LAST_BIT = 62  # of the int64 bitmask of terms; it stands for term 62 and every one after it
ROWS_AT_ONCE = 4096  # rows of blocks planned together
ENTRIES_AT_ONCE = 1 << 16  # candidates held together: temporaries stay near ten megabytes
PAIRS_AT_ONCE = 1 << 20  # pairs of partial blocks counted together


@dataclass(frozen=True)
class Frame:
    """What is lowered, and into which blocks: `n` queries from `offset` on, `m` keys from 0."""

    n: int
    m: int
    offset: int
    query_block: int
    key_block: int

    @property
    def shape(self) -> tuple[int, int]:
        """The number of query blocks and of key blocks."""
        return -(-self.n // self.query_block), -(-self.m // self.key_block)

    def rect(self, rows: Ints, cols: Ints) -> Rect:
        """The real pairs of blocks: ragged edges are cut."""
        q0, k0 = self.offset + rows * self.query_block, cols * self.key_block
        q1 = np.minimum(q0 + self.query_block, self.offset + self.n) - 1
        return q0, q1, k0, np.minimum(k0 + self.key_block, self.m) - 1


@dataclass(frozen=True, eq=False)
class Entries:
    """A slab of CSR entries, sorted by row, then column, and unique."""

    rows: Ints
    cols: Ints
    full: NDArray[np.bool_]
    terms: Ints


class _Strip:
    """One term over a run of query blocks: where its keys can lie, and how to walk them."""

    def __init__(self, term: Term, frame: Frame, rows: Ints) -> None:
        self.frame, self.rows = frame, rows
        strip = frame.rect(rows, np.zeros_like(rows))
        strip = (strip[0], strip[1], strip[2], np.full_like(rows, frame.m - 1))
        self.q0, self.q1 = strip[0], strip[1]
        lists = [clause for clause in term if isinstance(clause, CellClause)]
        self.listed = min(
            lists, key=lambda x: int(x.cell_count(self.q0, self.q1).sum()), default=None
        )
        self.others = tuple(clause for clause in term if clause is not self.listed)
        clipped = clip_all(self.others, strip)
        live = nonempty(clipped)
        self.k0, self.k1 = np.where(live, clipped[2], 0), np.where(live, clipped[3], -1)
        width = np.where(live, self.k1 // frame.key_block - self.k0 // frame.key_block + 1, 0)
        self.comb: tuple[Ints, int, Ints] | None = None
        if self.listed is not None:
            per_cell = min(-(-self.listed.cell_width // frame.key_block) + 1, frame.shape[1])
            self.cost = self.listed.cell_count(self.q0, self.q1) * per_cell
            return
        self.cost = width
        for clause in term:
            # Teeth are walked one by one only where a block fits between them: then no two of them
            # share a block, and blocks are skipped.
            comb = clause.comb(self.q0, self.q1)
            if comb is not None and comb[1] - int(comb[2].max()) >= frame.key_block:
                teeth = (self.k1 - self.k0 + 1) // comb[1] + 2
                cost = teeth * ((comb[2] - 1) // frame.key_block + 2)
                if int(cost.sum()) < int(self.cost.sum()):
                    self.comb, self.cost = comb, np.where(live, cost, 0)

    def entries(self, part: slice, bit: int) -> Entries:
        """The entries of this term in some of the strip's rows."""
        if self.listed is None:
            at, cols = self._interval(part) if self.comb is None else self._teeth(part)
            rect = self.frame.rect(self.rows[part][at], cols)
        else:
            at, cols, rect = self._cells(part)
        live = nonempty(clip_all(self.others, rect))
        if not live.all():
            at, cols = at[live], cols[live]
            rect = take(rect, live)
        rows = self.rows[part][at]
        full = np.ones(len(rows), dtype=bool)
        for clause in self.others:
            full &= clause.covers(rect)
        if self.listed is not None:
            return self._join_cells(rows, cols, rect, full, bit)
        return Entries(rows, cols, full, np.full(len(rows), 1 << bit))

    def _interval(self, part: slice) -> tuple[Ints, Ints]:
        first, last = self.k0[part] // self.frame.key_block, self.k1[part] // self.frame.key_block
        return ragged(first, last - first + 1)

    def _teeth(self, part: slice) -> tuple[Ints, Ints]:
        assert self.comb is not None
        base, period, length = self.comb[0][part], self.comb[1], self.comb[2][part]
        k0, k1 = self.k0[part], self.k1[part]
        t0 = -((base + length - 1 - k0) // period)
        at, tooth = ragged(t0, np.where(k0 <= k1, (k1 - base) // period - t0 + 1, 0))
        start = base[at] + tooth * period
        first = np.maximum(start, k0[at]) // self.frame.key_block
        last = np.minimum(start + length[at] - 1, k1[at]) // self.frame.key_block
        owner, cols = ragged(first, last - first + 1)
        return at[owner], cols

    def _cells(self, part: slice) -> tuple[Ints, Ints, Rect]:
        assert self.listed is not None
        size = self.frame.key_block
        at, (q0, q1, k0, k1) = self.listed.cells(self.q0[part], self.q1[part])
        k0, k1 = np.maximum(k0, self.k0[part][at]), np.minimum(k1, self.k1[part][at])
        first = k0 // size
        # Rows that the other clauses empty have k1 = -1 < k0, and so have cells past the last key.
        owner, cols = ragged(first, np.where(k0 <= k1, k1 // size - first + 1, 0))
        rect = (
            q0[owner],
            q1[owner],
            np.maximum(k0[owner], cols * size),
            np.minimum(k1[owner], cols * size + size - 1),
        )
        return at[owner], cols, rect

    def _join_cells(
        self, rows: Ints, cols: Ints, rect: Rect, full: NDArray[np.bool_], bit: int
    ) -> Entries:
        """Join the cells within one block: disjoint, so it is full when their areas fill it."""
        area = (rect[1] - rect[0] + 1) * (rect[3] - rect[2] + 1) * full
        order, starts = _groups(rows * self.frame.shape[1] + cols)
        rows, cols = rows[order][starts], cols[order][starts]
        if len(starts):
            area = np.add.reduceat(area[order], starts)
        q0, q1, k0, k1 = self.frame.rect(rows, cols)
        full = area == (q1 - q0 + 1) * (k1 - k0 + 1)
        return Entries(rows, cols, full, np.full(len(rows), 1 << bit))


def _groups(key: Ints) -> tuple[Ints | slice, Ints]:
    """An order that sorts the keys, and where in it each distinct key begins."""
    if (key[1:] > key[:-1]).all():
        return slice(None), np.arange(len(key))
    order = np.argsort(key, kind="stable")  # runs that are sorted already merge in linear time
    key = key[order]
    return order, np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))


def _union(parts: Sequence[Entries], cols_total: int) -> Entries:
    if len(parts) == 1:
        return parts[0]
    rows, cols = (np.concatenate(x) for x in zip(*((p.rows, p.cols) for p in parts), strict=True))
    full, bits = np.concatenate([p.full for p in parts]), np.concatenate([p.terms for p in parts])
    order, starts = _groups(rows * cols_total + cols)
    rows, cols, full, bits = rows[order], cols[order], full[order], bits[order]
    if len(starts) < len(rows):
        full, bits = np.logical_or.reduceat(full, starts), np.bitwise_or.reduceat(bits, starts)
    return Entries(rows[starts], cols[starts], full, bits)


def entries_of(terms: Terms, frame: Frame) -> Iterator[Entries]:
    """The CSR entries of a union, in slabs of bounded size, in order."""
    rows_total, cols_total = frame.shape
    if not terms or not rows_total or not cols_total:
        return
    for begin in range(0, rows_total, ROWS_AT_ONCE):
        rows = np.arange(begin, min(begin + ROWS_AT_ONCE, rows_total))
        strips = [_Strip(term, frame, rows) for term in terms]
        cost = np.cumsum(np.sum([strip.cost for strip in strips], axis=0))
        cuts = np.searchsorted(cost, np.arange(ENTRIES_AT_ONCE, int(cost[-1]), ENTRIES_AT_ONCE))
        bounds = np.unique(np.concatenate(([0], cuts, [len(rows)]))).tolist()
        for start, stop in itertools.pairwise(bounds):
            part = slice(start, stop)
            found = (strip.entries(part, min(b, LAST_BIT)) for b, strip in enumerate(strips))
            yield _union(list(found), cols_total)


@dataclass(frozen=True, eq=False)
class BlockCSR:
    """A layout as blocks: for every block of queries, the key blocks in which it sees something.

    Attributes:
        indptr: int64 `[rows + 1]`; row r has entries `indptr[r]` up to `indptr[r + 1]`.
        indices: int32 `[nnz]`, block columns, sorted and unique in a row.
        full: bool `[nnz]`: every pair of the block that lies within n and m is visible. An entry
            that is not full is partial: its pairs come from `entry_masks`. A partial entry may be
            really full or really empty where proving it is expensive, never the reverse.
        terms: int64 `[nnz]`, bit t set where term t of `union` may be visible (bit 62: any term
            from 62 on).
        union: the terms that the bits speak of, causality included.
        frame: sizes: `n`, `m`, `offset`, `query_block`, `key_block`.
        transposed: rows are key blocks and columns are query blocks.
    """

    indptr: Ints
    indices: NDArray[np.int32]
    full: NDArray[np.bool_]
    terms: Ints
    union: Terms
    frame: Frame
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows and of columns, in blocks."""
        rows, cols = self.frame.shape
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def nnz(self) -> int:
        """The number of entries."""
        return len(self.indices)

    @property
    def nbytes(self) -> int:
        """The bytes that the arrays take."""
        return sum(x.nbytes for x in (self.indptr, self.indices, self.full, self.terms))

    def row_ids(self) -> Ints:
        """The row of every entry, int64 `[nnz]`."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.indptr))

    def transpose(self) -> BlockCSR:
        """The same entries by column: rows become columns, flags and bits stay with their entry."""
        order = np.argsort(self.indices, kind="stable")
        counts = np.bincount(self.indices, minlength=self.shape[1])
        return replace(
            self,
            indptr=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
            indices=self.row_ids()[order].astype(np.int32),
            full=self.full[order],
            terms=self.terms[order],
            transposed=not self.transposed,
        )

    def entry_masks(
        self, rows: ArrayLike, cols: ArrayLike, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """The exact mask of chosen blocks, causality included.

        Args:
            rows: int `[T]`, block rows.
            cols: int `[T, S]`, block columns for each of them, in any order. Blocks outside the
                grid (-1 as padding) are all False, and so are positions past n or m.
            device: where to evaluate and return the mask.

        Returns:
            bool `[T, row block, S * column block]`; for a CSR that is not transposed
            `[T, query_block, S * key_block]`.
        """
        return block_masks(self.union, self.frame, rows, cols, device, self.transposed)


def block_masks(
    terms: Terms,
    frame: Frame,
    rows: ArrayLike,
    cols: ArrayLike,
    device: torch.device | str | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """What `BlockCSR.entry_masks` returns, for a union and a frame that need not be lowered."""
    row, col = np.asarray(rows, dtype=np.int64), np.asarray(cols, dtype=np.int64)
    if row.ndim != 1 or col.ndim != 2 or len(row) != len(col):
        refuse(
            "rows, cols",
            (row.shape, col.shape),
            "shapes [T] and [T, S]",
            "give each row its list of columns",
        )
    row = np.broadcast_to(row[:, None], col.shape)
    queries, keys = (col.ravel(), row.ravel()) if transposed else (row.ravel(), col.ravel())
    i, real_i = _positions(queries, frame.query_block, frame.n, device)
    j, real_j = _positions(keys, frame.key_block, frame.m, device)
    i, j = i[:, :, None] + frame.offset, j[:, None, :]
    seen = torch.zeros(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool, device=device)
    in_grid = (queries >= 0) & (queries < frame.shape[0]) & (keys >= 0) & (keys < frame.shape[1])
    blocks = np.flatnonzero(in_grid)
    rect = frame.rect(queries[blocks], keys[blocks])
    for term in terms:
        # Only where something can be seen, and there only the clauses that cut something off.
        live = nonempty(clip_all(term, rect))
        at = torch.as_tensor(blocks[live], device=device)
        inside = torch.ones((len(at), *seen.shape[1:]), dtype=torch.bool, device=device)
        for clause in term:
            cuts = np.flatnonzero(~clause.covers(take(rect, live)))
            some = torch.as_tensor(cuts, device=device)
            if len(cuts):
                inside[some] &= clause.holds(i[at[some]], j[at[some]])
        seen[at] |= inside
    seen &= real_i[:, :, None] & real_j[:, None, :]
    tiles = seen.unflatten(0, col.shape)  # [T, S, query_block, key_block]
    return tiles.permute(0, 3, 1, 2).flatten(2) if transposed else tiles.transpose(1, 2).flatten(2)


def _positions(
    blocks: Ints, size: int, count: int, device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices in blocks `[X]` as `[X, size]`, held within range, and which are real."""
    first = torch.as_tensor(blocks * size, device=device)
    index = first[:, None] + torch.arange(size, device=device)
    # Held within range so that a pattern that looks things up by position never reads past its end.
    return index.clamp(0, max(count - 1, 0)), (index >= 0) & (index < count)


def lower_terms(terms: Terms, frame: Frame) -> BlockCSR:
    """Lower a union of terms to blocks, in memory proportional to entries and rows."""
    counts = np.zeros(frame.shape[0], dtype=np.int64)
    indices, full, bits = [np.empty(0, np.int32)], [np.empty(0, np.bool_)], [np.empty(0, np.int64)]
    for slab in entries_of(terms, frame):
        if len(slab.rows):
            in_row = np.bincount(slab.rows - slab.rows[0])
            counts[slab.rows[0] : slab.rows[0] + len(in_row)] = in_row
        indices.append(slab.cols.astype(np.int32))
        full.append(slab.full)
        bits.append(slab.terms)
    return BlockCSR(
        indptr=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        indices=np.concatenate(indices),
        full=np.concatenate(full),
        terms=np.concatenate(bits),
        union=terms,
        frame=frame,
    )


def count_pairs(terms: Terms, frame: Frame) -> int:
    """The exact number of visible pairs of a union, in bounded memory."""
    total = 0
    at_once = max(1, PAIRS_AT_ONCE // (frame.query_block * frame.key_block))
    for slab in entries_of(terms, frame):
        rect = frame.rect(slab.rows, slab.cols)
        everything = Band(None, None).count(rect)
        total += int(everything[slab.full].sum())
        left = ~slab.full
        for bit, term in enumerate(terms[:LAST_BIT]):
            # Where one term alone is visible, and what is left of the block is cut by a band only.
            alone = np.flatnonzero(left & (slab.terms == 1 << bit))
            cut = clip_all(term, take(rect, alone))
            band, known = Band(None, None), np.ones(len(alone), dtype=bool)
            for clause in term:
                if isinstance(clause, Band):
                    band = clause
                else:
                    known &= clause.covers(cut)
            total += int(band.count(take(cut, known)).sum())
            left[alone[known]] = False
        rows, cols = slab.rows[left], slab.cols[left]
        for at in range(0, len(rows), at_once):
            part = slice(at, at + at_once)
            total += int(block_masks(terms, frame, rows[part], cols[part, None]).sum())
    return total
