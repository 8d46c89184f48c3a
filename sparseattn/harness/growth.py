"""How time and memory grow with length: exponents of fitted powers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exponents of growth of each mechanism and input; see `run.bench`."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["mechanism"], row["input"]), []).append(row)
    found = []
    for (mechanism, name), group in groups.items():
        record: dict[str, Any] = {"mechanism": mechanism, "input": name}
        record["lengths"] = sorted({row["length"] for row in group})
        for prefix, of in (("", lambda row: row), ("backward_", lambda row: row["backward"] or {})):
            times = [(r["length"], (of(r).get("time") or {}).get("median_s")) for r in group]
            peaks = [(r["length"], of(r).get("peak_bytes")) for r in group]
            record[f"{prefix}time_exponent"] = exponent(times)
            record[f"{prefix}memory_exponent"] = exponent(peaks)
        found.append(record)
    return found


def exponent(points: Sequence[tuple[float, float | None]]) -> float | None:
    """p of the least-squares line `y ~ x ** p`; None below two different x with y > 0."""
    logs = [(math.log(x), math.log(y)) for x, y in points if y is not None and x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x = math.fsum(x for x, _ in logs) / len(logs)
    mean_y = math.fsum(y for _, y in logs) / len(logs)
    spread = math.fsum((x - mean_x) ** 2 for x, _ in logs)
    return math.fsum((x - mean_x) * (y - mean_y) for x, y in logs) / spread
