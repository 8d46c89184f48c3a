"""Rows of a comparison as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..harness.units import number, seconds, size
from .output import printable, say, table

Row = Mapping[str, Any]
WORST = 3  # heads of a mechanism that are named


def _get(row: Row, field: str, part: str) -> float | None:
    return (row.get(field) or {}).get(part)


def _notes(row: Row) -> str:
    notes = []
    if row["status"] != "ok":
        notes.append(f"{row['status']}: {row['reason']}")
    elif row["reason"]:
        notes.append(row["reason"])
    if row.get("control"):
        notes.append("control")
    if row.get("pareto"):
        notes.append("pareto")
    return "; ".join([*notes, *(row.get("notes") or [])])


def _setting(row: Row) -> tuple[Any, ...]:
    return row["input"], row["length"], row["causal"], row["dtype"], row.get("seed")


def print_comparison(rows: Iterable[Row]) -> None:
    """A table for each input, length and seed."""
    settings: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        settings.setdefault(_setting(row), []).append(row)
    for at, ((source, length, causal, dtype, seed), group) in enumerate(settings.items()):
        if at:
            say()
        kind = "causal" if causal else "not causal"
        drawn = "" if seed is None else f", seed {seed}"
        table(
            [
                "mechanism",
                "impl",
                "rel. error",
                "row p95",
                "mass p50",
                "oracle",
                "density",
                "time",
                "spread",
                "speedup",
                "memory",
                "notes",
            ],
            [
                [
                    row["mechanism"],
                    row["impl"] or "-",
                    number(_get(row, "error", "rel_l2")),
                    number(_get(row, "error", "row_p95")),
                    number(_get(row, "retained_mass", "p50")),
                    number(row.get("oracle_rel_l2")),
                    number(row.get("density"), ".1%"),
                    seconds(_get(row, "time", "median_s")),
                    seconds(_get(row, "time", "iqr_s")),
                    number(row.get("speedup"), ".2f"),
                    size(row.get("peak_bytes")),
                    _notes(row),
                ]
                for row in group
            ],
            title=f"{source}, length {length}, {kind}, {dtype}{drawn}",
        )
        _print_worst_heads(group)


def _print_worst_heads(rows: Iterable[Row]) -> None:
    """Where each mechanism is furthest off, on recorded heads: the rest have no layer to name."""
    lines = []
    for row in rows:
        heads = [head for head in row.get("heads") or [] if head["layer"] is not None]
        heads = [head for head in heads if (head["rel_l2"] or 0) > 0]
        worst = sorted(heads, key=lambda head: -head["rel_l2"])[:WORST]
        if worst and row.get("nature") != "exact":
            named = [f"{h['layer']}.{h['head']} ({number(h['rel_l2'])})" for h in worst]
            lines.append([row["mechanism"], ", ".join(named)])
    if lines:
        say()
        table(["mechanism", "worst heads, as layer.head (rel. error)"], lines)


def print_evaluation(result: Mapping[str, Any]) -> None:
    """A table of what each mechanism does to a model."""
    facts = result["manifest"]
    start, end = facts["score"]
    where = f"{facts['model']} on {facts['text']['file']}, {facts['windows']} x {facts['context']}"
    table(
        [
            "mechanism",
            "impl",
            "perplexity",
            "KL",
            "same top",
            "time/token",
            "spread",
            "speedup",
            "memory",
            "notes",
        ],
        [
            [
                row["mechanism"],
                row["impl"] or "-",
                number(row["perplexity"], ".4g"),
                number(row["kl"]),
                number(row["top1_agreement"], ".1%"),
                seconds(row["s_per_token"]),
                seconds(row["time"] and row["time"]["iqr_s"] / facts["context"]),
                number(row["speedup"], ".2f"),
                size(row["peak_bytes"]),
                _notes(row),
            ]
            for row in result["rows"]
        ],
        title=f"{where} tokens, scored {start}:{end}, {facts['dtype']}",
    )


def _backward(row: Row, part: str) -> Any:
    return (row.get("backward") or {}).get(part)


def print_growth(rows: Iterable[Row]) -> None:
    """For time and for memory a table: a line a mechanism, a column a length."""
    from ..harness.growth import exponent

    rows = list(rows)
    lengths = sorted({row["length"] for row in rows})
    by_mechanism: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_mechanism.setdefault(row["mechanism"], {})[row["length"]] = row
    quantities: list[tuple[str, Callable[[float | None], str], Callable[[Row], Any]]] = [
        ("Median time, forward", seconds, lambda row: _get(row, "time", "median_s")),
        ("Peak memory, forward", size, lambda row: row.get("peak_bytes")),
    ]
    if any(row.get("backward") for row in rows):
        quantities += [
            (
                "Median time, forward and backward",
                seconds,
                lambda row: (_backward(row, "time") or {}).get("median_s"),
            ),
            ("Peak memory, forward and backward", size, lambda row: _backward(row, "peak_bytes")),
        ]
    for title, show, value in quantities:
        lines = []
        for mechanism, found in by_mechanism.items():
            values = {n: value(row) for n, row in found.items()}
            cells = [show(values.get(n)) for n in lengths]
            lines.append([mechanism, *cells, number(exponent(list(values.items())), ".2f")])
        table(["mechanism", *map(str, lengths), "grows as N^"], lines, title=title)
        say()
    for row in rows:
        if row["status"] != "ok":
            say(
                f"{printable(row['mechanism'])} at {row['length']}: {row['status']}: "
                f"{printable(row['reason'])}"
            )
