"""Tables of a report, sortable by the page's script, and the escaping of everything in them."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..units import number, printable, seconds, size
from .charts import ROUNDING, head_name
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
    return "0" if error is not None and error <= ROUNDING else number(error)


def worst_head(row: Row) -> str | None:
    """The head with the greatest error, and that error; None where there is only one, or none."""
    known = [head for head in row.get("heads") or [] if (head["rel_l2"] or 0) > ROUNDING]
    if len(known) < 2:
        return None
    worst = max(known, key=lambda head: head["rel_l2"])
    return f"{head_name(worst)}: {number(worst['rel_l2'])}"


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
_COMPARED = [
    _MECHANISM,
    _NATURE,
    Column("error", _at("error", "rel_l2"), error_words, "relative, against exact attention"),
    Column("row p95", _at("error", "row_p95"), error_words, "95 of 100 rows have less error"),
    Column(
        "÷ mean",
        _at("error", "vs_mean_of_values"),
        hint="error over that of the mean of the values",
    ),
    Column("mass", _at("retained_mass", "p50"), hint="share of the softmax mass kept, median row"),
    Column("oracle", _at("oracle_rel_l2"), error_words, "error of the best keys at this budget"),
    Column("density", _at("density"), _percent, "pairs used over pairs allowed"),
    Column("time", _at("time", "median_s"), seconds, "median of the timed runs"),
    Column("spread", _at("time", "iqr_s"), seconds, "interquartile range"),
    Column("speed", _at("speedup"), _times, "time of full over this one's, same rounds"),
    Column("memory", _at("peak_bytes"), size, "extra, at the peak of one call"),
    Column("choosing", _at("select_s"), seconds, "selection of keys, part of the time"),
    Column("compiling", _at("compile_s"), seconds, "not part of the time"),
    Column("time, both", _at("backward", "time", "median_s"), seconds, "forward and backward"),
    Column("speed, both", _at("backward", "speedup"), _times, "forward and backward"),
    Column("memory, both", _at("backward", "peak_bytes"), size, "forward and backward"),
    Column("worst head", worst_head, str, "and its error"),
    Column("implementation", _at("impl"), str),
]
_EVALUATED = [
    _MECHANISM,
    _NATURE,
    Column("perplexity", _at("perplexity"), lambda x: number(x, ".4g"), "lower is better"),
    Column("KL", _at("kl"), hint="divergence of the next token's distribution, nats a token"),
    Column("same top token", _at("top1_agreement"), _percent),
    Column("tokens", _at("tokens"), lambda x: number(x, ",.0f"), "scored"),
    Column("time a token", _at("s_per_token"), seconds),
    Column("memory", _at("peak_bytes"), size),
]


def columns(kind: str, rows: Sequence[Row]) -> list[Column]:
    """The columns that any of the rows has something in."""
    known = list(_EVALUATED if kind == EVALUATION else _COMPARED)
    names = dict.fromkeys(name for row in rows for name in row.get("metrics") or {})
    known += [Column(name, _at("metrics", name), hint="a metric of a plugin") for name in names]
    known.append(_REMARKS)
    return [one for one in known if any(one.of(row) not in (None, "") for row in rows)]


def facts(kind: str) -> Mapping[str, Callable[[Row], str]]:
    """What hovering over a row's mark shows."""
    known = [one for one in (_EVALUATED if kind == EVALUATION else _COMPARED)]
    return {one.title: _words(one) for one in [*known, _REMARKS]}


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
        return f"<td>{escape(words)}</td>"
    key = "" if found is None else f' data-v="{float(found)!r}"'
    return f"<td class=num{key}>{escape(words)}</td>"
