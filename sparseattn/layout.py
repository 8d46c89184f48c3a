"""Static attention patterns, symbolic and exact: `Grid` offers clauses, `Layout` joins them.

A layout says which pairs of absolute positions (i, j) a mechanism uses. It is a union of terms,
each an intersection of clauses: a band over a million tokens is four numbers, everything is none.
Only where blocks are needed is it lowered, to CSR, without ever forming n x m.

    grid = Grid(n=6, m=6, causal=True)
    (grid.band(1, 1) | grid.first_keys(1)).mask()
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 0 1 1 0 0
        1 0 0 1 1 0
        1 0 0 0 1 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .arguments import MAX_OFFSET
from .block_layout import MAX_TOKENS, BlockLayout, position_tensors
from .clauses import (
    Band,
    CellClause,
    Chunks,
    Clause,
    FirstKeys,
    FirstQueries,
    KeyBlocks,
    Pattern,
    Rect,
    Step,
    Term,
    Terms,
    as_int,
    clip_all,
    holds_any,
    nonempty,
    refuse,
)
from .lowering import BlockCSR, Frame, count_pairs, lower_terms

__all__ = ["BlockCSR", "BlockLayout", "Grid", "Layout"]

FAR = 2**42  # distances stay below this, so every larger number means the same

# Clauses that cut rectangles exactly come first, so that the others see the smaller rectangle.
_ORDER = (FirstKeys, FirstQueries, Chunks, CellClause, KeyBlocks, Band, Step, Pattern)


@dataclass(frozen=True)
class Grid:
    """The positions of one run: a row of a batch or a packed document.

    Keys stand at positions 0, 1, ..., m - 1 (0 is the first key that the call allows); query q
    stands at position `offset + q`.

    Args:
        n: queries, >= 0.
        m: keys, >= 0.
        causal: whether a query sees only keys at its position or before.
        offset: the position of query 0, any sign; `m - n` (bottom-right) by default.

    Raises:
        InvalidInputError: a size that is no integer in range.
    """

    n: int
    m: int
    causal: bool = False
    offset: int | None = None

    def __post_init__(self) -> None:
        n = as_int("n", self.n, 0, "give the number of queries")
        m = as_int("m", self.m, 0, "give the number of keys")
        offset = m - n if self.offset is None else self.offset
        offset = as_int("offset", offset, None, "give the position of query 0, or None")
        for name, value, most in (
            ("n", n, MAX_TOKENS),
            ("m", m, MAX_TOKENS),
            ("offset", offset, MAX_OFFSET),
        ):
            if abs(value) > most:
                refuse(name, value, f"at most {most}", "cut the run into pieces")
        if not isinstance(self.causal, (bool, np.bool_)):
            refuse("causal", self.causal, "True or False", "say causal=True for j <= i")
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)
        object.__setattr__(self, "causal", bool(self.causal))
        object.__setattr__(self, "offset", offset)

    def everything(self) -> Layout:
        """All pairs."""
        return Layout(self, ((),))

    def band(self, left: int | None, right: int | None) -> Layout:
        """`-left <= j - i <= right`; None is unbounded. A negative count moves the edge past i."""
        way_out = "count keys before (left) and after (right) the query, or None"
        ends: list[int | None] = [None, None]
        for x, (name, end) in enumerate((("left", left), ("right", right))):
            if end is not None:
                end = as_int(name, end, None, way_out)
                ends[x] = None if end >= FAR else max(end, -FAR)
        return Layout(self, (_term([Band(ends[0], ends[1])]),))

    def first_keys(self, count: int) -> Layout:
        """`j < count`."""
        count = as_int("count", count, 0, "give a number of keys")
        return Layout(self, (_term([FirstKeys(min(count, FAR))]),))

    def first_queries(self, count: int) -> Layout:
        """`i < count`. The count is of positions: queries before position 0 are included."""
        count = as_int("count", count, 0, "give a number of positions")
        return Layout(self, (_term([FirstQueries(min(count, FAR))]),))

    def chunks(self, size: int) -> Layout:
        """`i // size == j // size`."""
        size = as_int("size", size, 1, "give the number of positions in a chunk")
        return Layout(self, (_term([Chunks(min(size, FAR))]),))

    def key_blocks(self, size: int, step: int = 1) -> Layout:
        """`(j // size) % step == 0`: every step-th block of keys."""
        size = min(as_int("size", size, 1, "give the number of keys in a block"), FAR)
        step = as_int("step", step, 1, "give the distance between visible blocks, in blocks")
        # Beyond the last block there could be, larger steps are all alike; products stay in int64.
        step = min(step, FAR // size + 1)
        return Layout(self, (_term([KeyBlocks(size, step)] if step > 1 else []),))

    def step(self, every: int) -> Layout:
        """`(i - j) % every == 0`: every every-th key, counted from the query."""
        every = as_int("every", every, 1, "give the distance between visible keys")
        return Layout(self, (_term([Step(min(every, 4 * FAR))] if every > 1 else []),))

    def blocks(self, indptr: Any, indices: Any, size: int) -> Layout:
        """A list of blocks in CSR: the query at i sees key j where block `j // size` is in
        `indices[indptr[I]:indptr[I + 1]]` with `I = i // size`.

        Args:
            indptr: int `[rows + 1]`, numpy, torch or a list; rows past the end see nothing, nor do
                negative ones.
            indices: int `[nnz]`, >= 0, in any order; repeats count once.
            size: positions in a block, >= 1.
        """
        return Layout(self, ((BlockLayout(indptr, indices, size),),))

    def pattern(self, visible: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Layout:
        """Any `visible(i, j) -> bool` on broadcast int64 tensors. Correct and slow: every block is
        partial. It is asked only about positions of the grid. Two patterns are equal where the
        functions are."""
        if not callable(visible):
            refuse("visible", visible, "a function of (i, j)", "pass `lambda i, j: j <= i`, say")
        return Layout(self, ((Pattern(visible),),))

    def _rect(self) -> Rect:
        """All pairs, as one rectangle of positions."""
        first = int(self.offset or 0)
        ends = (first, first + self.n - 1, 0, self.m - 1)
        q0, q1, k0, k1 = (np.array([x], dtype=np.int64) for x in ends)
        return q0, q1, k0, k1


class Layout:
    """Which pairs of a grid are visible: an immutable union of terms, each a tuple of clauses that
    must all hold. Made by `Grid`, joined by `|` and `&`; hashable and comparable by content.

    Attributes:
        grid: the positions it speaks of.
        terms: the union, without causality. No terms: nothing is visible; an empty term: all is.
    """

    __slots__ = ("_hash", "grid", "terms")

    grid: Grid
    terms: Terms

    def __init__(self, grid: Grid, terms: Iterable[Term | None]) -> None:
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "terms", _union(terms))
        object.__setattr__(self, "_hash", hash((grid, frozenset(self.terms))))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Layout is immutable: make another one instead of setting {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout, (self.grid, self.terms)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return self.grid == other.grid and set(self.terms) == set(other.terms)

    def __hash__(self) -> int:
        return self._hash

    _hash: int

    def __repr__(self) -> str:
        terms = (" & ".join(map(repr, term)) or "everything()" for term in self.terms)
        return f"Layout({' | '.join(terms) or 'nothing'}, {self.grid})"

    def _same_grid(self, other: Layout) -> None:
        if self.grid != other.grid:
            expected = f"a layout of the same grid, {self.grid}"
            refuse("layout", other.grid, expected, "build both from one Grid")

    def __or__(self, other: Layout) -> Layout:
        if not isinstance(other, Layout):
            return NotImplemented
        self._same_grid(other)
        return Layout(self.grid, (*self.terms, *other.terms))

    def __and__(self, other: Layout) -> Layout:
        if not isinstance(other, Layout):
            return NotImplemented
        self._same_grid(other)
        return Layout(self.grid, (_term((*a, *b)) for a in self.terms for b in other.terms))

    def with_causal(self) -> Layout:
        """This layout within `j <= i` where the grid is causal; else itself."""
        return self & self.grid.band(None, 0) if self.grid.causal else self

    def reduced(self) -> Layout:
        """The same pairs of this grid, causality included, in the fewest clauses: what always or
        never holds on the grid is gone, so a window as long as the grid is everything."""
        if not self.grid.n or not self.grid.m:
            return self.grid.everything()
        rect = self.grid._rect()
        live = (x for x in self.with_causal().terms if nonempty(clip_all(x, rect)).all())
        return Layout(self.grid, (_term(filter(None, (c.on(rect) for c in x))) for x in live))

    def as_band(self) -> tuple[int | None, int | None] | None:
        """(left, right) if on this grid, causality included, the layout is exactly one band;
        (None, None) if it is everything; None if it is anything else. An end that cuts nothing off
        on this grid is None."""
        terms = self.reduced().terms
        if len(terms) != 1 or len(terms[0]) > 1:
            return None
        if not terms[0]:
            return None, None
        band = terms[0][0]
        return (band.left, band.right) if isinstance(band, Band) else None

    def contains(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """The exact pattern, WITHOUT causality.

        Args:
            i: positions of queries, an integer tensor.
            j: positions of keys, an integer tensor that broadcasts with it, on the same device.

        Returns:
            bool, of the broadcast shape.
        """
        return holds_any(self.terms, *position_tensors(i, j))

    def lower(self, query_block: int, key_block: int) -> BlockCSR:
        """The layout as blocks, causality included.

        Args:
            query_block: queries in a block of rows; row r holds queries r * query_block and on.
            key_block: keys in a block of columns; 1 is legal for either.
        """
        return lower_terms(self.reduced().terms, self._frame(query_block, key_block))

    def _frame(self, query_block: int, key_block: int) -> Frame:
        way_out = "give the block's side in tokens"
        query_block = as_int("query_block", query_block, 1, way_out)
        key_block = as_int("key_block", key_block, 1, way_out)
        grid = self.grid
        sides = (min(query_block, MAX_TOKENS), min(key_block, MAX_TOKENS))
        return Frame(grid.n, grid.m, int(grid.offset or 0), *sides)

    def mask(self) -> torch.Tensor:
        """The dense mask, bool `[n, m]`, causality included: for tests and pictures."""
        i = torch.arange(self.grid.n) + int(self.grid.offset or 0)
        return self.with_causal().contains(i[:, None], torch.arange(self.grid.m)[None])

    def pairs(self) -> int:
        """The exact number of visible pairs, causality included, in bounded memory. Bands, key
        and query ranges and full blocks are counted by arithmetic, other blocks pair by pair."""
        if not self.grid.n or not self.grid.m:
            return 0
        band = self.as_band()
        if band is not None:
            return int(Band(*band).count(self.grid._rect())[0])
        return count_pairs(self.reduced().terms, self._frame(64, 64))

    def density(self) -> float:
        """Visible pairs over the pairs that causality alone allows; 0.0 where it allows none."""
        allowed = self.grid.everything().pairs()
        return self.pairs() / allowed if allowed else 0.0


def _term(clauses: Iterable[Clause]) -> Term | None:
    """An intersection in its simplest order and form; None if it is known to be empty."""
    kept: list[Clause] = []
    bands = Band(None, None)
    for clause in clauses:
        if isinstance(clause, Band):
            bands = bands.meet(clause)
        elif not any(other.implies(clause) for other in kept):
            kept = [other for other in kept if not clause.implies(other)] + [clause]
    if bands.empty or FirstKeys(0) in kept:
        return None
    if not any(clause.implies(bands) for clause in kept) and bands != Band(None, None):
        kept.append(bands)
    rank = {
        clause: next(x for x, kind in enumerate(_ORDER) if isinstance(clause, kind))
        for clause in kept
    }
    return tuple(sorted(kept, key=lambda clause: (rank[clause], repr(clause))))


def _within(small: Term, large: Term) -> bool:
    """Whether one term is known to lie within another: each clause there follows from one here."""
    return all(any(have.implies(clause) for have in small) for clause in large)


def _union(terms: Iterable[Term | None]) -> Terms:
    """A union without terms that others contain, lone bands that overlap or touch made one."""
    kept: list[Term] = []
    for term in terms:
        if term is None:
            continue
        joined = True
        while joined and len(term) == 1 and isinstance(term[0], Band):
            joined = False
            for other in kept:
                if len(other) == 1 and isinstance(other[0], Band):
                    band = term[0].join(other[0])
                    if band is not None:
                        kept.remove(other)
                        term = _term([band]) or ()
                        joined = True
                        break
        if not any(_within(term, other) for other in kept):
            kept = [other for other in kept if not _within(other, term)] + [term]
    return tuple(kept)
