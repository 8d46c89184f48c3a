"""Layouts as pieces: unions of bands, key ranges, query ranges, steps and chunks, taken apart.

Each term of a layout is a box: rows, keys, distances, and a step between the distances. Boxes are
made disjoint by cutting from each what the ones before it show, and each becomes pieces (see
`pieces`). A box with a step falls into classes of positions that are alike modulo the step, and
within a class it is a band.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...clauses import Band, Chunks, FirstKeys, FirstQueries, Step, Term
from ...layout import Layout
from .bands import Comb, Fold, Piece, Rect, Stack, plan_band

# A union of more boxes than this is served as blocks, and so are chunks narrower than this.
_MOST_BOXES = 24
_LEAST_CHUNK = 32


@dataclass(frozen=True)
class Box:
    """Rows `r0:r1` and keys `k0:k1` where `low <= j - i <= high` and `step` divides `j - i`."""

    r0: int
    r1: int
    k0: int
    k1: int
    low: int
    high: int
    step: int = 1

    @property
    def empty(self) -> bool:
        return self.r0 >= self.r1 or self.k0 >= self.k1 or self.low > self.high

    def minus(self, other: Box) -> Iterator[Box]:
        """What is left of it without a box of step 1, in disjoint boxes."""
        rest = self
        for start, stop in (("r0", "r1"), ("k0", "k1")):
            low, high = getattr(rest, start), getattr(rest, stop)
            cut, end = max(low, getattr(other, start)), min(high, getattr(other, stop))
            if cut >= end:
                yield rest
                return
            yield replace(rest, **{stop: cut})
            yield replace(rest, **{start: end})
            rest = replace(rest, **{start: cut, stop: end})
        yield replace(rest, high=min(rest.high, other.low - 1))
        yield replace(rest, low=max(rest.low, other.high + 1))


def plan(layout: Layout) -> tuple[Piece, ...] | None:
    """Pieces that cover every visible pair once, causality included; None if blocks are better."""
    grid = layout.grid
    n, m, offset = grid.n, grid.m, int(grid.offset or 0)
    band = layout.as_band()
    if band is not None:
        return plan_band(n, m, offset, *band)
    terms = layout.reduced().terms
    if len(terms) == 1 and isinstance(terms[0][0], Chunks):
        return _chunks(terms[0], n, m, offset)
    boxes = [box for box in (_box(term, n, m, offset) for term in terms) if box is not None]
    if len(boxes) < len(terms):
        return None
    made: list[Box] = []
    for box in sorted(boxes, key=_rank):
        parts = [box]
        for other in made:
            if other.step > 1:
                return None
            parts = [rest for part in parts for rest in part.minus(other) if not rest.empty]
        made += parts
        if len(made) > _MOST_BOXES:
            return None
    return tuple(piece for box in made for piece in _pieces(box, offset))


def _box(term: Term, n: int, m: int, offset: int) -> Box | None:
    far = n + m + abs(offset)
    box = Box(0, n, 0, m, -far, far)
    for clause in term:
        if isinstance(clause, Band):
            left = far if clause.left is None else clause.left
            right = far if clause.right is None else clause.right
            box = replace(box, low=max(box.low, -left), high=min(box.high, right))
        elif isinstance(clause, FirstKeys):
            box = replace(box, k1=min(box.k1, clause.count))
        elif isinstance(clause, FirstQueries):
            box = replace(box, r1=min(box.r1, clause.count - offset))
        elif isinstance(clause, Step) and box.step == 1:
            box = replace(box, step=clause.every)
        else:
            return None
    return box


def _rank(box: Box) -> tuple[int, int, int]:
    # Steps last: nothing can be cut from others by them. Of the rest, the largest first.
    return min(box.step, 2), box.r0 - box.r1, box.k0 - box.k1


def _pieces(box: Box, offset: int) -> Iterator[Piece]:
    n, m, place = box.r1 - box.r0, box.k1 - box.k0, offset + box.r0 - box.k0
    if box.step == 1:
        for piece in _band(n, m, place, box.low, box.high):
            yield piece.moved(box.r0, box.k0)
        return
    step = box.step
    low, high = -(-box.low // step), box.high // step
    # Classes in a row whose queries and keys are equally many, and begin equally far apart.
    runs: list[tuple[int, int, int, int, int]] = []
    for row in range(min(step, n)):
        key = (place + row) % step
        rows, keys = -(-(n - row) // step), max(0, -(-(m - key) // step))
        if runs and runs[-1][2:] == (key - row, rows, keys):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, *runs[-1][2:])
        else:
            runs.append((row, 1, key - row, rows, keys))
    for row, classes, ahead, rows, keys in runs:
        inner = tuple(_band(rows, keys, (place - ahead) // step, low, high))
        if inner:
            yield Comb(box.r0 + row, box.k0 + row + ahead, step, classes, rows, keys, inner)


def _band(n: int, m: int, place: int, low: int, high: int) -> tuple[Rect | Fold, ...]:
    """Pieces for `low <= j - p <= high`, whatever the signs."""
    shift = min(high, 0) + max(low, 0)  # at most one of them is not 0
    if n == 0 or m == 0 or low > high:
        return ()
    return plan_band(n, m, place + shift, shift - low, high - shift)


def _chunks(term: Term, n: int, m: int, offset: int) -> tuple[Piece, ...] | None:
    size = term[0].size  # type: ignore[attr-defined]
    causal = term[1:] == (Band(None, 0),)
    if size < _LEAST_CHUNK or (len(term) > 1 and not causal):
        return None
    pieces: list[Piece] = []
    low, high = max(0, offset), min(m, offset + n)
    first, last = -(-low // size), high // size
    if last > first:
        start = first * size
        pieces.append(Stack(start - offset, start, last - first, size, causal))
    chunks = {offset // size, (offset + n - 1) // size, (m - 1) // size}
    for chunk in sorted(x for x in chunks if not first <= x < last):
        r0, r1 = max(0, chunk * size - offset), min(n, chunk * size + size - offset)
        k0, k1 = max(0, chunk * size), min(m, chunk * size + size)
        if r0 < r1 and k0 < k1:
            far = n + m + abs(offset) + size
            inner = plan_band(r1 - r0, k1 - k0, offset + r0 - k0, far, 0 if causal else far)
            pieces += [piece.moved(r0, k0) for piece in inner]
    return tuple(pieces)
