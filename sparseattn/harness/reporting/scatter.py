"""Error, or perplexity, against time, with the Pareto front and a name at every mark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..units import printable
from .axes import LogAxis
from .charts import (
    ROUNDING,
    SECONDS,
    Chart,
    altair,
    figures,
    is_control,
    is_wide,
    log_scale,
    short_names,
    spec,
)
from .labels import CHARACTER, Box, place
from .stored import Row, value

NATURES = ("masked_softmax", "softmax_estimate", "different_function", "exact", "other")
_SHAPES = ("circle", "triangle-up", "diamond", "square", "cross")
Facts = Mapping[str, Callable[[Row], str]]  # what hovering over a mark shows, by title
_STRIP = 34  # px, for what has no place on a logarithmic axis


@dataclass(frozen=True)
class Plane:
    """What a scatter shows: fields of rows, and words for them.

    Attributes:
        x, y: paths of fields; `x_words`, a Vega expression, says a tick of x.
        guide: the control whose y is drawn as a line, and what lies above it.
        far: what is worse than the guide by this factor gets no place of its own on the axis, so
            that it does not squeeze the rest.
    """

    x: tuple[str, ...]
    y: tuple[str, ...]
    x_title: str
    y_title: str
    x_words: str
    guide: tuple[str, str]
    far: float


ERROR_AND_TIME = Plane(
    ("time", "median_s"),
    ("error", "rel_l2"),
    "median time of a call",
    "relative error against exact attention",
    SECONDS,
    ("mean_of_values", "above: worse than the mean of the values"),
    4.0,
)
PERPLEXITY_AND_TIME = Plane(
    ("relative_time",),
    ("perplexity",),
    "time over the original's",
    "perplexity",
    "format(datum.value, '~g') + '×'",
    ("full", "above: worse than full"),
    30.0,
)


def scatter(rows: Sequence[Row], plane: Plane, facts: Facts) -> Chart | None:
    """Error (or perplexity) against time with the Pareto front; None below two points."""
    shown = [
        row
        for row in rows
        if row["status"] == "ok"
        and (value(row, *plane.x) or 0) > 0
        and value(row, *plane.y) is not None
        and value(row, *plane.y) >= 0
    ]
    if len(shown) < 2:
        return None
    left_out = [row for row in rows if not any(row is one for one in shown)]
    caption = (
        "Lower is better, further left is faster, both on logarithmic axes. The line joins what "
        "nothing else beats in both; hollow marks are controls. Point at a mark for its whole row."
    )
    if any(_Upward.over(shown, plane, 440).far(value(row, *plane.y)) for row in shown):
        caption += " What is off the scale stands at the top, its value in brackets."
    if left_out:
        names = short_names(rows)
        missing = ", ".join(names[row["mechanism"]] for row in left_out)
        caption += f" Not drawn, for want of a number: {missing}."
    title = f"{plane.y_title[0].upper()}{plane.y_title[1:]}, and {plane.x_title}"
    wide, narrow = (_scatter(shown, plane, facts, *at) for at in ((800, 440), (250, 330)))
    return Chart(title, caption, wide, narrow)


def _scatter(
    rows: Sequence[Row], plane: Plane, facts: Facts, width: int, height: int
) -> dict[str, Any]:
    alt = altair()
    wide = is_wide(width)
    across = LogAxis.over([value(row, *plane.x) for row in rows], width, margin=0.08)
    up = _Upward.over(rows, plane, height)
    names = short_names(rows)
    points = []
    for row in rows:
        y = value(row, *plane.y)
        name = names[row["mechanism"]]
        points.append(
            {
                "x": value(row, *plane.x),
                "y": up.shown(y),
                "name": f"{name} ({figures(y)})" if up.far(y) else name,
                "nature": row["nature"] if row["nature"] in NATURES else NATURES[-1],
                "control": bool(row["control"]),
                "front": bool(row["pareto"]),
                **_facts(row, facts),
            }
        )
    x = alt.X(
        "x:Q",
        title=plane.x_title,
        scale=log_scale(alt, across),
        axis=alt.Axis(values=across.ticks(), labelExpr=plane.x_words),
    )
    y = alt.Y("y:Q", title=plane.y_title, scale=log_scale(alt, up.axis), axis=up.ticks(alt))
    layers: list[Any] = []
    taken: list[Box] = []
    if up.guide is not None:
        said = plane.guide[1] if wide else plane.guide[1].partition(" than ")[0]
        base = alt.Chart(alt.Data(values=[{"y": up.guide, "x": across.low, "words": said}]))
        layers.append(base.mark_rule(style="guide").encode(y=y))
        text = base.encode(x=x, y=y, text="words:N")
        layers.append(text.mark_text(style="guide-words", align="left", dx=3, dy=-7))
        top = up.axis.at(up.guide)
        taken.append((0.0, top - 15, CHARACTER * len(said), top - 1))
    steps = [{"x": p["x"], "y": p["y"]} for p in points if p["front"]]
    steps.sort(key=lambda p: p["x"])
    taken += _steps(steps, across, up.axis)
    line = alt.Chart(alt.Data(values=steps))
    layers.append(
        line.mark_line(style="front", interpolate="step-after").encode(x=x, y=y, order="x:Q")
    )
    texts = _names(points, across, up.axis, taken, crowded=not wide)
    leaders = alt.Chart(alt.Data(values=[text for text in texts if text["far"]]))
    layers.append(leaders.mark_rule(style="leader").encode(x=x, y=y, x2="to_x:Q", y2="to_y:Q"))
    present = [nature for nature in NATURES if any(p["nature"] == nature for p in points)]
    legend = alt.Legend(values=present, orient="top", columns=len(present) if wide else 2)
    natures, shapes = alt.Scale(domain=list(NATURES)), list(_SHAPES)
    layers.append(
        alt.Chart(alt.Data(values=points))
        .mark_point(filled=True, strokeWidth=1.8, opacity=1)
        .encode(
            x=x,
            y=y,
            color=alt.Color("nature:N", title=None, scale=natures, legend=legend),
            stroke=alt.Stroke("nature:N", title=None, scale=natures, legend=legend),
            shape=alt.Shape(
                "nature:N",
                title=None,
                scale=alt.Scale(domain=list(NATURES), range=shapes),
                legend=legend,
            ),
            fillOpacity=alt.condition("datum.control", alt.value(0), alt.value(1)),
            size=alt.condition("datum.front", alt.value(120), alt.value(70)),
            tooltip=[alt.Tooltip(f"fact{at}:N", title=title) for at, title in enumerate(facts)],
        )
    )
    words = alt.Chart(alt.Data(values=texts)).encode(x=x, y=y, text="name:N")
    side = alt.ExprRef("datum.anchor")
    layers += [words.mark_text(style=style, align=side) for style in ("halo", "name")]
    return spec(alt.layer(*layers).properties(width=width, height=height))


@dataclass(frozen=True)
class _Upward:
    """The vertical axis of a scatter: logarithmic, with a strip at the bottom for what is exact
    (zero has no logarithm) and one on top for what is far worse than the guide, which would
    squeeze all else.

    Attributes:
        axis: all of it; `inner`: without the strips.
        bottom, top: where the marks of the strips lie, or would lie.
        guide: the value of the control that is drawn as a line, or None.
    """

    axis: LogAxis
    inner: LogAxis
    bottom: float
    top: float
    guide: float | None

    @classmethod
    def over(cls, rows: Sequence[Row], plane: Plane, height: int) -> _Upward:
        values = [value(row, *plane.y) for row in rows]
        guide = next(
            (v for r, v in zip(rows, values, strict=True) if is_control(r, plane.guide[0])), None
        )
        guide = guide if guide and guide > ROUNDING else None
        most = float("inf") if guide is None else plane.far * guide
        between = [v for v in values if ROUNDING < v <= most] or [1.0]
        below = _STRIP if min(values) <= ROUNDING else 0
        above = _STRIP if max(values) > most else 0
        inner = LogAxis.over(between, height - below - above, up=True, margin=0.08)
        bottom, top = inner.back(inner.pixels + below), inner.back(-above)
        return cls(
            LogAxis(bottom, top, height, up=True),
            inner,
            inner.back(inner.pixels + below / 2),
            inner.back(-above / 2),
            guide,
        )

    def far(self, y: float) -> bool:
        """Whether a value lies in the strip on top."""
        return y > self.inner.high

    def shown(self, y: float) -> float:
        """Where a value is drawn."""
        return self.bottom if y <= ROUNDING else self.top if self.far(y) else y

    def ticks(self, alt: Any) -> Any:
        """Those of the axis, and a word for each strip."""
        words = (
            f"datum.value < {self.inner.low!r} ? 'exact' : datum.value > {self.inner.high!r} ? "
            "'off scale' : format(datum.value, '~g')"
        )
        strips = [
            at for at in (self.bottom, self.top) if not self.inner.low <= at <= self.inner.high
        ]
        return alt.Axis(values=[*self.inner.ticks(), *strips], labelExpr=words)


def _steps(front: Sequence[Mapping[str, Any]], across: LogAxis, up: LogAxis) -> list[Box]:
    """The boxes of a line that goes right and then down, from point to point."""
    spots = [(across.at(p["x"]), up.at(p["y"])) for p in front]
    found = []
    for (x, y), (next_x, next_y) in pairwise(spots):
        found.append((x, y - 2, next_x, y + 2))
        found.append((next_x - 2, min(y, next_y), next_x + 2, max(y, next_y)))
    return found


def _names(
    points: Sequence[Mapping[str, Any]],
    across: LogAxis,
    up: LogAxis,
    taken: Sequence[Box],
    crowded: bool,
) -> list[dict[str, Any]]:
    """The names of points where they have room; where all is crowded, of the front and controls."""
    named = [p for p in points if not crowded or p["front"] or p["control"]]
    named.sort(key=lambda p: (not p["front"], p["x"]))
    spots = [(across.at(p["x"]), up.at(p["y"]), p["name"]) for p in named]
    bare = [(across.at(p["x"]), up.at(p["y"])) for p in points if p not in named]
    places = place(spots, across.pixels, up.pixels, bare, taken)
    return [
        {
            "name": p["name"],
            "x": across.back(label.x),
            "y": up.back(label.y),
            "anchor": label.anchor,
            "far": label.far,
            "to_x": p["x"],
            "to_y": p["y"],
        }
        for p, label in zip(named, places, strict=True)
    ]


def _facts(row: Row, facts: Facts) -> dict[str, str]:
    """What hovering shows, as text: fields named by their place, so that no name is a field."""
    return {f"fact{at}": printable(show(row)) for at, show in enumerate(facts.values())}
