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

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparseattn.lowering import (
    Band,
    BlockCSR,
    CellClause,
    Chunks,
    Clause,
    FirstKeys,
    FirstQueries,
    Frame,
    Ints,
    KeyBlocks,
    Pattern,
    Rect,
    Step,
    Term,
    Terms,
    as_int,
    clip_all,
    count_pairs,
    holds_any,
    lower_terms,
    nonempty,
    ragged,
    refuse,
)

__all__ = ["BlockCSR", "BlockLayout", "Grid", "Layout"]

MAX_TOKENS = 2**31 - 1  # block columns are int32, and blocks may be one key wide
FAR = 2**40  # positions stay below this, so every larger number means the same

# Clauses that cut rectangles exactly come first, so that the others see the smaller rectangle.
_ORDER = (FirstKeys, FirstQueries, Chunks, CellClause, KeyBlocks, Band, Step, Pattern)


class BlockLayout(CellClause):
    """A block pattern that the user made: query block I sees the listed key blocks.

    Frozen; hashable and comparable by content. It is in absolute positions and tied to no length:
    queries past the last row, or before position 0, see nothing; blocks past the last key are cut.

    Args:
        indptr: int `[rows + 1]`, from 0 up to `len(indices)`, nowhere falling.
        indices: int `[nnz]`, all >= 0: row I sees blocks `indices[indptr[I]:indptr[I + 1]]`, in any
            order; repeats count once.
        block: positions in a block, on both axes, >= 1.

    Raises:
        InvalidInputError: arrays that are not such a list.
    """

    block: int
    indptr: Ints  # int64 [rows + 1], read-only
    indices: NDArray[np.int32]  # int32 [nnz], read-only, sorted and unique in a row
    _keys: torch.Tensor  # int64 [nnz]: row * width + column, ascending

    def __init__(self, indptr: Any, indices: Any, block: int) -> None:
        way_out = "pass CSR: row I sees blocks indices[indptr[I]:indptr[I + 1]]"
        block = as_int("block", block, 1, "give the number of positions in a block")
        if block > MAX_TOKENS:  # products of block numbers and sizes stay within int64
            refuse("block", block, f"at most {MAX_TOKENS}", way_out)
        starts, cols = _int_array("indptr", indptr), _int_array("indices", indices)
        if len(starts) == 0 or starts[0] != 0 or starts[-1] != len(cols):
            ends = (int(starts[0]), int(starts[-1])) if len(starts) else ()
            refuse("indptr", ends, f"to go from 0 to len(indices) = {len(cols)}", way_out)
        if (starts[1:] < starts[:-1]).any():
            at = int(np.flatnonzero(starts[1:] < starts[:-1])[0])
            refuse("indptr", starts[at : at + 2].tolist(), f"no fall, as at row {at}", way_out)
        if len(cols) and (cols.min() < 0 or cols.max() > MAX_TOKENS):
            wrong = cols[(cols < 0) | (cols > MAX_TOKENS)]
            refuse("indices", int(wrong[0]), "block numbers from 0 to 2**31 - 1", way_out)
        rows, width = len(starts) - 1, int(cols.max(initial=-1)) + 1
        keys = np.repeat(np.arange(rows), np.diff(starts)) * width + cols
        if not (keys[1:] > keys[:-1]).all():
            # Stable, for rows that are sorted or nearly so; np.unique hashes, ten times slower.
            keys = np.sort(keys, kind="stable")
            keys = keys[np.append(True, keys[1:] != keys[:-1])]
            starts = np.searchsorted(keys, np.arange(rows + 1) * width)
        columns = (keys % max(width, 1)).astype(np.int32)
        sha = hashlib.sha256(np.array([block, rows], dtype="<i8").tobytes())
        sha.update(starts.astype("<i8").tobytes())
        sha.update(columns.astype("<i4").tobytes())
        for name, value in {
            "block": block,
            "indptr": starts,
            "indices": columns,
            "_keys": torch.from_numpy(keys),
            "_width": width,
            "_sha": sha.hexdigest(),
        }.items():
            object.__setattr__(self, name, value)
        for array in (starts, columns):
            array.setflags(write=False)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"BlockLayout is frozen: make another one instead of setting {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"BlockLayout is frozen: {name} cannot be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockLayout, (self.indptr, self.indices, self.block)

    @classmethod
    def from_mask(cls, mask: Any, block: int) -> BlockLayout:
        """The layout of a bool `[I, J]` mask of blocks: True where query block I sees key block J.

        Raises:
            InvalidInputError: not two-dimensional, or not bool.
        """
        array = np.asarray(mask.detach().cpu() if isinstance(mask, torch.Tensor) else mask)
        if array.ndim != 2 or array.dtype != np.bool_:
            came = f"{array.dtype} {list(array.shape)}"
            refuse("mask", came, "bool [I, J]", "compare first, as in `scores > 0`")
        rows, cols = np.nonzero(array)
        counts = np.bincount(rows, minlength=len(array))
        return cls(np.concatenate(([0], np.cumsum(counts))).astype(np.int64), cols, block)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layout to exactly `path`, as npz with `indptr`, `indices` and `block`."""
        with open(path, "wb") as file:
            np.savez(file, indptr=self.indptr, indices=self.indices, block=np.int64(self.block))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BlockLayout:
        """Read what `save` wrote. Nothing in the file is executed.

        Raises:
            InvalidInputError: the file is no such npz, or its arrays are not a block list.
            OSError: the file cannot be read.
        """
        expected, way_out = (
            "an npz with indptr, indices and block",
            "write it with BlockLayout.save",
        )
        try:
            with np.load(path, allow_pickle=False) as file:
                indptr, indices, block = file["indptr"], file["indices"], file["block"]
        except (KeyError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile):
            refuse("path", os.fspath(path), expected, way_out)
        if block.shape != () or block.dtype.kind not in "iu":
            refuse("path", os.fspath(path), expected, way_out)
        return cls(indptr, indices, int(block))

    @property
    def rows(self) -> int:
        """The number of query blocks in the list."""
        return len(self.indptr) - 1

    @property
    def digest(self) -> str:
        """Twelve hex digits of the sha256 of the content."""
        return self._sha[:12]

    _sha: str
    _width: int

    def to_layout(self, grid: Grid) -> Layout:
        """The same pattern as a layout of a grid."""
        return Layout(grid, ((self,),))

    def contains(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Whether pairs of positions are visible: integer tensors in, their broadcast bool out."""
        i, j = _position_tensors(i, j)
        return self.holds(i, j)

    def holds(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        row, col = i // self.block, j // self.block
        # Rows outside the list need no test: their keys lie below or above all that are listed.
        real = (col >= 0) & (col < self._width)
        if len(self.indices) == 0:
            return torch.zeros_like(real & (row == 0))
        keys, wanted = self._keys.to(i.device), row * self._width + col
        found = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        return real & (keys[found] == wanted)

    def _blocks(self, rect: Rect) -> Rect:
        """Rectangles in blocks, cut to the list."""
        q0, q1, k0, k1 = (x // self.block for x in rect)
        q0, q1 = np.maximum(q0, 0), np.minimum(q1, self.rows - 1)
        return q0, q1, np.maximum(k0, 0), np.minimum(k1, self._width - 1)

    def _listed(self, rect: Rect) -> Ints:
        """The number of listed cells that meet each rectangle."""
        q0, q1, k0, k1 = self._blocks(rect)
        at, row = ragged(q0, np.where(k0 <= k1, q1 - q0 + 1, 0))
        keys = self._keys.numpy()
        first = np.searchsorted(keys, row * self._width + k0[at])
        last = np.searchsorted(keys, row * self._width + k1[at], side="right")
        # Exact in the float64 of bincount's weights: counts stay far below 2**53.
        return np.bincount(at, weights=last - first, minlength=len(q0)).astype(np.int64)

    def clip(self, rect: Rect) -> Rect:
        q0, q1, k0, k1 = rect
        return q0, np.where(self._listed(rect) > 0, q1, np.minimum(q1, q0 - 1)), k0, k1

    def covers(self, rect: Rect) -> NDArray[np.bool_]:
        q0, q1, k0, k1 = (x // self.block for x in rect)
        full: NDArray[np.bool_] = self._listed(rect) == (q1 - q0 + 1) * (k1 - k0 + 1)
        return full

    def cell_count(self, q0: Ints, q1: Ints) -> Ints:
        first, last, _, _ = self._blocks((q0, q1, q0, q1))
        return np.where(
            first <= last,
            self.indptr[np.maximum(last, -1) + 1] - self.indptr[np.minimum(first, self.rows)],
            0,
        )

    def cells(self, q0: Ints, q1: Ints) -> tuple[Ints, Rect]:
        first, last, _, _ = self._blocks((q0, q1, q0, q1))
        at, row = ragged(first, last - first + 1)
        owner, entry = ragged(self.indptr[row], self.indptr[row + 1] - self.indptr[row])
        at, row, col = at[owner], row[owner], self.indices[entry].astype(np.int64)
        start = row * self.block
        top, bottom = np.maximum(q0[at], start), np.minimum(q1[at], start + self.block - 1)
        return at, (top, bottom, col * self.block, col * self.block + self.block - 1)

    @property
    def cell_width(self) -> int:
        return self.block

    def __eq__(self, other: object) -> bool:
        return self._sha == other._sha if isinstance(other, BlockLayout) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._sha)

    def __repr__(self) -> str:
        return f"BlockLayout({self.digest}, block={self.block})"


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
            ("offset", abs(offset), FAR),
        ):
            if value > most:
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
        return BlockLayout(indptr, indices, size).to_layout(self)

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
        return holds_any(self.terms, *_position_tensors(i, j))

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


def _position_tensors(i: torch.Tensor, j: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    for name, x in (("i", i), ("j", j)):
        if not isinstance(x, torch.Tensor) or x.dtype.is_floating_point or x.dtype == torch.bool:
            came = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            refuse(name, came, "an integer tensor of positions", "use torch.arange")
    return i.to(torch.int64), j.to(torch.int64)


def _int_array(name: str, value: Any) -> Ints:
    """A copy of a list, numpy array or tensor of ints, int64 and one-dimensional."""
    array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        came = f"{array.dtype} {list(array.shape)}"
        refuse(
            name, came, "a one-dimensional list of integers", "flatten it, or convert it to int64"
        )
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        refuse(name, int(array.max()), "numbers below 2**63", "check how the list was made")
    return np.array(array, dtype=np.int64)
