"""Perplexity of a model with each mechanism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..units import printable
from .axes import LogAxis
from .charts import Chart, altair, figures, is_control, is_wide, log_scale, short_names, spec
from .stored import Row


def perplexity(rows: Sequence[Row]) -> Chart | None:
    """Perplexity of a model with each mechanism, a line each, the best on top."""
    names, briefs = short_names(rows, 40), short_names(rows, 19)
    dots = [
        {
            "name": names[row["mechanism"]],
            "brief": briefs[row["mechanism"]],
            "spec": printable(row["mechanism"]),
            "x": row["perplexity"],
            "words": figures(row["perplexity"], 4),
            "control": bool(row["control"]),
        }
        for row in rows
        if row["status"] == "ok" and (row["perplexity"] or 0) > 0
    ]
    if not dots:
        return None
    caption = (
        "Further left is better. The line is the model as it is, with full attention; hollow marks "
        "are controls. The axis is logarithmic."
    )
    full = next((row["perplexity"] for row in rows if is_control(row, "full")), None)
    wide, narrow = (_perplexity(dots, full, width) for width in (520, 170))
    return Chart("Perplexity by mechanism", caption, wide, narrow)


def _perplexity(dots: list[dict[str, Any]], full: float | None, width: int) -> dict[str, Any]:
    alt = altair()
    axis = LogAxis.over([dot["x"] for dot in dots], width, margin=0.1)
    lines = alt.Axis(values=axis.ticks(), format="~g")
    down = alt.Axis(labelLimit=280, ticks=False, domain=False, grid=True)
    x = alt.X("x:Q", title="perplexity", scale=log_scale(alt, axis), axis=lines)
    best_first = alt.EncodingSortField("x", op="min")
    base = alt.Chart(alt.Data(values=dots)).encode(
        x=x,
        y=alt.Y("name:N" if is_wide(width) else "brief:N", sort=best_first, title=None, axis=down),
    )
    tips = [alt.Tooltip("spec:N", title="mechanism"), alt.Tooltip("words:N", title="perplexity")]
    layers = []
    if full:
        rule = alt.Chart(alt.Data(values=[{"x": full}]))
        layers.append(rule.mark_rule(style="guide").encode(x=x))
    hollow = alt.condition("datum.control", alt.value(0), alt.value(1))
    layers.append(base.mark_point(style="dot").encode(fillOpacity=hollow, tooltip=tips))
    for style in ("halo", "name"):
        layers.append(base.mark_text(style=style, align="left", dx=10).encode(text="words:N"))
    return spec(alt.layer(*layers).properties(width=width, height=alt.Step(24)))
