"""Tables of a report, sortable by the page's script, and the escaping of everything in them."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..units import number, printable, size
from .charts import ROUNDING, figures, time_words
from .heads import head_name
from .stored import EVALUATION, Row, Stored, value


def escape(text: object) -> str:
    """Text for HTML, in elements and in quoted attributes; control codes are spelled out."""
    return html.escape(printable(text), quote=True)


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: what stands on top.
        of: the value of a row: a number, text or None.
        show: the value in words.
        hint: what it means.
    """

    title: str
    of: Callable[[Row], Any]
    show: Callable[[Any], str] = number
    hint: str = ""

    @property
    def numeric(self) -> bool:
        return self.show is not str


def _at(*path: str) -> Callable[[Row], Any]:
    return lambda row: value(row, *path)


def _percent(share: float | None) -> str:
    return number(share, ".1%")


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:.2f}×"


def error_words(error: float | None) -> str:
    """An error; what float64 leaves of zero is called so."""
    return "0" if error is not None and error <= ROUNDING else figures(error)


def worst_head(row: Row) -> str | None:
    """The head with the greatest error, and that error; None where there is only one, or none."""
    known = [head for head in row.get("heads") or [] if (head["rel_l2"] or 0) > ROUNDING]
    if len(known) < 2:
        return None
    worst = max(known, key=lambda head: head["rel_l2"])
    return f"{head_name(worst)}: {figures(worst['rel_l2'])}"


def worse_than_the_mean(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a row is worse than the mean of the values: its error, or its model's perplexity."""
    if "perplexity" not in row:
        return (value(row, "error", "vs_mean_of_values") or 0) > 1
    mean = [r["perplexity"] for r in rows if r["control"] and r["mechanism"] == "mean_of_values"]
    return bool(mean and mean[0]) and (row["perplexity"] or 0) > mean[0]


def remarks(row: Row) -> str:
    """Everything that must be said of a row beside its numbers."""
    said = (
        [f"{row['status']}: {row['reason'] or 'no reason given'}"] if row["status"] != "ok" else []
    )
    if row["status"] == "ok" and row["reason"]:
        said.append(row["reason"])
    backward = row.get("backward")
    if backward and backward["status"] not in (None, "ok"):
        said.append(f"backward {backward['status']}: {backward['reason'] or 'no reason given'}")
    said += ["control"] if row["control"] else []
    said += ["on the Pareto front"] if row.get("pareto") else []
    return "; ".join([*said, *(row["notes"] or [])])


_MECHANISM = Column("mechanism", _at("mechanism"), str)
_NATURE = Column("nature", _at("nature"), str, "what kind of function it is")
_REMARKS = Column("remarks", remarks, str)
_IMPL = Column("implementation", _at("impl"), str)
_COMPARED = [
    _MECHANISM,
    Column("error", _at("error", "rel_l2"), error_words, "relative, against exact attention"),
    Column("time", _at("time", "median_s"), time_words, "median of the timed runs"),
    Column("speed", _at("speedup"), _times, "time of full over this one's, same rounds"),
    Column("memory", _at("peak_bytes"), size, "extra, at the peak of one call"),
    Column("÷ mean", _at("error", "vs_mean_of_values"), figures, "error over that of the mean"),
    Column("row p95", _at("error", "row_p95"), error_words, "95 of 100 rows have less error"),
    Column("mass", _at("retained_mass", "p50"), figures, "softmax mass kept, median row"),
    Column("oracle", _at("oracle_rel_l2"), error_words, "error of the best keys at this budget"),
    Column("density", _at("density"), _percent, "pairs used over pairs allowed"),
    Column("spread", _at("time", "iqr_s"), time_words, "interquartile range of the time"),
    Column("choosing", _at("select_s"), time_words, "selection of keys, part of the time"),
    Column("compiling", _at("compile_s"), time_words, "not part of the time"),
    Column("time, both", _at("backward", "time", "median_s"), time_words, "forward and backward"),
    Column("speed, both", _at("backward", "speedup"), _times, "forward and backward"),
    Column("memory, both", _at("backward", "peak_bytes"), size, "forward and backward"),
    Column("worst head", worst_head, str, "and its error"),
    _REMARKS,
    _NATURE,
    _IMPL,
]
_EVALUATED = [
    _MECHANISM,
    Column("perplexity", _at("perplexity"), lambda x: figures(x, 4), "lower is better"),
    Column("KL", _at("kl"), figures, "divergence of the next token's distribution, nats"),
    Column("same top token", _at("top1_agreement"), _percent),
    Column("tokens", _at("tokens"), lambda x: number(x, ",.0f"), "scored"),
    Column("time a token", _at("s_per_token"), time_words),
    Column("speed", _at("speedup"), _times, "time of the original over this one's, same rounds"),
    Column("memory", _at("peak_bytes"), size, "extra, at the peak of one forward"),
    Column("fallbacks", _at("fallbacks"), figures, "calls that the original attention served"),
    _REMARKS,
    _NATURE,
    _IMPL,
]


def columns(kind: str, rows: Sequence[Row]) -> list[Column]:
    """The columns that any of the rows has something in."""
    known = list(_EVALUATED if kind == EVALUATION else _COMPARED)
    names = dict.fromkeys(name for row in rows for name in row.get("metrics") or {})
    metrics = [
        Column(name, _at("metrics", name), figures, "a metric of a plugin") for name in names
    ]
    at = known.index(_REMARKS)
    known[at:at] = metrics
    return [one for one in known if any(one.of(row) not in (None, "") for row in rows)]


def facts(kind: str, rows: Sequence[Row]) -> Mapping[str, Callable[[Row], str]]:
    """What hovering over a row's mark shows: the columns but for metrics, whose titles are names
    of strangers."""
    known = _EVALUATED if kind == EVALUATION else _COMPARED
    return {c.title: _words(c) for c in columns(kind, rows) if c in known}


def _words(column: Column) -> Callable[[Row], str]:
    def words(row: Row) -> str:
        found = column.of(row)
        return "-" if found is None else column.show(found)

    return words


def growth_table(document: Stored, caption: str) -> str:
    """The exponents that `bench` wrote."""
    fields = {
        "time_exponent": "time",
        "memory_exponent": "memory",
        "backward_time_exponent": "time, forward and backward",
        "backward_memory_exponent": "memory, forward and backward",
    }
    shown = [_MECHANISM, Column("input", _at("input"), str)]
    shown += [
        Column(title, _at(name), lambda p: "-" if p is None else f"N^{p:.2f}")
        for name, title in fields.items()
        if any(row[name] is not None for row in document.growth)
    ]
    return table(shown, document.growth, caption)


def table(shown: Sequence[Column], rows: Sequence[Row], caption: str) -> str:
    """A table whose headers sort it; cells carry what they are sorted by."""
    head = "".join(
        f'<th scope="col"{" class=num" if c.numeric else ""}><button type="button"'
        f"{f' title={chr(34)}{escape(c.hint)}{chr(34)}' if c.hint else ''}>{escape(c.title)}"
        "</button></th>"
        for c in shown
    )
    body = "".join(
        f"<tr{_class(row)}>{''.join(_cell(c, row) for c in shown)}</tr>\n" for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f"<table class=sortable><caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def _class(row: Row) -> str:
    status = row.get("status", "ok")
    words = [status] if status != "ok" else []
    words += ["control"] if row.get("control") else []
    words += ["front"] if row.get("pareto") else []
    return f' class="{" ".join(words)}"' if words else ""


def _cell(column: Column, row: Row) -> str:
    found = column.of(row)
    words = "-" if found is None else column.show(found)
    if column is _MECHANISM:
        return f'<th scope="row">{escape(words)}</th>'
    if not column.numeric:
        kind = "remarks" if column is _REMARKS else "text"
        return f"<td class={kind}>{escape(words)}</td>"
    key = "" if found is None else f' data-v="{float(found)!r}"'
    return f"<td class=num{key}>{escape(words)}</td>"
