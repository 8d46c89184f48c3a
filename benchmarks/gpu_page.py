"""Renders docs/gpu.md from what is stored under `results/`: nothing on that page is typed in.

python benchmarks/gpu_page.py          # writes the page anew
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_goals

from sparseattn.harness import store

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
# Each part of the page that is rendered, and the file that it comes from.
PARTS = {"compile": "gpu_compile.json", "model": "gpu_model.json", "measured": "gpu.json"}


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _tiles(row: dict[str, Any]) -> str:
    made = row["constants"]
    sizes = [made[word] for word in ("ROWS", "KEYS", "CHUNK", "STEP") if word in made]
    return " x ".join(map(str, sizes)) or "-"


def _span(values: list[Any]) -> str:
    least, most = min(values), max(values)
    return str(most) if least == most else f"{least}-{most}"


def _compiled(document: dict[str, Any]) -> str:
    """A table for each target; kernels that differ in options alone share a line."""
    rows = document["rows"]
    versions = sorted({row["triton"] for row in rows})
    found = []
    seconds = sum(row["seconds"] for row in rows if not row["failed"])
    found.append(
        f"{len(rows)} kernels with Triton {' and '.join(versions)}; compiling took "
        f"{seconds / 60:.0f} minutes of one core. Each line holds the kernels that differ in "
        "options alone (pattern, mask, softcap, heads of a group), of both versions: the range of "
        "registers of a thread, the most bytes that one spills, the most shared memory of a "
        "program, and the fewest tensor-core instructions."
    )
    for target in dict.fromkeys(row["target"] for row in rows):
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            if row["target"] == target:
                made = row["constants"]
                widths = tuple(made[word] for word in ("D", "DV") if word in made)
                key = (row["kernel"], row["dtype"], widths, _tiles(row), row["warps"])
                groups.setdefault((*key, row["stages"]), []).append(row)
        lines = []
        for (kernel, dtype, widths, tiles, warps, stages), members in groups.items():
            good = [row for row in members if not row["failed"]]
            counts = [sum(row["tensor_cores"].values()) for row in good]
            names = sorted({word for row in good for word in row["tensor_cores"]})
            lines.append(
                [
                    f"`{kernel}`",
                    dtype,
                    " / ".join(map(str, dict.fromkeys(widths))) or "-",
                    f"{tiles}, {warps}, {stages}",
                    f"{len(good)} of {len(members)}",
                    _span([row["registers"] for row in good]) if good else "-",
                    max((row["spilled_bytes"] for row in good), default="-"),
                    f"{max(row['shared_bytes'] for row in good) / 1024:.0f}" if good else "-",
                    f"{min(counts)} {'/'.join(names)}" if names else "none",
                ]
            )
        header = ["kernel", "dtype", "width", "tiles, warps, stages", "compiled", "registers"]
        header += ["spilled", "shared KiB", "tensor cores"]
        found += [f"### {target}", table(header, sorted(lines))]
    return "\n\n".join(found)


def _model(document: dict[str, Any]) -> str:
    header = ["kernel", "call", "GFLOP", "MB", "floor us", "binds", "waste", "predicted of roof"]
    lines = [
        [
            f"`{row['kernel']}`",
            row["call"],
            f"{row['flops'] / 1e9:.1f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['floor_us']:.1f}",
            row["binds"],
            f"{row['waste']:.2f}",
            f"{row['predicted_share']:.0%}",
        ]
        for row in document["rows"]
    ]
    roof = document["roof"]
    start = (
        f"The roof: {roof['flops_per_s'] / 1e12:.0f} TFLOP/s of matrix products and "
        f"{roof['bytes_per_s'] / 1e12:.1f} TB/s of memory, as one H100 measures them."
    )
    return f"{start}\n\n{table(header, lines)}"


def _measured(document: dict[str, Any] | None) -> str:
    if document is None:
        return "Nothing was measured yet: no `make gpu` has run on a machine with a GPU."
    facts = document["manifest"]
    roof = document["roof"]
    found = [
        f"{facts['device']}, commit `{facts['commit']}`. Measured first: "
        f"{roof['flops_per_s'] / 1e12:.0f} TFLOP/s of matrix products, copy "
        f"{roof['bytes_per_s'] / 1e12:.2f} TB/s, "
        f"reading {roof['read_bytes_per_s'] / 1e12:.2f} TB/s."
    ]
    checks = document["checks"]
    wrong = [row for row in checks if row["problem"]]
    found.append(f"{len(checks)} configurations checked against float64, {len(wrong)} wrong.")
    if wrong:
        found.append("\n".join(f"- {row['call']}: {row['problem']}" for row in wrong))
    goals = [
        [goal.goal, goal.asked, goal.found, "met" if goal.met else "short"]
        for goal in gpu_goals.goals(document)
    ]
    found.append(table(["goal", "asked for", "found", ""], goals))
    lines = []
    for row in document["rows"]:
        peers = {name: ms for name, ms in row["peers_ms"].items() if ms is not None}
        ratios = ", ".join(f"{name} {ms / row['ms']:.2f}x" for name, ms in peers.items())
        share = f"{row['share']:.0%}"
        lines.append([row["call"], f"{row['ms']:.3f}", share, row["binds"], ratios or "-"])
    header = ["call", "ms", "of the roof", "binds", "peers' time over ours"]
    return "\n\n".join([*found, table(header, lines)])


_RENDER: dict[str, Callable[..., str]] = {
    "compile": _compiled,
    "model": _model,
    "measured": _measured,
}


def read(part: str) -> dict[str, Any] | None:
    """What is stored for a part of the page; None where nothing is."""
    path = RESULTS / PARTS[part]
    return json.loads(path.read_text()) if path.exists() else None


def rendered(
    text: str,
    documents: dict[str, dict[str, Any] | None],
    render: dict[str, Callable[..., str]] = _RENDER,
) -> str:
    """A page's text with each part between its two marks rendered anew.

    Raises:
        ValueError: the page lacks a part's marks.
    """
    for part, document in documents.items():
        marks = rf"(<!-- {part} -->\n).*?(<!-- end of {part} -->)"
        if not re.search(marks, text, re.DOTALL):
            raise ValueError(f"the page has no marks of the part {part!r}: <!-- {part} -->")
        body = render[part](document)
        text = re.sub(
            marks, lambda m, body=body: f"{m[1]}\n{body}\n\n{m[2]}", text, flags=re.DOTALL
        )
    return text


def main() -> None:
    documents = {part: read(part) for part in PARTS}
    store.write_text(PAGE, rendered(PAGE.read_text(), documents))


if __name__ == "__main__":
    main()
