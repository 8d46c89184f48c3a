"""What a band or a union of bands is cut into: pieces that cover every visible pair once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

# Elements of a rectangle's mask, which all heads share.
_MASK_ELEMENTS = 2**18


@dataclass(frozen=True)
class Rect:
    """Queries `r0:r1` against keys `k0:k1`: all of them, `j <= i` of a square, or a band.

    `band` is (left, right) with `shift`: row r and column c of the rectangle are visible where
    `-left <= c - r + shift <= right`.
    """

    r0: int
    r1: int
    k0: int
    k1: int
    causal: bool = False
    band: tuple[int, int] | None = None
    shift: int = 0

    def moved(self, rows: int, keys: int) -> Rect:
        """The same piece, some rows and keys further on."""
        return replace(
            self, r0=self.r0 + rows, r1=self.r1 + rows, k0=self.k0 + keys, k1=self.k1 + keys
        )


@dataclass(frozen=True)
class Fold:
    """`tiles` tiles of `size` queries from `r0`; tile t sees keys from `k0 + t * size`.

    Every tile is the same picture moved along the diagonal, so one small mask serves all, and keys
    are read through an overlapping view, never copied.
    """

    r0: int
    tiles: int
    size: int
    k0: int
    left: int
    right: int

    @property
    def r1(self) -> int:
        return self.r0 + self.tiles * self.size

    @property
    def width(self) -> int:
        return self.size + self.left + self.right

    def moved(self, rows: int, keys: int) -> Fold:
        """The same piece, some rows and keys further on."""
        return replace(self, r0=self.r0 + rows, k0=self.k0 + keys)


@dataclass(frozen=True)
class Stack:
    """`tiles` squares of `size` queries from `r0` and keys from `k0`, one after the other."""

    r0: int
    k0: int
    tiles: int
    size: int
    causal: bool

    @property
    def r1(self) -> int:
        return self.r0 + self.tiles * self.size


@dataclass(frozen=True)
class Comb:
    """Classes of positions alike modulo `step`, each with pieces of its own.

    Class c has the rows `r0 + c`, `r0 + c + step`, ..., `rows` of them, and the keys from `k0 + c`
    likewise; `inner` counts rows and keys within a class.
    """

    r0: int
    k0: int
    step: int
    classes: int
    rows: int
    keys: int
    inner: tuple[Rect | Fold, ...]

    @property
    def r1(self) -> int:
        return self.r0 + (self.rows - 1) * self.step + self.classes


Piece = Rect | Fold | Stack | Comb


def fold_size(left: int, right: int) -> int:
    """Queries a tile: more waste less of a wide band on the triangles; measured on 2 cores."""
    return 64 if left + right >= 192 else 32 if left + right >= 48 else 16


@lru_cache(maxsize=256)
def plan_band(
    n: int, m: int, offset: int, left: int | None, right: int | None
) -> tuple[Rect | Fold, ...]:
    """Pieces for `-left <= j - p <= right`, p = offset + row, over n rows and m keys."""
    far = n + m + abs(offset)
    left = far if left is None else min(left, far)
    right = far if right is None else min(right, far)
    first, last = max(0, -right - offset), min(n, m + left - offset)
    if first >= last:
        return ()
    size = fold_size(left, right)
    low, high = max(first, left - offset), min(last, m - right - offset)
    tiles = max(0, high - low) // size
    if tiles < 2:
        return tuple(_edge(first, last, m, offset, left, right))
    stop = low + tiles * size
    fold = Fold(low, tiles, size, low + offset - left, left, right)
    return (
        *_edge(first, low, m, offset, left, right),
        fold,
        *_edge(stop, last, m, offset, left, right),
    )


def _edge(r0: int, r1: int, m: int, offset: int, left: int, right: int) -> list[Rect]:
    """Rectangles for rows that a fold cannot serve: near either end, or of a wide band."""
    if r0 >= r1:
        return []
    whole = _rect(r0, r1, m, offset, left, right)
    if whole.band is None:
        return [whole]
    p0, p1, k1 = r0 + offset, r1 - 1 + offset, whole.k1
    if right == 0 and p1 - left <= 0 and p0 >= 0:
        # Where keys run out, the square is cut: later rows see all that is left of it.
        pieces = [Rect(r0, r1, p0, k1, causal=True)] if p0 < k1 else []
        return pieces if p0 == 0 else [*pieces, Rect(r0, r1, 0, min(p0, k1))]
    rows = max(16, _MASK_ELEMENTS // (k1 - whole.k0))
    return [
        _rect(start, min(start + rows, r1), m, offset, left, right) for start in range(r0, r1, rows)
    ]


def _rect(r0: int, r1: int, m: int, offset: int, left: int, right: int) -> Rect:
    """The keys that some of the rows see, and a band where not all rows see all of them."""
    p0, p1 = r0 + offset, r1 - 1 + offset
    k0, k1 = max(0, p0 - left), min(m, p1 + right + 1)
    if p1 - left <= k0 and p0 + right >= k1 - 1:
        return Rect(r0, r1, k0, k1)
    return Rect(r0, r1, k0, k1, band=(left, right), shift=k0 - p0)
