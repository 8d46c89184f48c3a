"""Renders docs/performance.md from what is stored under `results/`: nothing there is typed in.

python benchmarks/cpu_page.py          # writes the page anew
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from gpu_page import RESULTS, rendered, table

from sparseattn.harness import store

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PARTS = {"targets": "targets.json", "choice": "choice.json"}


def _machine(facts: dict[str, Any]) -> str:
    versions = facts["versions"]
    words = (facts["cpu"], f"{facts['threads']} threads", f"torch {versions['torch']}")
    return f"{', '.join(words)}; commit `{facts['commit']}`."


def _targets(document: dict[str, Any]) -> str:
    races, limits = [], []
    for row in document["rows"]:
        if "ratio" not in row:
            value = row["value"]
            shown = "-" if value is None else f"{value:.2f}"
            verdict = "-" if value is None else "met" if value <= row["target"] else "over"
            limits.append([row["name"], shown, f"{row['target']:.2f}", verdict])
            continue
        low, high = row["quartiles"]
        target = row["target"]
        verdict = "-" if target is None else "met" if row["ratio"] >= target else "short"
        races.append(
            [
                *(row["name"], row["peer"], row["impl"], f"{row['ratio']:.2f}"),
                *(f"{low:.2f} - {high:.2f}", "-" if target is None else f"{target:.2f}", verdict),
            ]
        )
    header = ["call", "beside", "implementation", "times faster", "quartiles", "target", ""]
    return "\n\n".join(
        [
            _machine(document["manifest"]),
            table(header, races),
            table(["limit", "measured", "at most", ""], limits),
        ]
    )


def _choice(document: dict[str, Any]) -> str:
    rows = document["rows"]
    costs = [row["cost"] for row in rows]
    lines = [
        [
            *(f"`{row['mechanism']}`", row["dtype"], "yes" if row["backward"] else "no"),
            *(row["length"], f"{1e3 * row['torch_s']:.3f}", f"{1e3 * row['native_s']:.3f}"),
            *(row["chosen"], f"{row['cost']:.2f}"),
        ]
        for row in rows
    ]
    header = ["mechanism", "dtype", "gradients", "N", "torch ms", "native ms", "auto takes"]
    start = (
        f"{_machine(document['manifest'])} {len(rows)} cells: what auto takes costs "
        f"{statistics.median(costs):.2f} of the better implementation's time at the median, and "
        f"{max(costs):.2f} at worst."
    )
    return f"{start}\n\n{table([*header, 'cost'], lines)}"


_RENDER = {"targets": _targets, "choice": _choice}


def main() -> None:
    documents = {part: json.loads((RESULTS / name).read_text()) for part, name in PARTS.items()}
    store.write_text(PAGE, rendered(PAGE.read_text(), documents, _RENDER))


if __name__ == "__main__":
    main()
