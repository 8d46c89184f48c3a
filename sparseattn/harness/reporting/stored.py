"""Stored results, read and checked: what `compare`, `bench` and `evaluate` wrote with `--json`.

Everything in a file may come from strangers. A number that is none is refused here, with the file,
the row and the field, so that nothing later must ask.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InvalidInputError
from ..store import STATUSES, plain

COMPARISON, GROWTH, EVALUATION = "comparison", "growth", "evaluation"
Row = Mapping[str, Any]

_TIME = {"median_s": float, "iqr_s": float, "runs": float}
_BACKWARD = {"status": str, "reason": str, "time": _TIME, "speedup": float, "peak_bytes": float}
# What of a row is shown, and of which type: a mapping has these fields, a list items of its one
# form, and any value may be null or missing.
_COMMON = {
    "mechanism": str,
    "status": str,
    "reason": str,
    "notes": [str],
    "looks_ahead": bool,
    "control": bool,
    "nature": str,
    "peak_bytes": float,
}
_COMPARED = _COMMON | {
    "impl": str,
    "input": str,
    "length": float,
    "seed": float,
    "causal": bool,
    "dtype": str,
    "error": {"rel_l2": float, "row_p95": float, "vs_mean_of_values": float},
    "heads": [{"layer": float, "head": float, "rel_l2": float}],
    "retained_mass": {"p50": float},
    "oracle_rel_l2": float,
    "density": float,
    "time": _TIME,
    "speedup": float,
    "select_s": float,
    "compile_s": float,
    "backward": _BACKWARD,
    "metrics": {},
    "pareto": bool,
}
_EVALUATED = _COMMON | {
    "perplexity": float,
    "tokens": float,
    "kl": float,
    "top1_agreement": float,
    "s_per_token": float,
    "speedup": float,
    "fallbacks": float,
    "impl": str,
}
_GROWN = {
    "mechanism": str,
    "input": str,
    "time_exponent": float,
    "memory_exponent": float,
    "backward_time_exponent": float,
    "backward_memory_exponent": float,
}
_NEEDED = {
    COMPARISON: ("mechanism", "input", "length", "causal", "dtype", "status"),
    EVALUATION: ("mechanism",),
}
# Fields of a manifest that say what was asked for, not under which conditions it was measured.
_ASKED = {"command", "started", "kind", "mechanisms", "settings", "inputs", "seed", "schema"}


@dataclass(frozen=True)
class Stored:
    """One file of results.

    Attributes:
        name: the path as it was given.
        kind: `comparison`, `growth` (of `bench`) or `evaluation`.
        rows: each with every field that is shown; null where the file has none.
        growth: the exponents that `bench` wrote.
        unfinished: whether this is a journal that no document was made of.
    """

    name: str
    kind: str
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    growth: list[dict[str, Any]]
    unfinished: bool

    def settings(self) -> list[list[dict[str, Any]]]:
        """The rows in groups that may be compared: one input, length, seed, dtype and mask."""
        return _grouped(self.rows, ("input", "causal", "dtype", "seed", "length"))

    def by_length(self) -> list[list[dict[str, Any]]]:
        """Groups that differ in nothing but their length, where they have two lengths or more."""
        groups = _grouped(self.rows, ("input", "causal", "dtype", "seed"))
        return [group for group in groups if len({row["length"] for row in group}) > 1]


def value(row: Row, *path: str) -> Any:
    """What stands at a path of fields; None where any of them is null."""
    found: Any = row
    for name in path:
        found = found.get(name) if found else None
    return found


def read(paths: Sequence[str | os.PathLike[str]]) -> list[Stored]:
    """The results in some files, in the order given.

    Raises:
        InvalidInputError: a file cannot be read, holds no results, or is given twice.
    """
    if not paths:
        raise InvalidInputError("report got no FILE; expected what a command wrote with --json")
    seen: dict[Path, str] = {}
    for given in paths:
        path = os.fspath(given)
        if Path(path).resolve() in seen:
            raise InvalidInputError(f"FILE got {path!r:.200} twice; give each file once")
        seen[Path(path).resolve()] = path
    return [_read(path) for path in seen.values()]


def differences(documents: Sequence[Stored]) -> list[str]:
    """The conditions, by name, that all the manifests state and that are not the same in all."""
    first, *others = [one.manifest for one in documents]
    names = [name for name in first if all(name in facts for facts in others)]
    return [
        name
        for name in names
        if name not in _ASKED and any(facts[name] != first[name] for facts in others)
    ]


def _grouped(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def _read(path: str) -> Stored:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InvalidInputError(f"FILE got {path!r:.200}, which cannot be read: {why}") from None
    document, unfinished = _parse(path, text)
    rows, manifest = document.get("rows"), document.get("manifest")
    if not isinstance(rows, list) or not isinstance(manifest, dict):
        raise _no_result(path, f"an object with the fields {', '.join(document) or 'none':.120}")
    if not rows:
        raise _no_result(path, "a document without rows")
    kind = EVALUATION if isinstance(rows[0], dict) and "perplexity" in rows[0] else COMPARISON
    shape = _EVALUATED if kind == EVALUATION else _COMPARED
    kept = []
    for number, row in enumerate(rows, 1):
        where = f"row {number} of {path!r:.200}"
        if not isinstance(row, dict) or any(row.get(name) is None for name in _NEEDED[kind]):
            raise _no_result(path, f"row {number} without {', '.join(_NEEDED[kind])}")
        row = _checked(row, shape, where)
        row["status"] = row["status"] or "ok"
        if row["status"] not in STATUSES:
            raise InvalidInputError(
                f"status in {where} got {row['status']!r:.80}; expected {', '.join(STATUSES)}"
            )
        kept.append(row)
    grown = document.get("growth")
    if grown is not None and kind == COMPARISON:
        kind = GROWTH
    growth = _checked(grown or [], [_GROWN], f"growth of {path!r:.200}")
    if kind == EVALUATION:
        _relate(kept)
    elif unfinished:
        from ..metrics import mark_pareto  # a journal's rows do not know one another yet

        mark_pareto(kept)
    return Stored(path, kind, plain(manifest), kept, growth, unfinished)


def _relate(rows: Sequence[dict[str, Any]]) -> None:
    """Set in the rows of an evaluation `relative_time`, over the original's in the same rounds (no
    other times took turns), and `pareto`: no other has less perplexity in as little of it."""
    spots = []
    for row in rows:
        speedup = row["speedup"] or 0
        row["relative_time"] = 1 / speedup if row["status"] == "ok" and speedup > 1e-100 else None
        if row["perplexity"] is not None and row["relative_time"] is not None:
            spots.append((row["perplexity"], row["relative_time"]))
    for row in rows:
        x, y = row["perplexity"], row["relative_time"]
        row["pareto"] = (x, y) in spots and not any(
            a <= x and b <= y and (a < x or b < y) for a, b in spots
        )


def _parse(path: str, text: str) -> tuple[dict[str, Any], bool]:
    """The document, and whether it is a journal: an object a line, its last line maybe cut off."""
    if not text.strip():
        raise _no_result(path, "an empty file")
    try:
        found = json.loads(text)
    except RecursionError:
        raise _no_result(path, "JSON nested too deep") from None
    except ValueError:
        found = None
    lines = text.splitlines(keepends=True)
    if found is None or (isinstance(found, dict) and "mechanism" in found):
        rows = [_line(path, line) for line in lines if line.endswith("\n") and line.strip()]
        if not rows:
            raise _no_result(path, "no JSON")
        manifest = rows[0].get("manifest")
        return {"manifest": manifest, "rows": rows}, True
    if not isinstance(found, dict):
        raise _no_result(path, f"a JSON {type(found).__name__}")
    return found, False


def _line(path: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise _no_result(path, "neither JSON nor a journal")
    return row


def _no_result(path: str, what: str) -> InvalidInputError:
    return InvalidInputError(
        f"FILE got {path!r:.200}, which holds {what}; expected what `compare`, `bench` or "
        "`evaluate` wrote with --json"
    )


def _checked(given: Any, shape: Any, where: str) -> Any:
    """`given` in the form of `shape`, with null for what is missing and for NaN.

    Raises:
        InvalidInputError: something has another type.
    """
    if given is None:
        return None
    if isinstance(shape, dict):
        _expect(isinstance(given, Mapping), "an object", given, where)
        if not shape:  # metrics: the names are the plugins'
            return {
                name: _checked(x, float, f"{name!r:.60} in {where}") for name, x in given.items()
            }
        return {
            name: _checked(given.get(name), part, f"{name} in {where}")
            for name, part in shape.items()
        }
    if isinstance(shape, list):
        _expect(isinstance(given, list), "a list", given, where)
        return [_checked(item, shape[0], where) for item in given if item is not None]
    if shape is float:
        _expect(
            isinstance(given, (int, float)) and not isinstance(given, bool),
            "a number",
            given,
            where,
        )
        found = plain(given)  # NaN and infinities are null
        # What no measurement gives would overflow the axes.
        _expect(found is None or abs(found) < 1e100, "a number below 1e100", given, where)
        return found
    words = {str: "a string", bool: "true or false"}
    _expect(isinstance(given, shape), words[shape], given, where)
    return given


def _expect(holds: bool, what: str, given: Any, where: str) -> None:
    if not holds:
        raise InvalidInputError(f"{where} got {given!r:.80}; expected {what}")
