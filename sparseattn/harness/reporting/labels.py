"""Where the names of points go, so that none covers another: plain geometry in pixels.

A browser would know the widths of letters; here they are estimated, on the wide side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHARACTER = 6.7  # px of the mean letter of a 12 px sans serif
LINE = 14.0  # px from line to line
_GAP = 8.0  # px from a point to its name
# Where a name may stand, the best first: steps from the point (right, down) and its anchor.
_NEAR = (
    (_GAP, 0.0, "left"),
    (-_GAP, 0.0, "right"),
    (0.0, -_GAP - 6, "center"),
    (0.0, _GAP + 7, "center"),
)
_FAR = tuple(
    (side * across, down * way, anchor)
    for down in (20.0, 34.0, 50.0, 68.0, 88.0)
    for way in (-1, 1)
    for side, anchor in ((1, "left"), (-1, "right"))
    for across in (8.0, 24.0)
)
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Label:
    """A name at `x`, `y` (px from the top left), its `anchor` there: left, right or center; `far`
    from its point it needs a line to it."""

    x: float
    y: float
    anchor: str
    far: bool


def place(
    points: Sequence[tuple[float, float, str]],
    width: float,
    height: float,
    obstacles: Sequence[tuple[float, float]] = (),
    taken: Sequence[Box] = (),
) -> list[Label]:
    """A place for the name of each point `(x, y, name)`, in their order.

    Args:
        width, height: of the plot; a name does not leave it.
        obstacles: points without a name.
        taken: boxes that are in use.
    """
    dots = [*((x, y) for x, y, _ in points), *obstacles]
    boxes = [*taken, *((x - 6, y - 6, x + 6, y + 6) for x, y in dots)]
    found = []
    for x, y, name in points:
        best: tuple[float, Label, Box] | None = None
        for across, down, anchor in (*_NEAR, *_FAR):
            label = Label(x + across, y + down, anchor, abs(down) > _GAP + 7)
            box = _box(label, name)
            cost = sum(_overlap(box, other) for other in boxes) + _outside(box, width, height)
            if best is None or cost < best[0]:
                best = cost, label, box
            if cost <= 0:
                break
        assert best is not None
        found.append(best[1])
        boxes.append(best[2])
    return found


def spread(heights: Sequence[float], limit: float) -> list[float]:
    """Heights moved apart to at least a line each, within 0 and `limit` where they fit."""
    order = sorted(range(len(heights)), key=lambda at: heights[at])
    moved = [heights[at] for at in order]
    for at in range(1, len(moved)):
        moved[at] = max(moved[at], moved[at - 1] + LINE)
    ceiling = max(limit, LINE * (len(moved) - 1))
    for at in range(len(moved) - 1, -1, -1):
        moved[at] = min(moved[at], ceiling)
        ceiling = moved[at] - LINE
    found = [0.0] * len(moved)
    for at, y in zip(order, moved, strict=True):
        found[at] = y
    return found


def _box(label: Label, name: str) -> Box:
    wide = CHARACTER * len(name)
    left = label.x - {"left": 0.0, "center": wide / 2, "right": wide}[label.anchor]
    return left, label.y - LINE / 2, left + wide, label.y + LINE / 2


def _overlap(a: Box, b: Box) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _outside(box: Box, width: float, height: float) -> float:
    out = max(0.0, -box[0]) + max(0.0, box[2] - width) + max(0.0, -box[1])
    return LINE * (out + max(0.0, box[3] - height))
