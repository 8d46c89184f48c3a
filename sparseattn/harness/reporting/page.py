"""The page: what was measured, what it came to, and under which conditions.

It loads nothing: scripts, style and data stand in it, and its content policy forbids all else and
any script but those two. Whatever comes from a file is escaped where it enters HTML or JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import InvalidInputError, SparseAttnError
from ..store import write_text
from . import charts, tables
from .charts import Chart
from .dots import perplexity
from .growth import growth
from .heads import by_head
from .scatter import ERROR_AND_TIME, PERPLEXITY_AND_TIME, scatter
from .stored import COMPARISON, EVALUATION, GROWTH, Row, Stored, differences, read
from .tables import escape

_KINDS = {
    COMPARISON: "Comparison with exact attention",
    GROWTH: "Growth with length",
    EVALUATION: "A model with each mechanism swapped in",
}
_KEY = "a header sorts; bold is on the Pareto front, italic a control"
_PROMISE = {
    COMPARISON: "what each attention mechanism loses against exact attention, and what it gains in "
    "time and memory",
    GROWTH: "how time and memory of each attention mechanism grow with the length of its input",
    EVALUATION: "what a language model loses with each attention mechanism swapped in",
}


def report(
    paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] = "report.html"
) -> list[dict[str, Any]]:
    """Write one self-contained HTML page about stored results.

    Args:
        paths: files that `compare`, `bench` or `evaluate` wrote with `--json`, or their journals.
        output: the page, written whole by rename; what was there is replaced.

    Returns:
        A record a file: `name`, `status` (`ok`), `reason` (empty), `kind`, `rows`, `failed`,
        `unsupported`, `charts` (their titles) and `output`.

    Raises:
        InvalidInputError: a file holds no results, or the page cannot stand at `output`; nothing
            is written then.
        SparseAttnError: altair or vl-convert-python is not installed.
    """
    target = os.fspath(output)
    check_output(target)
    documents = read(paths)
    if Path(target).resolve() in {Path(one.name).resolve() for one in documents}:
        raise InvalidInputError(f"--output got {target!r:.200}, which is one of the results")
    page = _Page(documents)
    text = page.text()
    try:
        write_text(target, text)
    except OSError as error:
        raise InvalidInputError(
            f"--output got {target!r:.200}, which cannot be written: {error.strerror}"
        ) from error
    return [
        {
            "name": one.name,
            "status": "ok",
            "reason": "",
            "kind": one.kind,
            "rows": len(one.rows),
            "failed": _count(one, "failed"),
            "unsupported": _count(one, "unsupported"),
            "charts": page.titles[one.name],
            "output": target,
        }
        for one in documents
    ]


def check_output(path: str) -> None:
    """Refuse a place that no page can be written to, before any work.

    Raises:
        InvalidInputError: it is a folder, or lies in none.
    """
    if not path or Path(path).is_dir():
        raise InvalidInputError(f"--output got {path!r:.200}, a folder; give the path of a file")
    if not Path(path).absolute().parent.is_dir():
        raise InvalidInputError(
            f"--output got {path!r:.200}, but there is no folder {str(Path(path).parent)!r:.200}"
        )


def _count(document: Stored, status: str) -> int:
    return sum(row["status"] == status for row in document.rows)


@lru_cache(maxsize=1)
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script."""
    try:
        import vl_convert
    except ImportError:
        raise SparseAttnError(
            "a report needs vl-convert-python, which is not installed: "
            "pip install 'sparseattn[report]'"
        ) from None
    version = charts.altair().SCHEMA_VERSION
    bundle = vl_convert.javascript_bundle(
        "window.vegaEmbed = vegaEmbed;", version.lstrip("v").rpartition(".")[0]
    )
    # No string in it may end the element it stands in.
    return bundle.replace("</script", "<\\/script")


def _own(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    found = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(found).decode()}'"


def _json(data: Any) -> str:
    """JSON that stands in an HTML element: ASCII, and without what could end or open one."""
    text = json.dumps(data, allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


class _Page:
    def __init__(self, documents: Sequence[Stored]) -> None:
        self.documents = documents
        self.specs: dict[str, dict[str, Any]] = {}
        self.titles: dict[str, list[str]] = {one.name: [] for one in documents}

    def text(self) -> str:
        kinds = list(dict.fromkeys(one.kind for one in self.documents))
        promise = "; ".join(_PROMISE[kind] for kind in kinds)
        body = "".join(self._file(at, one) for at, one in enumerate(self.documents, 1))
        bundle, own = _bundle(), _own("page.js")
        policy = (
            f"default-src 'none'; script-src {_digest(bundle)} {_digest(own)}; "
            "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
        )
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Attention mechanisms, measured</title>
<style>
{_own("page.css")}</style>
</head>
<body>
<header>
<h1>Attention mechanisms, measured</h1>
<p class="lede">This page shows {promise}.</p>
</header>
<main>
{self._overview()}{body}</main>
<footer>
<p>Made by sparseattn {escape(__version__)} from stored results alone; it loads nothing.
The charts are drawn by Vega, Vega-Lite and vega-embed (University of Washington Interactive Data
Lab, BSD 3-Clause), which stand in this page.</p>
</footer>
<noscript><p class="warning">The charts and the sorting of tables need JavaScript; every number is
in the tables.</p></noscript>
<script type="application/json" id="charts">{_json(self.specs)}</script>
<script>{bundle}</script>
<script>{own}</script>
</body>
</html>
"""

    def _overview(self) -> str:
        if len(self.documents) == 1:
            return ""
        items = "".join(
            f'<li><a href="#file-{at}">{_KINDS[one.kind]}</a>: {escape(one.name)}, '
            f"{_plural(len(one.rows), 'row')}</li>"
            for at, one in enumerate(self.documents, 1)
        )
        other = differences(self.documents)
        if other:
            listed = "".join(f"<li>{self._difference(name)}</li>" for name in other)
            said = (
                '<div class="warning"><p><strong>These files were measured under different '
                "conditions.</strong> Do not compare a number of one with a number of another; no "
                f"chart or table here mixes them. What differs:</p><ul>{listed}</ul></div>"
            )
        else:
            said = (
                "<p>The files name the same conditions, but their runs did not take turns: times "
                "are comparable within a file only, and no chart or table mixes two.</p>"
            )
        return f"<nav aria-label=Files><ul>{items}</ul></nav>\n{said}\n"

    def _difference(self, name: str) -> str:
        told = [json.dumps(one.manifest.get(name), ensure_ascii=False) for one in self.documents]
        return f"{escape(name)}: " + escape(" | ".join(text[:60] for text in told))

    def _file(self, at: int, document: Stored) -> str:
        parts = [f'<section id="file-{at}">\n<h2>{_KINDS[document.kind]}</h2>\n']
        parts.append(f'<p class="soft">{escape(_conditions(document))}</p>\n')
        if document.unfinished:
            parts.append(
                '<p class="warning">This is a journal: the command was cut off or is still '
                "running, and more rows were to come.</p>\n"
            )
        if document.kind == EVALUATION:
            parts.append(self._evaluation(document))
        else:
            for group in document.by_length():
                chart = growth(group)
                if chart is not None:
                    name = _setting(group[0], length=False)
                    parts.append(f"<h3>{escape(name)}</h3>\n{self._figure(document, chart, name)}")
            if document.growth:
                parts.append(tables.growth_table(document, "Fitted powers of the length N"))
            parts += [self._setting(document, group) for group in document.settings()]
        parts.append(_manifest(document))
        parts.append("</section>\n")
        return "".join(parts)

    def _setting(self, document: Stored, rows: list[dict[str, Any]]) -> str:
        name = _setting(rows[0])
        facts = tables.facts(document.kind, rows)
        found = [scatter(rows, ERROR_AND_TIME, facts), by_head(rows)]
        figures = [self._figure(document, chart, name) for chart in found if chart is not None]
        shown = tables.table(tables.columns(document.kind, rows), rows, f"{name}: {_KEY}")
        return f"<h3>{escape(name)}</h3>\n{_said(rows)}{''.join(figures)}{shown}"

    def _evaluation(self, document: Stored) -> str:
        rows = document.rows
        facts = tables.facts(document.kind, rows)
        found = [perplexity(rows), scatter(rows, PERPLEXITY_AND_TIME, facts)]
        figures = [self._figure(document, chart, "") for chart in found if chart is not None]
        shown = tables.table(tables.columns(document.kind, rows), rows, f"All rows: {_KEY}")
        return f"{_said(rows)}{''.join(figures)}{shown}"

    def _figure(self, document: Stored, chart: Chart, setting: str) -> str:
        name = f"chart-{len(self.specs) + 1}"
        self.specs[name] = {"wide": chart.wide, "narrow": chart.narrow}
        title = f"{chart.title}: {setting}" if setting else chart.title
        self.titles[document.name].append(title)
        return (
            f"<figure>\n<h4>{escape(chart.title)}</h4>\n<figcaption>{escape(chart.caption)}"
            f'</figcaption>\n<div class="chart" id="{name}" role="img" '
            f'aria-label="{escape(title)}; the numbers are in the table"></div>\n</figure>\n'
        )


def _plural(count: Any, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _setting(row: Row, length: bool = True) -> str:
    """What all rows of a group have in common, in words."""
    seed = "" if row["seed"] is None else f", seed {row['seed']:g}"
    size = f", {row['length']:,.0f} tokens" if length else ", all lengths"
    return (
        f"{row['input']}{size}, {'causal' if row['causal'] else 'not causal'}, {row['dtype']}{seed}"
    )


def _conditions(document: Stored) -> str:
    """File, machine, versions and time in one line."""
    facts = document.manifest
    versions = facts.get("versions")
    torch = versions.get("torch") if isinstance(versions, dict) else None
    said = [
        document.name,
        facts.get("model"),
        facts.get("gpu") or facts.get("cpu"),
        _plural(facts["threads"], "thread") if facts.get("threads") else None,
        f"torch {torch}" if torch else None,
        facts.get("started"),
        *(f"{n} {s}" for s in ("failed", "unsupported") if (n := _count(document, s))),
    ]
    return " · ".join(str(part) for part in said if part)


def _said(rows: Sequence[Row]) -> str:
    """What a reader must not miss, as a list; nothing where there is nothing."""
    names = charts.short_names(rows, 60)

    def listed(chosen: Iterator[Row] | list[Row]) -> str:
        return escape(", ".join(names[row["mechanism"]] for row in chosen))

    ok = [row for row in rows if row["status"] == "ok"]
    own = [row for row in rows if not row["control"]]
    sorts = [
        ("On the Pareto front: {}.", [r for r in ok if r.get("pareto")]),
        (
            '<span class="bad">Worse than the mean of the values</span>, which knows nothing of '
            "queries and keys: {}.",
            [r for r in own if tables.worse_than_the_mean(r, rows)],
        ),
        (
            "Another function than softmax, which pretrained weights need training for "
            "(<code>different_function</code>): {}.",
            [r for r in own if r["nature"] == "different_function"],
        ),
        (
            "Looks ahead: a later token may change an earlier output, so fit for prefill only: {}.",
            [r for r in own if r["looks_ahead"]],
        ),
    ]
    items = [words.format(listed(chosen)) for words, chosen in sorts if chosen]
    items += [
        f'<span class="{"bad" if row["status"] == "failed" else "soft"}">{row["status"]}</span>: '
        f"{escape(row['mechanism'])}: {escape(row['reason'] or 'no reason given')}"
        for row in rows
        if row["status"] != "ok"
    ]
    if not items:
        return ""
    return f'<ul class="said">{"".join(f"<li>{item}</li>" for item in items)}</ul>\n'


def _manifest(document: Stored) -> str:
    """Everything about the conditions, as it was stored."""
    command = document.manifest.get("command")
    made = f"<p>Measured by <code>{escape(command)}</code></p>\n" if command else ""
    lines = json.dumps(document.manifest, indent=2, ensure_ascii=False).splitlines()
    body = "\n".join(
        " " * (len(line) - len(line.lstrip())) + escape(line.lstrip()) for line in lines
    )
    return (
        f"{made}<details><summary>Manifest: every condition of this measurement</summary>"
        f"<pre>{body}</pre></details>\n"
    )
