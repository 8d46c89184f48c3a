"""The clauses that layouts are made of, and how a union of them becomes blocks in CSR.

A clause is a set of pairs (i, j) of absolute positions. Beside the exact test `holds`, it knows
two things about a rectangle of pairs, `q0 <= i <= q1` and `k0 <= j <= k1`, for many rectangles at
once: where in it the visible pairs can lie (`clip`), and whether all of it is visible (`covers`).
Lowering needs no more: it clips the strip of keys of every query block, walks the key blocks that
are left, and clips those. A term is a tuple of clauses that must all hold; a union is a tuple of
terms.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from sparseattn.errors import InvalidInputError

Ints: TypeAlias = NDArray[np.int64]
Rect: TypeAlias = tuple[
    Ints, Ints, Ints, Ints
]  # q0, q1, k0, k1, inclusive; empty if q0 > q1 or k0 > k1
Term: TypeAlias = "tuple[Clause, ...]"
Terms: TypeAlias = tuple[Term, ...]

LAST_BIT = 62  # of the int64 bitmask of terms; it stands for term 62 and every one after it
ROWS_AT_ONCE = 4096  # rows of blocks planned together
ENTRIES_AT_ONCE = 1 << 16  # candidates held together: temporaries stay near ten megabytes
PAIRS_AT_ONCE = 1 << 20  # pairs of partial blocks counted together


def refuse(name: str, came: object, expected: str, way_out: str) -> NoReturn:
    """Raise InvalidInputError: which argument, what came, what was expected, and the way out."""
    shown = repr(came)
    shown = shown if len(shown) <= 120 else shown[:117] + "..."
    raise InvalidInputError(f"{name}: got {shown}, expected {expected}; {way_out}")


def as_int(name: str, value: object, least: int | None, way_out: str) -> int:
    """`value` as a Python int of at least `least`; bools and floats are refused."""
    expected = "an integer" if least is None else f"an integer >= {least}"
    if isinstance(value, (bool, np.bool_)):
        refuse(name, value, expected, way_out)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        refuse(name, value, expected, way_out)
    if least is not None and number < least:
        refuse(name, value, expected, way_out)
    return number


def ragged(start: Ints, count: Ints) -> tuple[Ints, Ints]:
    """The ranges `start[x], ..., start[x] + count[x] - 1`, end to end, as (x of each, value)."""
    count = np.maximum(count, 0)
    ends = np.cumsum(count)
    owner = np.repeat(np.arange(len(count)), count)
    value = np.arange(len(owner)) + np.repeat(start - (ends - count), count)
    return owner, value


class Clause:
    """A set of pairs of positions. Subclasses are frozen, hashable and grid-independent."""

    def holds(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Whether pairs are in the set: bool, of a shape that broadcasts to that of i and j."""
        raise NotImplementedError

    def clip(self, rect: Rect) -> Rect:
        """Shrink rectangles, keeping every visible pair; for one clause alone, empty if none."""
        return rect

    def covers(self, rect: Rect) -> NDArray[np.bool_]:
        """Whether every pair of the (nonempty) rectangles is in the set."""
        return np.zeros(rect[0].shape, dtype=bool)

    def on(self, rect: Rect) -> Clause | None:
        """The clause, made no larger than it need be on one rectangle; None if it covers it."""
        return None if self.covers(rect).all() else self

    def implies(self, other: Clause) -> bool:
        """Whether this set is known to lie within the other, on all positions."""
        return self == other

    def comb(self, q0: Ints, q1: Ints) -> tuple[Ints, int, Ints] | None:
        """(base, period, length): rows q0..q1 see only keys in base + t * period + [0, length)."""
        return None


@dataclass(frozen=True, repr=False)
class Band(Clause):
    """`-left <= j - i <= right`; None is unbounded."""

    left: int | None
    right: int | None

    def holds(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        ahead = j - i
        inside = torch.ones_like(ahead, dtype=torch.bool)
        if self.left is not None:
            inside &= ahead >= -self.left
        if self.right is not None:
            inside &= ahead <= self.right
        return inside

    def clip(self, rect: Rect) -> Rect:
        q0, q1, k0, k1 = rect
        if self.right is not None:
            q0, k1 = np.maximum(q0, k0 - self.right), np.minimum(k1, q1 + self.right)
        if self.left is not None:
            q1, k0 = np.minimum(q1, k1 + self.left), np.maximum(k0, q0 - self.left)
        return q0, q1, k0, k1

    def covers(self, rect: Rect) -> NDArray[np.bool_]:
        q0, q1, k0, k1 = rect
        inside = np.ones(q0.shape, dtype=bool)
        if self.left is not None:
            inside &= q1 - k0 <= self.left
        if self.right is not None:
            inside &= k1 - q0 <= self.right
        return inside

    def on(self, rect: Rect) -> Clause | None:
        left = self.left if not Band(self.left, None).covers(rect).all() else None
        right = self.right if not Band(None, self.right).covers(rect).all() else None
        return None if left is None and right is None else Band(left, right)

    def implies(self, other: Clause) -> bool:
        return (
            isinstance(other, Band)
            and (other.left is None or (self.left is not None and self.left <= other.left))
            and (other.right is None or (self.right is not None and self.right <= other.right))
        )

    def meet(self, other: Band) -> Band:
        """The intersection of two bands."""
        lefts = [x for x in (self.left, other.left) if x is not None]
        rights = [x for x in (self.right, other.right) if x is not None]
        return Band(min(lefts, default=None), min(rights, default=None))

    def join(self, other: Band) -> Band | None:
        """The union of two bands, where it is one band: they overlap or touch."""
        for low, high in ((self, other), (other, self)):
            # -left <= j - i <= right: a gap is a difference above one band and below the other.
            if low.right is not None and high.left is not None and low.right + 1 < -high.left:
                return None
        left = None if self.left is None or other.left is None else max(self.left, other.left)
        right = None if self.right is None or other.right is None else max(self.right, other.right)
        return Band(left, right)

    @property
    def empty(self) -> bool:
        return self.left is not None and self.right is not None and -self.left > self.right

    def count(self, rect: Rect) -> Ints:
        """The number of visible pairs in each rectangle, in closed form; 0 for empty ones."""
        q0, q1, k0, k1 = rect
        queries, keys = np.maximum(q1 - q0 + 1, 0), np.maximum(k1 - k0 + 1, 0)

        def triangle(z: Ints) -> Ints:
            z = np.maximum(z, 0)
            return z * (z + 1) // 2

        def up_to(
            ahead: int,
        ) -> Ints:  # pairs with j - i <= ahead: sum over x of clamp(x + u, 0, keys)
            u = ahead + q0 - k0 + 1
            below = triangle(u + queries - 1) - triangle(u - 1)
            return below - triangle(u + queries - 1 - keys) + triangle(u - 1 - keys)

        seen = queries * keys if self.right is None else up_to(self.right)
        return seen if self.left is None else seen - up_to(-self.left - 1)

    def __repr__(self) -> str:
        return f"band({self.left}, {self.right})"


@dataclass(frozen=True, repr=False)
class FirstKeys(Clause):
    """`j < count`."""

    count: int

    def holds(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return j < self.count

    def clip(self, rect: Rect) -> Rect:
        q0, q1, k0, k1 = rect
        return q0, q1, k0, np.minimum(k1, self.count - 1)

    def covers(self, rect: Rect) -> NDArray[np.bool_]:
        return rect[3] < self.count

    def implies(self, other: Clause) -> bool:
        return isinstance(other, FirstKeys) and self.count <= other.count

    def __repr__(self) -> str:
        return f"first_keys({self.count})"


@dataclass(frozen=True, repr=False)
class FirstQueries(Clause):
    """`i < count`; queries at negative positions are among the first."""

    count: int

    def holds(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return i < self.count

    def clip(self, rect: Rect) -> Rect:
        q0, q1, k0, k1 = rect
        return q0, np.minimum(q1, self.count - 1), k0, k1

    def covers(self, rect: Rect) -> NDArray[np.bool_]:
        return rect[1] < self.count

    def implies(self, other: Clause) -> bool:
        return isinstance(other, FirstQueries) and self.count <= other.count

    def __repr__(self) -> str:
        return f"first_queries({self.count})"


@dataclass(frozen=True, repr=False)
class Chunks(Clause):
    """`i // size == j // size`."""

    size: int

    def holds(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return i // self.size == j // self.size

    def clip(self, rect: Rect) -> Rect:
        q0, q1, k0, k1 = rect
        first = np.maximum(q0 // self.size, k0 // self.size) * self.size
        last = np.minimum(q1 // self.size, k1 // self.size) * self.size + (self.size - 1)
        return (
            np.maximum(q0, first),
            np.minimum(q1, last),
            np.maximum(k0, first),
            np.minimum(k1, last),
        )

    def covers(self, rect: Rect) -> NDArray[np.bool_]:
        q0, q1, k0, k1 = (x // self.size for x in rect)
        return (q0 == q1) & (k0 == k1) & (q0 == k0)

    def implies(self, other: Clause) -> bool:
        if isinstance(other, Band):
            return Band(self.size - 1, self.size - 1).implies(other)
        return isinstance(other, Chunks) and other.size % self.size == 0

    def __repr__(self) -> str:
        return f"chunks({self.size})"


@dataclass(frozen=True, repr=False)
class KeyBlocks(Clause):
    """`(j // size) % step == 0`."""

    size: int
    step: int

    def holds(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j // self.size) % self.step == 0

    def clip(self, rect: Rect) -> Rect:
        q0, q1, k0, k1 = rect
        first, last = k0 // self.size, k1 // self.size
        past, over = first % self.step, last % self.step
        k0 = np.where(past == 0, k0, (first - past + self.step) * self.size)
        k1 = np.where(over == 0, k1, (last - over + 1) * self.size - 1)
        return q0, q1, k0, k1

    def covers(self, rect: Rect) -> NDArray[np.bool_]:
        first, last = rect[2] // self.size, rect[3] // self.size
        return (first == last) & (first % self.step == 0)

    def comb(self, q0: Ints, q1: Ints) -> tuple[Ints, int, Ints] | None:
        return np.zeros_like(q0), self.step * self.size, np.full_like(q0, self.size)

    def __repr__(self) -> str:
        return f"key_blocks({self.size}, step={self.step})"


@dataclass(frozen=True, repr=False)
class Step(Clause):
    """`(i - j) % every == 0`."""

    every: int

    def holds(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i - j) % self.every == 0

    def clip(self, rect: Rect) -> Rect:
        q0, q1, k0, k1 = rect
        farthest = q1 - k0  # i - j takes every value from q0 - k1 to this one
        seen = farthest - farthest % self.every >= q0 - k1
        return q0, np.where(seen, q1, np.minimum(q1, q0 - 1)), k0, k1

    def covers(self, rect: Rect) -> NDArray[np.bool_]:
        q0, q1, k0, k1 = rect
        return (q0 == q1) & (k0 == k1) & ((q0 - k0) % self.every == 0)

    def implies(self, other: Clause) -> bool:
        return isinstance(other, Step) and self.every % other.every == 0

    def comb(self, q0: Ints, q1: Ints) -> tuple[Ints, int, Ints] | None:
        return q0, self.every, q1 - q0 + 1

    def __repr__(self) -> str:
        return f"step({self.every})"


@dataclass(frozen=True, repr=False)
class Pattern(Clause):
    """Any function of positions. Nothing is known of it: every block is partial."""

    visible: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def holds(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        seen: Any = self.visible(i, j)
        if not isinstance(seen, torch.Tensor) or seen.dtype != torch.bool:
            came = seen.dtype if isinstance(seen, torch.Tensor) else type(seen).__name__
            refuse("visible(i, j)", came, "a bool tensor", "compare positions, as in `j <= i`")
        return seen

    def __repr__(self) -> str:
        return f"pattern({getattr(self.visible, '__qualname__', self.visible)!s})"


class CellClause(Clause):
    """A clause that lists its visible rectangles ("cells"), which are disjoint."""

    def cell_count(self, q0: Ints, q1: Ints) -> Ints:
        """An upper bound of the cells that meet rows q0..q1."""
        raise NotImplementedError

    def cells(self, q0: Ints, q1: Ints) -> tuple[Ints, Rect]:
        """The cells that meet rows q0..q1, as (which rows of the arguments, rectangles)."""
        raise NotImplementedError

    @property
    def cell_width(self) -> int:
        """The number of keys in a cell."""
        raise NotImplementedError


def holds_any(terms: Terms, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Whether pairs are in the union of the terms: bool, of the broadcast shape of i and j."""
    shape = torch.broadcast_shapes(i.shape, j.shape)
    union = torch.zeros(shape, dtype=torch.bool, device=i.device)
    for term in terms:
        if not term:
            return union.fill_(True)
        union |= reduce(torch.logical_and, (clause.holds(i, j) for clause in term))
    return union


def clip_all(term: Term, rect: Rect) -> Rect:
    """Shrink rectangles by every clause of a term."""
    for clause in term:
        rect = clause.clip(rect)
    return rect


def nonempty(rect: Rect) -> NDArray[np.bool_]:
    """Which rectangles have a pair."""
    return (rect[0] <= rect[1]) & (rect[2] <= rect[3])


def take(rect: Rect, which: NDArray[Any]) -> Rect:
    """Some of the rectangles."""
    return rect[0][which], rect[1][which], rect[2][which], rect[3][which]


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
