"""Time and memory against length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..units import printable, size
from .axes import LogAxis
from .charts import BYTES, SECONDS, Chart, altair, log_scale, short_names, spec, time_words
from .labels import spread
from .stored import Row, value

_COLOURS = 7  # of the style sheet; further lines take them again, dashed
_DASHES = [[1, 0], [6, 3], [2, 2]]


def growth(rows: Sequence[Row]) -> Chart | None:
    """Time and memory against length, a line a mechanism; None where nothing was measured twice."""
    quantities = [
        ("time, forward", ("time", "median_s"), True),
        ("extra memory, forward", ("peak_bytes",), False),
        ("time, forward and backward", ("backward", "time", "median_s"), True),
        ("extra memory, forward and backward", ("backward", "peak_bytes"), False),
    ]
    drawn = [
        (title, path, timed)
        for title, path, timed in quantities
        if len({row["length"] for row in rows if (value(row, *path) or 0) > 0}) > 1
    ]
    if not drawn:
        return None
    caption = (
        "Both axes are logarithmic, so that a power of the length is a straight line and its slope "
        "the exponent. Point at a mark for its number."
    )
    plots: list[list[dict[str, Any]]] = []
    alt = altair()
    specs = list(dict.fromkeys(row["mechanism"] for row in rows))
    for width in (280, 170):
        plots.append([_growth(rows, specs, width, *quantity) for quantity in drawn])
    wide = alt.concat(*plots[0], columns=2, spacing=36).resolve_scale(color="shared")
    narrow = alt.concat(*plots[1], columns=1).resolve_scale(color="shared")
    return Chart("Time and memory against length", caption, spec(wide), spec(narrow))


def _growth(
    rows: Sequence[Row],
    specs: list[str],
    width: int,
    title: str,
    path: tuple[str, ...],
    timed: bool,
) -> Any:
    alt = altair()
    names = short_names(rows, 24 if width > 200 else 17)
    height = max(240, 15 * len(specs))
    points = [
        {
            "x": row["length"],
            "y": value(row, *path),
            "series": specs.index(row["mechanism"]),
            "spec": printable(row["mechanism"]),
            "words": (time_words if timed else size)(value(row, *path)),
            "dash": specs.index(row["mechanism"]) // _COLOURS % len(_DASHES),
        }
        for row in rows
        if row["length"] > 0 and (value(row, *path) or 0) > 0
    ]
    across = LogAxis.over([p["x"] for p in points], width, margin=0.03)
    up = LogAxis.over([p["y"] for p in points], height, up=True, margin=0.05)
    ends = {p["series"]: p for p in sorted(points, key=lambda p: p["x"])}
    tops = spread([up.at(p["y"]) for p in ends.values()], height)
    texts = [
        {"series": at, "name": names[specs[at]], "x": across.high, "y": up.back(top)}
        for at, top in zip(ends, tops, strict=True)
    ]
    lengths = sorted({p["x"] for p in points})
    x = alt.X(
        "x:Q",
        title="length (tokens)",
        scale=log_scale(alt, across),
        axis=alt.Axis(values=lengths, format=",.0f", labelOverlap="greedy"),
    )
    axis = (
        alt.Axis(values=up.ticks(), labelExpr=SECONDS)
        if timed
        else alt.Axis(values=up.byte_ticks(), labelExpr=BYTES)
    )
    y = alt.Y("y:Q", title=None, scale=log_scale(alt, up), axis=axis)
    color = alt.Color("series:N", legend=None, scale=alt.Scale(domain=list(range(len(specs)))))
    dash = alt.StrokeDash(
        "dash:O",
        legend=None,
        scale=alt.Scale(domain=list(range(len(_DASHES))), range=_DASHES),
    )
    base = alt.Chart(alt.Data(values=points)).encode(x=x, y=y, color=color)
    tips = [
        alt.Tooltip("spec:N", title="mechanism"),
        alt.Tooltip("x:Q", title="length", format=",.0f"),
        alt.Tooltip("words:N", title=title),
    ]
    ends_of_lines = alt.Chart(alt.Data(values=texts)).encode(x=x, y=y, color=color, text="name:N")
    return alt.layer(
        base.mark_line(strokeWidth=1.8).encode(strokeDash=dash, detail="series:N"),
        base.mark_point(filled=True, size=46, opacity=1).encode(tooltip=tips),
        ends_of_lines.mark_text(align="left", dx=7, style="end"),
    ).properties(width=width, height=height, title=title[0].upper() + title[1:])
