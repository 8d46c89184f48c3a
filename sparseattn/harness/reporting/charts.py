"""The charts of a report as Vega-Lite, made by altair from rows that `stored` has checked.

Names are only ever values of data, under fields that are named here: nothing of a stranger's is
read as an expression. Each chart comes in two widths, because its labels are placed in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import SparseAttnError
from ..units import number, printable, seconds, size
from .axes import LogAxis
from .labels import CHARACTER, place, spread
from .stored import Row, value

# In this order each has one colour and one shape everywhere.
NATURES = ("masked_softmax", "softmax_estimate", "different_function", "exact", "other")
_SHAPES = ("circle", "triangle-up", "diamond", "square", "cross")
# Definitions nearer than rounding in float64 are exact: a logarithm has no place for them.
ROUNDING = 64 * 2.0**-52
_SECONDS = (
    "datum.value >= 1 ? format(datum.value, '~g') + ' s' : datum.value >= 1e-3 ? "
    "format(datum.value * 1e3, '~r') + ' ms' : format(datum.value * 1e6, '~r') + ' µs'"
)
_BYTES = (
    "datum.value >= 1073741824 ? format(datum.value / 1073741824, '~r') + ' GiB' : "
    "datum.value >= 1048576 ? format(datum.value / 1048576, '~r') + ' MiB' : "
    "datum.value >= 1024 ? format(datum.value / 1024, '~r') + ' KiB' : datum.value + ' B'"
)


@dataclass(frozen=True)
class Chart:
    """A chart: its title, what its reader sees, and Vega-Lite for wide and narrow windows."""

    title: str
    caption: str
    wide: dict[str, Any]
    narrow: dict[str, Any]


def altair() -> Any:
    """The module.

    Raises:
        SparseAttnError: it is not installed.
    """
    try:
        import altair
    except ImportError:
        raise SparseAttnError(
            "a report needs altair, which is not installed: pip install 'sparseattn[report]'"
        ) from None
    return altair


def short_names(rows: Sequence[Row], limit: int = 34) -> dict[str, str]:
    """A name for each spec: without its options where no other has the same name."""
    specs = list(dict.fromkeys(row["mechanism"] for row in rows))
    heads = [spec.partition("(")[0] for spec in specs]
    found = {}
    for spec, head in zip(specs, heads, strict=True):
        name = printable(head if heads.count(head) == 1 else spec)
        found[spec] = name if len(name) <= limit else name[: limit - 1] + "…"
    return found


@dataclass(frozen=True)
class Plane:
    """What a scatter shows: fields of rows, and words for them.

    Attributes:
        x, y: paths of fields; x is a time in seconds.
        guide: the control whose y is drawn as a line, and what lies above it.
    """

    x: tuple[str, ...]
    y: tuple[str, ...]
    x_title: str
    y_title: str
    guide: tuple[str, str]


ERROR_AND_TIME = Plane(
    ("time", "median_s"),
    ("error", "rel_l2"),
    "median time of a call",
    "relative error against exact attention",
    ("mean_of_values", "above: worse than the mean of the values"),
)
PERPLEXITY_AND_TIME = Plane(
    ("s_per_token",),
    ("perplexity",),
    "time a token",
    "perplexity",
    ("full", "above: worse than full"),
)


def scatter(rows: Sequence[Row], plane: Plane, facts: Mapping[str, Any]) -> Chart | None:
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
        "Lower is nearer, further left is faster, both on logarithmic axes. The line joins what "
        "nothing else beats in both; hollow marks are controls. Point at a mark for its whole row."
    )
    if left_out:
        names = short_names(rows)
        missing = ", ".join(names[row["mechanism"]] for row in left_out)
        caption += f" Not drawn, for want of a number: {missing}."
    title = f"{plane.y_title[0].upper()}{plane.y_title[1:]}, and {plane.x_title}"
    wide, narrow = (_scatter(shown, plane, facts, *at) for at in ((720, 430), (250, 330)))
    return Chart(title, caption, wide, narrow)


def _front(rows: Sequence[Row], plane: Plane) -> list[Row]:
    """As stored where rows say it; otherwise what no other beats."""
    if "pareto" in rows[0]:
        return [row for row in rows if row["pareto"]]
    spots = [(value(row, *plane.x), value(row, *plane.y)) for row in rows]
    return [
        row
        for row, (x, y) in zip(rows, spots, strict=True)
        if not any(a <= x and b <= y and (a < x or b < y) for a, b in spots)
    ]


def _scatter(
    rows: Sequence[Row], plane: Plane, facts: Mapping[str, Any], width: int, height: int
) -> dict[str, Any]:
    alt = altair()
    errors = [value(row, *plane.y) for row in rows]
    positive = [error for error in errors if error > ROUNDING] or [1.0]
    across = LogAxis.over([value(row, *plane.x) for row in rows], width, margin=0.08)
    up = LogAxis.over(positive, height, up=True, margin=0.08)
    exact = any(error <= ROUNDING for error in errors)
    floor = up.low
    if exact:  # a strip of its own below the axis: zero has no logarithm
        floor = up.back(height * 1.09)
        up = LogAxis(up.back(height * 1.16), up.high, height, up=True)
    front = _front(rows, plane)
    names = short_names(rows)
    points = []
    for row, error in zip(rows, errors, strict=True):
        on_front = any(row is one for one in front)
        points.append(
            {
                "x": value(row, *plane.x),
                "y": error if error > ROUNDING else floor,
                "name": names[row["mechanism"]],
                "nature": row["nature"] if row["nature"] in NATURES else NATURES[-1],
                "control": bool(row["control"]),
                "front": on_front,
                **_facts(row, facts),
            }
        )
    named = [p for p in points if width > 400 or p["front"] or p["control"]]
    named.sort(key=lambda p: (not p["front"], p["x"]))
    guide = next((p for r, p in zip(rows, points, strict=True) if _is(r, plane.guide[0])), None)
    guide_top = None if guide is None else up.at(guide["y"])
    taken = []
    if guide_top is not None:
        taken.append((0.0, guide_top - 16, CHARACTER * len(plane.guide[1]), guide_top - 1))
    spots = [(across.at(p["x"]), up.at(p["y"]), p["name"]) for p in named]
    bare = [(across.at(p["x"]), up.at(p["y"])) for p in points if p not in named]
    texts = [
        {
            "name": p["name"],
            "x": across.back(label.x),
            "y": up.back(label.y),
            "anchor": label.anchor,
            "far": label.far,
            "to_x": p["x"],
            "to_y": p["y"],
        }
        for p, label in zip(named, place(spots, width, height, bare, taken), strict=True)
    ]
    x = alt.X(
        "x:Q", title=plane.x_title, scale=_log(alt, across), axis=_axis(alt, across, _SECONDS)
    )
    ticks = [tick for tick in up.ticks() if not exact or tick > floor * 1.5]
    y_axis = alt.Axis(
        values=[*ticks, floor] if exact else ticks,
        labelExpr=f"datum.value <= {floor * 1.01!r} ? 'exact' : format(datum.value, '~g')"
        if exact
        else "format(datum.value, '~g')",
    )
    y = alt.Y("y:Q", title=plane.y_title, scale=_log(alt, up), axis=y_axis)
    layers = []
    if guide_top is not None:
        words = [{"y": guide["y"], "x": across.low, "words": plane.guide[1]}]  # type: ignore[index]
        base = alt.Chart(alt.Data(values=words))
        layers.append(base.mark_rule(style="guide").encode(y=y))
        layers.append(
            base.mark_text(style="guide-words", align="left", dx=3, dy=-7).encode(
                x=x, y=y, text="words:N"
            )
        )
    steps = sorted(({"x": p["x"], "y": p["y"]} for p in points if p["front"]), key=lambda p: p["x"])
    layers.append(
        alt.Chart(alt.Data(values=steps))
        .mark_line(style="front", interpolate="step-after")
        .encode(x=x, y=y, order="x:Q")
    )
    lines = alt.Chart(alt.Data(values=[text for text in texts if text["far"]]))
    layers.append(lines.mark_rule(style="leader").encode(x=x, y=y, x2="to_x:Q", y2="to_y:Q"))
    present = [nature for nature in NATURES if any(p["nature"] == nature for p in points)]
    color = alt.Color("nature:N", title=None, scale=alt.Scale(domain=list(NATURES)))
    shape = alt.Shape(
        "nature:N", title=None, scale=alt.Scale(domain=list(NATURES), range=list(_SHAPES))
    )
    legend = alt.Legend(values=present, orient="top", columns=len(present) if width > 400 else 2)
    layers.append(
        alt.Chart(alt.Data(values=points))
        .mark_point(filled=True, strokeWidth=1.8, opacity=1)
        .encode(
            x=x,
            y=y,
            color=color.legend(legend),
            stroke=color.legend(legend),
            shape=shape.legend(legend),
            fillOpacity=alt.condition("datum.control", alt.value(0), alt.value(1)),
            size=alt.condition("datum.front", alt.value(120), alt.value(70)),
            tooltip=_tooltip(alt, facts),
        )
    )
    for style in ("halo", "name"):
        for anchor in ("left", "right", "center"):
            part = [text for text in texts if text["anchor"] == anchor]
            if part:
                layers.append(
                    alt.Chart(alt.Data(values=part))
                    .mark_text(style=style, align=anchor)
                    .encode(x=x, y=y, text="name:N")
                )
    return _spec(alt.layer(*layers).properties(width=width, height=height))


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
        "Both axes are logarithmic: time that doubles with the length rises by one step for each "
        "step to the right, time that grows with its square by two. Point at a mark for its number."
    )
    plots: list[list[dict[str, Any]]] = []
    alt = altair()
    specs = list(dict.fromkeys(row["mechanism"] for row in rows))
    for width in (280, 170):
        plots.append([_growth(rows, specs, width, *quantity) for quantity in drawn])
    wide = alt.concat(*plots[0], columns=2, spacing=36).resolve_scale(color="shared")
    narrow = alt.concat(*plots[1], columns=1).resolve_scale(color="shared")
    return Chart("Growth with length", caption, _spec(wide), _spec(narrow))


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
            "spec": printable(row["mechanism"]),
            "words": (seconds if timed else size)(value(row, *path)),
            "dash": specs.index(row["mechanism"]) // 7,
        }
        for row in rows
        if row["length"] > 0 and (value(row, *path) or 0) > 0
    ]
    across = LogAxis.over([p["x"] for p in points], width, margin=0.03)
    up = LogAxis.over([p["y"] for p in points], height, up=True, margin=0.05)
    ends = {p["spec"]: p for p in sorted(points, key=lambda p: p["x"])}
    tops = spread([up.at(p["y"]) for p in ends.values()], height)
    shown = {printable(spec): names[spec] for spec in specs}
    texts = [
        {"spec": spec, "name": shown[spec], "x": across.high, "y": up.back(top)}
        for spec, top in zip(ends, tops, strict=True)
    ]
    lengths = sorted({p["x"] for p in points})
    x = alt.X(
        "x:Q",
        title="length (tokens)",
        scale=_log(alt, across),
        axis=alt.Axis(values=lengths, format=",.0f", labelOverlap="greedy"),
    )
    axis = _axis(alt, up, _SECONDS) if timed else alt.Axis(values=up.byte_ticks(), labelExpr=_BYTES)
    y = alt.Y("y:Q", title=None, scale=_log(alt, up), axis=axis)
    domain = [printable(spec) for spec in specs]
    color = alt.Color("spec:N", legend=None, scale=alt.Scale(domain=domain))
    dash = alt.StrokeDash(
        "dash:O",
        legend=None,
        scale=alt.Scale(domain=[0, 1, 2], range=[[1, 0], [6, 3], [2, 2]]),
    )
    base = alt.Chart(alt.Data(values=points)).encode(x=x, y=y, color=color)
    tips = [
        alt.Tooltip("spec:N", title="mechanism"),
        alt.Tooltip("x:Q", title="length", format=",.0f"),
        alt.Tooltip("words:N", title=title),
    ]
    ends_of_lines = alt.Chart(alt.Data(values=texts)).encode(x=x, y=y, color=color, text="name:N")
    return alt.layer(
        base.mark_line(strokeWidth=1.8).encode(strokeDash=dash, detail="spec:N"),
        base.mark_point(filled=True, size=46, opacity=1).encode(tooltip=tips),
        ends_of_lines.mark_text(align="left", dx=7, style="end"),
    ).properties(width=width, height=height, title=title[0].upper() + title[1:])


def by_head(rows: Sequence[Row]) -> Chart | None:
    """Error of each head: a line of cells a mechanism or, where there are many heads, a map of
    layers by heads each; None below two heads."""
    names = short_names(rows, 30)
    cells: list[dict[str, Any]] = []
    for at, row in enumerate(rows):
        for one in row["heads"] or []:
            if (one["rel_l2"] or 0) > ROUNDING:
                cells.append(
                    {
                        "name": names[row["mechanism"]],
                        "order": at,
                        "layer": one["layer"],
                        "head": one["head"],
                        "at": head_name(one),
                        "error": one["rel_l2"],
                        "words": number(one["rel_l2"], ".2g"),
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
    draw = _head_rows if len(places) <= 16 else _head_maps
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
        labelExpr="split(datum.label, ', ')" if angle == 0 else "datum.label",
    )
    down = alt.Axis(domain=False, ticks=False, labelLimit=240 if width > 400 else 105)
    base = alt.Chart(alt.Data(values=cells)).encode(
        x=alt.X("at:N", sort=alt.EncodingSortField("place", op="min"), axis=across),
        y=alt.Y("name:N", sort=alt.EncodingSortField("order", op="min"), title=None, axis=down),
    )
    layers = [base.mark_rect(style="heat").encode(color=color, tooltip=_head_tips(alt))]
    if step >= 36:
        ink = alt.condition(f"datum.error > {bright!r}", alt.value("#111"), alt.value("#fff"))
        layers.append(base.mark_text(fontSize=11).encode(text="words:N", color=ink))
    return _spec(alt.layer(*layers).properties(width=alt.Step(step), height=alt.Step(21)))


def _head_maps(cells: Sequence[Mapping[str, Any]], places: int, width: int) -> dict[str, Any]:
    """A map of layers by heads for each mechanism: a model has hundreds of heads."""
    alt = altair()
    across = len({cell["head"] for cell in cells})
    step = max(5, min(16, (190 if width > 400 else width - 30) // across))
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
        .facet(facet=alt.Facet("name:N", title=None, sort=names), columns=3 if width > 400 else 1)
    )
    return _spec(chart)


def perplexity(rows: Sequence[Row]) -> Chart | None:
    """Perplexity of a model with each mechanism, a line each, the best on top."""
    names = short_names(rows, 40)
    dots = [
        {
            "name": names[row["mechanism"]],
            "spec": printable(row["mechanism"]),
            "x": row["perplexity"],
            "words": number(row["perplexity"], ".4g"),
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
    full = next((row["perplexity"] for row in rows if _is(row, "full")), None)
    wide, narrow = (_perplexity(dots, full, width) for width in (520, 170))
    return Chart("Perplexity by mechanism", caption, wide, narrow)


def _perplexity(dots: list[dict[str, Any]], full: float | None, width: int) -> dict[str, Any]:
    alt = altair()
    axis = LogAxis.over([dot["x"] for dot in dots], width, margin=0.1)
    lines = alt.Axis(values=axis.ticks(), format="~g")
    down = alt.Axis(labelLimit=280 if width > 400 else 120, ticks=False, domain=False, grid=True)
    x = alt.X("x:Q", title="perplexity", scale=_log(alt, axis), axis=lines)
    best_first = alt.EncodingSortField("x", op="min")
    base = alt.Chart(alt.Data(values=dots)).encode(
        x=x, y=alt.Y("name:N", sort=best_first, title=None, axis=down)
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
    return _spec(alt.layer(*layers).properties(width=width, height=alt.Step(24)))


def _is(row: Row, name: str) -> bool:
    return bool(row["control"]) and row["mechanism"].partition("(")[0] == name


def _facts(row: Row, facts: Mapping[str, Any]) -> dict[str, str]:
    """What hovering shows, as text: fields named by their place, so that no name is a field."""
    return {f"fact{at}": printable(show(row)) for at, show in enumerate(facts.values())}


def _tooltip(alt: Any, facts: Mapping[str, Any]) -> list[Any]:
    return [alt.Tooltip(f"fact{at}:N", title=title) for at, title in enumerate(facts)]


def _log(alt: Any, axis: LogAxis) -> Any:
    return alt.Scale(type="log", domain=[axis.low, axis.high], nice=False)


def _axis(alt: Any, axis: LogAxis, words: str) -> Any:
    return alt.Axis(values=axis.ticks(), labelExpr=words)


def _spec(chart: Any) -> dict[str, Any]:
    """Vega-Lite without altair's own theme: the page's style sheet has the colours."""
    made = chart.to_dict()
    made.pop("$schema", None)
    made.pop("config", None)
    return made
