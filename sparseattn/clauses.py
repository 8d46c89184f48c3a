"""The clauses that layouts are made of: sets of pairs (i, j) of absolute positions.

Beside the exact test `holds`, a clause knows two things about a rectangle of pairs,
`q0 <= i <= q1` and `k0 <= j <= k1`, for many rectangles at once: where in it the visible pairs can
lie (`clip`), and whether all of it is visible (`covers`). Lowering needs no more. A term is a tuple
of clauses that must all hold; a union is a tuple of terms.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import InvalidInputError

Ints: TypeAlias = NDArray[np.int64]
Rect: TypeAlias = tuple[
    Ints, Ints, Ints, Ints
]  # q0, q1, k0, k1, inclusive; empty if q0 > q1 or k0 > k1
Term: TypeAlias = "tuple[Clause, ...]"
Terms: TypeAlias = tuple[Term, ...]


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
