"""What all charts of a report share. Each is Vega-Lite, made by altair from rows that `stored` has
checked.

Names are only ever values of data, under fields that are named here: nothing of a stranger's is
read as an expression. Each chart comes in two widths, because its labels are placed in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import SparseAttnError
from ..units import number, printable, seconds
from .axes import LogAxis
from .stored import Row

# Definitions nearer than rounding in float64 are exact: a logarithm has no place for them.
ROUNDING = 64 * 2.0**-52
SECONDS = (
    "datum.value >= 1 ? format(datum.value, '~g') + ' s' : datum.value >= 1e-3 ? "
    "format(datum.value * 1e3, '~r') + ' ms' : format(datum.value * 1e6, '~r') + ' µs'"
)
BYTES = (
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


def figures(x: float | None, digits: int = 3) -> str:
    """A number as it is printed: no exponent where a few more digits do."""
    plain = x is not None and 10.0**digits <= abs(x) < 1e7
    return number(x, ",.0f" if plain else f".{digits}g")


def time_words(x: float | None) -> str:
    """Seconds as it is printed."""
    return seconds(x).replace(" us", " µs")


def short_names(rows: Sequence[Row], limit: int = 34) -> dict[str, str]:
    """A name for each spec: without its options where no other has the same name, and without its
    middle where it is too long (what tells two specs apart stands at the end)."""
    specs = list(dict.fromkeys(row["mechanism"] for row in rows))
    heads = [spec.partition("(")[0] for spec in specs]
    found: dict[str, str] = {}
    for spec, head in zip(specs, heads, strict=True):
        name = printable(head if heads.count(head) == 1 else spec)
        half = limit // 2
        name = name if len(name) <= limit else f"{name[: limit - half - 1]}…{name[-half:]}"
        if name in found.values():
            name = f"{name} #{len(found) + 1}"
        found[spec] = name
    return found


def is_wide(width: int) -> bool:
    """Whether a plot this wide (px) has room for every name."""
    return width > 400


def is_control(row: Row, name: str) -> bool:
    return bool(row["control"]) and row["mechanism"].partition("(")[0] == name


def log_scale(alt: Any, axis: LogAxis) -> Any:
    return alt.Scale(type="log", domain=[axis.low, axis.high], nice=False)


def spec(chart: Any) -> dict[str, Any]:
    """Vega-Lite without altair's own theme: the page's style sheet has the colours."""
    made = chart.to_dict(validate=False)  # slow; tests validate every chart
    made.pop("$schema", None)
    made.pop("config", None)
    return made
