"""Error of each layer and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .axes import LogAxis
from .charts import ROUNDING, Chart, altair, figures, is_wide, short_names, spec
from .stored import Row


def by_head(rows: Sequence[Row]) -> Chart | None:
    """Error of each head: a line of cells a mechanism or, where layers have many heads, a map of
    layers by heads each; None below two heads."""
    names, briefs = short_names(rows, 30), short_names(rows, 17)
    cells: list[dict[str, Any]] = []
    for at, row in enumerate(rows):
        for one in row["heads"] or []:
            if (one["rel_l2"] or 0) > ROUNDING:
                cells.append(
                    {
                        "name": names[row["mechanism"]],
                        "brief": briefs[row["mechanism"]],
                        "order": at,
                        "layer": one["layer"],
                        "head": one["head"],
                        "at": head_name(one),
                        "error": one["rel_l2"],
                        "words": figures(one["rel_l2"], 2),
                    }
                )
    places = list(dict.fromkeys(cell["at"] for cell in cells))
    if len(places) < 2:
        return None
    for cell in cells:
        cell["place"] = places.index(cell["at"])
    caption = (
        "Relative error of each head alone: the brighter, the greater, on a logarithmic scale. "
        "Mechanisms that are exact here are left out."
    )
    layered = all(cell["layer"] is not None for cell in cells)
    draw = _head_maps if layered and len(places) > 16 else _head_rows
    wide, narrow = (draw(cells, len(places), width) for width in (720, 250))
    return Chart("Error by layer and head", caption, wide, narrow)


def head_name(head: Mapping[str, Any]) -> str:
    """What a head is called: `layer 2, head 0`, or `head 0` where no layer is known."""
    layer, number_there = head["layer"], head["head"] or 0
    return f"head {number_there:g}" if layer is None else f"layer {layer:g}, head {number_there:g}"


def _heat(alt: Any, cells: Sequence[Mapping[str, Any]]) -> tuple[LogAxis, Any]:
    errors = [cell["error"] for cell in cells]
    # Below a thousandth nobody looks, and above three nothing is left to lose.
    axis = LogAxis(min(max(min(errors), 1e-3), 1.0), max(min(max(errors), 3.0), 2.0), 200)
    scale = alt.Scale(type="log", domain=[axis.low, axis.high], clamp=True, scheme="viridis")
    legend = alt.Legend(orient="bottom", gradientLength=200, format="~g", values=axis.ticks())
    return axis, alt.Color("error:Q", title="relative error", scale=scale, legend=legend)


def _head_tips(alt: Any) -> list[Any]:
    return [
        alt.Tooltip("name:N", title="mechanism"),
        alt.Tooltip("at:N", title="where"),
        alt.Tooltip("words:N", title="relative error"),
    ]


def _head_rows(cells: Sequence[Mapping[str, Any]], places: int, width: int) -> dict[str, Any]:
    """Mechanisms by heads, with the numbers in the cells where they fit."""
    alt = altair()
    heat, color = _heat(alt, cells)
    bright = heat.back(0.6 * heat.pixels)  # letters on a bright cell are dark
    step = max(16, min(56, (width - 40) // places))
    angle = 0 if step >= 50 else -90
    across = alt.Axis(
        orient="top",
        title=None,
        domain=False,
        ticks=False,
        labelAngle=angle,
        labelPadding=18 if angle == 0 and "," in cells[0]["at"] else 4,
        labelExpr="split(datum.label, ', ')" if angle == 0 else "datum.label",
    )
    down = alt.Axis(domain=False, ticks=False, labelLimit=240)
    name = "name:N" if is_wide(width) else "brief:N"
    base = alt.Chart(alt.Data(values=cells)).encode(
        x=alt.X("at:N", sort=alt.EncodingSortField("place", op="min"), axis=across),
        y=alt.Y(name, sort=alt.EncodingSortField("order", op="min"), title=None, axis=down),
    )
    layers = [base.mark_rect(style="heat").encode(color=color, tooltip=_head_tips(alt))]
    if step >= 36:
        ink = alt.condition(f"datum.error > {bright!r}", alt.value("#111"), alt.value("#fff"))
        layers.append(base.mark_text(fontSize=11).encode(text="words:N", color=ink))
    return spec(alt.layer(*layers).properties(width=alt.Step(step), height=alt.Step(21)))


def _head_maps(cells: Sequence[Mapping[str, Any]], places: int, width: int) -> dict[str, Any]:
    """A map of layers by heads for each mechanism: a model has hundreds of heads."""
    alt = altair()
    across = len({cell["head"] for cell in cells})
    step = max(5, min(16, (150 if is_wide(width) else width - 30) // across))
    plain = alt.Axis(labelOverlap="greedy", labelAngle=0, ticks=False, domain=False)
    names = alt.EncodingSortField("order", op="min")
    chart = (
        alt.Chart(alt.Data(values=cells))
        .mark_rect()
        .encode(
            x=alt.X("head:O", title="head", axis=plain),
            y=alt.Y("layer:O", title="layer", axis=plain),
            color=_heat(alt, cells)[1],
            tooltip=_head_tips(alt),
        )
        .properties(width=alt.Step(step), height=alt.Step(9))
        .facet(
            facet=alt.Facet("name:N", title=None, sort=names), columns=4 if is_wide(width) else 1
        )
    )
    return spec(chart)
