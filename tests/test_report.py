"""`report`: one page from stored results, which loads nothing and says what must be said."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import report_pages
from report_pages import BROWSER, Page, browse, evaluated
from test_cli import run, strict

from sparseattn.errors import InvalidInputError, SparseAttnError
from sparseattn.harness.reporting import page as page_module
from sparseattn.harness.reporting import stored
from sparseattn.harness.reporting.page import report
from sparseattn.harness.run import bench, compare

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

SPECS = ["windowed(window=8)", "windowed(window=6, sinks=2)", "vertical_slash", "linear", "taylor"]
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
HOSTILE = [
    "</script><script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title = 'taken'\">",
    "\"'><svg onload=\"document.title = 'taken'\">",
    "<!--<script>",
    "]]>\u2028\u2029\x00\x1b[31m\u202e\ud800",
    "javascript:document.title='taken'",
    "{{constructor.constructor('document.title=1')()}} ${document.title=1} datum['x'] \\u003c",
    "&lt;b&gt; &amp;",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    return compare(SPECS, lengths=[64], runs=1, command="sparseattn compare")


@pytest.fixture(scope="module")
def grown() -> dict[str, Any]:
    return bench(["full", "linear"], lengths=[32, 64], runs=1, backward=True, command="bench")


@pytest.fixture(scope="module")
def files(folder: Path, compared: Any, grown: Any) -> list[Path]:
    """One file of each kind."""
    return [
        put(folder, name, document)
        for name, document in (("c", compared), ("g", grown), ("e", evaluated()))
    ]


@pytest.fixture(scope="module")
def whole(folder: Path, files: list[Path]) -> Path:
    """The page of one file of each kind."""
    report(files, folder / "whole.html")
    return folder / "whole.html"


def put(folder: Path, name: str, document: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def page_of(folder: Path, *documents: Any) -> Page:
    paths = [put(folder, f"r{at}", document) for at, document in enumerate(documents)]
    report(paths, folder / "page.html")
    return Page((folder / "page.html").read_text(encoding="utf-8"))


def datasets(spec: Any) -> list[list[dict[str, Any]]]:
    """The data of a chart, wherever they stand in it."""
    inner = list(spec.values()) if isinstance(spec, dict) else spec
    found = [data for x in inner if isinstance(x, (dict, list)) for data in datasets(x)]
    if isinstance(spec, dict) and "values" in (spec.get("data") or {}):
        found.append(spec["data"]["values"])
    return found


def points(page: Page, size: str) -> list[dict[str, Any]]:
    return [v for chart in page.charts.values() for data in datasets(chart[size]) for v in data]


def rows_of(page: Page) -> dict[str, str]:
    """The text of each row of the tables, by what stands in its first cell."""
    found: dict[str, str] = {}
    name = ""
    for element in page.elements:
        if element.tag == "th" and element.attributes.get("scope") == "row":
            name = element.text
            found[name] = ""
        elif element.tag == "td":
            found[name] += f" | {element.text}"
    return found


# --- what the page shows ------------------------------------------------------------------------


def test_every_kind_of_result_has_its_charts_and_tables(files, folder):
    records = report(files, folder / "kinds.html")
    assert [(r["kind"], r["rows"], r["failed"]) for r in records] == [
        ("comparison", 7, 0),
        ("growth", 6, 0),
        ("evaluation", 7, 1),
    ]
    drawn = [[title.partition(":")[0] for title in r["charts"]] for r in records]
    scatter = "Relative error against exact attention, and median time of a call"
    at_a_length = [scatter, "Error by layer and head"]
    assert drawn == [
        at_a_length,
        ["Time and memory against length", *at_a_length, *at_a_length],
        ["Perplexity by mechanism", "Perplexity, and time over the original's"],
    ]
    page = Page((folder / "kinds.html").read_text(encoding="utf-8"))
    assert len(page.charts) == sum(map(len, drawn))
    placed = [e.attributes["id"] for e in page.all("div") if e.attributes.get("role") == "img"]
    assert placed == list(page.charts)
    assert len(page.all("table")) == 5


def test_the_numbers_are_those_that_were_stored(compared, folder):
    page = page_of(folder, compared)
    shown = rows_of(page)
    keys = [float(e.attributes["data-v"]) for e in page.all("td") if "data-v" in e.attributes]
    for row in compared["rows"]:
        assert row["mechanism"] in shown
        assert row["error"]["rel_l2"] in keys and row["time"]["median_s"] in keys
        assert row["peak_bytes"] in keys
    values = [value for value in points(page, "wide") if "fact0" in value]
    assert [v["x"] for v in values] == [row["time"]["median_s"] for row in compared["rows"]]
    marked = {v["fact0"]: (v["control"], v["front"]) for v in values}
    assert marked == {r["mechanism"]: (r["control"], r["pareto"]) for r in compared["rows"]}


def test_what_a_reader_must_know_is_said(compared, folder):
    document = copy.deepcopy(compared)
    by_name = {row["mechanism"].partition("(")[0]: row for row in document["rows"]}
    for row in document["rows"]:
        row["error"]["vs_mean_of_values"] = 1.5 if row is by_name["taylor"] else 1.0
    by_name["linear"] |= {"status": "failed", "reason": "over its budget", "time": None}
    by_name["vertical_slash"] |= {"status": "unsupported", "reason": "no such call", "time": None}
    page = page_of(folder, document)
    assert "Not drawn, for want of a number: vertical_slash, linear." in page.words
    items = [" ".join(e.text.split()) for e in page.all("li")]
    assert ": linear: over its budget" in items
    assert ": vertical_slash(verticals=64, slashes=64, last=64): no such call" in items
    assert [e.text for e in page.all("span") if e.text in ("failed", "unsupported")] == [
        "unsupported",
        "failed",
    ]
    assert any("which knows nothing" in text and text.endswith(": taylor.") for text in items)
    assert any("Looks ahead" in text and text.endswith(": vertical_slash.") for text in items)
    assert any("Another function" in text and "linear, taylor" in text for text in items)
    assert "Worse than the mean of the values" in [e.text for e in page.all("span")]


def whole_text(folder: Path) -> str:
    return (folder / "page.html").read_text(encoding="utf-8")


def test_worse_than_the_mean_is_said_of_a_model_too(folder):
    items = [e.text for e in page_of(folder, evaluated()).all("li")]
    assert any("which knows nothing" in text and text.endswith("linear.") for text in items)
    assert any(
        text.endswith("performer: ArithmeticError: its logits are not finite") for text in items
    )


def test_a_model_is_timed_against_the_original_of_the_same_rounds(folder):
    page = page_of(folder, evaluated())
    shown = {v["fact0"]: v for v in points(page, "wide") if "fact0" in v}
    assert {name: v["x"] for name, v in shown.items()} == {
        row["mechanism"]: 1 / row["speedup"] for row in evaluated()["rows"] if row["speedup"]
    }
    # `windowed` with sinks is faster than the rest and worse than the exact ones only.
    front = {name for name, v in shown.items() if v["front"]}
    assert front == {"original", "windowed(window=60, sinks=4)"}


def test_the_worst_head_is_named(compared, folder):
    document = copy.deepcopy(compared)
    row = next(r for r in document["rows"] if r["mechanism"] == "linear")
    row["heads"] = [{"layer": 3, "head": h, "rel_l2": [0.2, 0.9, None][h]} for h in range(3)]
    assert "layer 3, head 1: 0.9" in rows_of(page_of(folder, document))["linear"]


def test_null_and_nan_are_a_dash(compared, folder):
    document = copy.deepcopy(compared)
    row = document["rows"][1]
    row |= {"error": None, "heads": None, "density": float("nan"), "peak_bytes": float("inf")}
    page = page_of(folder, document)
    assert " | - | " in rows_of(page)[row["mechanism"]]
    assert not re.search(
        r"\b(nan|inf|null|None|Infinity)\b", " ".join(rows_of(page).values()), re.I
    )
    json.dumps(page.charts, allow_nan=False)


def test_conditions_that_differ_are_said_and_never_mixed(compared, folder):
    other = copy.deepcopy(compared)
    other["manifest"]["threads"] = 77
    page = page_of(folder, compared, other)
    assert "measured under different conditions" in page.words
    assert any(e.text == "threads: 1 | 77" for e in page.all("li")) or "| 77" in page.words
    sections = [e.attributes["id"] for e in page.all("section")]
    assert sections == ["file-1", "file-2"] and len(page.charts) == 4
    for chart in page.charts.values():  # the rows of one file each
        assert all(len(data) <= len(compared["rows"]) * 9 for data in datasets(chart["wide"]))
    same = page_of(folder, compared, compared)
    assert "measured under different" not in same.words
    assert "did not take turns" in same.words


def test_settings_are_apart_within_a_file(compared, folder):
    document = copy.deepcopy(compared)
    other = copy.deepcopy(compared["rows"])
    for row in other:
        row["input"], row["dtype"] = "gaussian", "float64"
    document["rows"] += other
    page = page_of(folder, document)
    assert [e.text for e in page.all("h3")] == [
        "recorded, 64 tokens, causal, float32",
        "gaussian, 64 tokens, causal, float64",
    ]
    assert len(page.charts) == 4


def test_a_journal_is_shown_as_unfinished(compared, folder):
    lines = [json.dumps({**row, "manifest": compared["manifest"]}) for row in compared["rows"]]
    for text in ("\n".join(lines[:3]) + "\n" + lines[3][:40], lines[0] + "\n"):
        path = put(folder, "journal", text)
        (record,) = report([path], folder / "page.html")
        assert record["rows"] == text.count("\n")
        page = Page(whole_text(folder))
        assert "This is a journal" in page.words
    assert "This is a journal" not in page_of(folder, compared).words


# --- nothing is loaded, and nothing breaks out --------------------------------------------------


def test_the_page_loads_nothing(whole):
    text = whole.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    used = {name for e in page.elements for name in e.attributes}
    assert not used & {
        "src",
        "srcset",
        "action",
        "formaction",
        "data",
        "background",
        "ping",
        "style",
    }
    assert all(
        e.attributes["href"].startswith("#") for e in page.elements if "href" in e.attributes
    )
    assert not {e.tag for e in page.elements} & {"link", "iframe", "img", "object", "embed", "base"}
    for style in page.all("style"):
        assert "url(" not in style.text and "@import" not in style.text
    data, bundle, own = page.all("script")
    assert data.attributes["type"] == "application/json"
    assert not re.search(r"\b(import|fetch|XMLHttpRequest|WebSocket|eval)\b\s*\(", own.text)
    rest = text.replace(bundle.text, "")  # the library names addresses that it does not load
    assert "http://" not in rest and "https://" not in rest and "//cdn" not in rest


def test_the_content_policy_forbids_all_but_the_two_scripts(whole):
    page = Page(whole.read_text(encoding="utf-8"))
    (policy,) = [e.attributes for e in page.all("meta") if "http-equiv" in e.attributes]
    rules = dict(rule.strip().split(" ", 1) for rule in policy["content"].split(";"))
    digests = [
        f"'sha256-{base64.b64encode(hashlib.sha256(e.text.encode()).digest()).decode()}'"
        for e in page.all("script")
        if "type" not in e.attributes
    ]
    assert rules["script-src"].split() == digests and len(digests) == 2
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert page.elements.index(page.all("meta")[1]) < page.elements.index(page.all("script")[0])


def renamed(document: Any, names: list[str]) -> Any:
    """The document with every text that a stranger may choose, names of metrics too, replaced."""
    found = copy.deepcopy(document)
    for at, row in enumerate(found["rows"]):
        name = names[at % len(names)]
        text = f"{name}{at}"
        row |= {"mechanism": text, "reason": text, "notes": [text], "nature": name, "impl": text}
        row |= {"metrics": {name: 1.5}}
        if "input" in row:
            row |= {"input": names[-1], "dtype": names[0]}
        if at % 3 == 2:
            row["status"] = "failed"
    for at, record in enumerate(found.get("growth", [])):
        record["mechanism"] = record["input"] = names[at % len(names)]
    for name in names:
        found["manifest"][name] = {name: [name]}
    found["manifest"] |= dict(
        zip(("command", "cpu", "started", "threads"), names * 4, strict=False)
    )
    return found


def test_hostile_names_are_only_text(compared, grown, folder):
    documents = [compared, grown, evaluated()]
    words = [f"calm {at}" for at in range(len(HOSTILE))]
    calm = page_of(folder, *(renamed(document, words) for document in documents))
    page = page_of(folder, *(renamed(document, HOSTILE) for document in documents))
    assert not page.open
    assert [e.tag for e in page.elements] == [e.tag for e in calm.elements]
    assert [set(e.attributes) for e in page.elements] == [set(e.attributes) for e in calm.elements]
    assert page.charts.keys() == calm.charts.keys()
    raw = whole_text(folder)
    assert all(letter not in raw for letter in "\u2028\u2029\x00\x1b\u202e")
    inside = raw.partition('id="charts">')[2].partition("</script>")[0]
    assert not set("<>&") & set(inside)
    shown = rows_of(page)
    for at, name in enumerate(HOSTILE[:4]):
        assert f"{name}{at}" in shown


def test_every_chart_is_valid_vega_lite(whole):
    altair = pytest.importorskip("altair")
    for chart in Page(whole.read_text(encoding="utf-8")).charts.values():
        for spec in chart.values():
            altair.Chart.from_dict(spec)  # validates
    with pytest.raises(Exception, match="bounds"):
        altair.Chart.from_dict({**spec, "bounds": 3})


def test_names_are_no_expressions(compared, folder):
    name = "'] || datum['"
    for chart in page_of(folder, renamed(compared, [name])).charts.values():
        for spec in chart.values():
            for data in datasets(spec):
                data.clear()
            assert name not in json.dumps(spec)


# --- refused before anything is written ---------------------------------------------------------

ROW = {"mechanism": "m", "input": "i", "length": 8, "causal": True, "dtype": "float32"}
ROW |= {"status": "ok"}


def refusals() -> dict[str, tuple[str, str]]:
    def one(**given: Any) -> str:
        return json.dumps({"manifest": {}, "rows": [ROW | given]})

    return {
        "empty": ("", "an empty file"),
        "blank": (" \n", "an empty file"),
        "no JSON": ("hello\nworld\n", "neither JSON nor a journal"),
        "cut off": ('{"manifest": {', "no JSON"),
        "deep": ("[" * 100000, "nested too deep"),
        "a list": ("[]", "a JSON list"),
        "another document": ('{"a": 1}', "the fields a"),
        "no rows": ('{"manifest": {}, "rows": []}', "without rows"),
        "no manifest": ('{"rows": [{}]}', "the fields rows"),
        "rows of another kind": ('{"manifest": {}, "rows": [3]}', "row 1 without mechanism"),
        "records of list": ('[{"name": "full", "status": "ok"}]', "a JSON list"),
        "a row without input": (
            json.dumps({"manifest": {}, "rows": [{"mechanism": "m"}]}),
            "row 1",
        ),
        "a name that is no string": (one(mechanism=3), "mechanism in row 1"),
        "a number that is none": (one(time={"median_s": "fast"}), "median_s in time in row 1"),
        "true for a number": (one(error={"rel_l2": True}), "expected a number"),
        "a huge number": (one(length=10**400), "expected a number below 1e100"),
        "a list for an object": (one(error=[1]), "expected an object"),
        "a word for a list": (one(notes="a"), "expected a list"),
        "another status": (one(status="fine"), "expected ok, failed, unsupported"),
        "a metric that is no number": (one(metrics={"x": {}}), "expected a number"),
        "growth that is none": (json.dumps({"manifest": {}, "rows": [ROW], "growth": 3}), "a list"),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_is_no_result_is_refused(case, tmp_path):
    text, words = refusals()[case]
    path = put(tmp_path, "given", text)
    with pytest.raises(InvalidInputError, match=re.escape(words)) as caught:
        report([path], tmp_path / "page.html")
    assert "given.json" in str(caught.value) and len(str(caught.value)) < 600
    assert [p.name for p in tmp_path.iterdir()] == ["given.json"]


def test_bad_usage_exits_with_two_and_writes_nothing(files, tmp_path):
    result, binary = str(files[0]), tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    before = files[0].read_bytes()
    for words in (
        [],
        [str(tmp_path)],
        [str(tmp_path / "missing.json")],
        [str(binary)],
        [result, result],
        [result, "--output", str(tmp_path)],
        [result, "--output", ""],
        [result, "--output", str(tmp_path / "no" / "page.html")],
        [result, "--output", result],
        [result, "--output", str(tmp_path / "x"), "--json", str(tmp_path / "x")],
        [result, "--output", str(tmp_path / "page.html"), "--json", str(tmp_path)],
        [result, "--output", str(tmp_path / "page.html"), "--json", result],
    ):
        done = run("report", *words)
        assert done.exit_code == 2, (words, done.output)
        assert done.stdout == "" and done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [binary] and files[0].read_bytes() == before


def test_the_command_writes_the_page_and_its_records(files, tmp_path):
    target = tmp_path / "page.html"
    target.write_text("an older page")
    done = run("report", *map(str, files), "--output", str(target), "--json", "-")
    assert done.exit_code == 0, done.output
    records = strict(done.stdout)
    assert [r["name"] for r in records] == [str(path) for path in files]
    assert {r["status"] for r in records} == {"ok"} and {r["output"] for r in records} == {
        str(target)
    }
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [target]  # nothing is left of the writing
    done = run("report", str(files[0]), "--output", str(target))
    assert done.exit_code == 0 and "7 rows" in done.stdout and f"wrote {target}" in done.stdout


@pytest.mark.parametrize("name", ["altair", "vl_convert"])
def test_what_is_not_installed_is_named(name, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    page_module._bundle.cache_clear()
    with pytest.raises(SparseAttnError, match=r"pip install 'sparseattn\[report\]'"):
        report(files, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_damaged_document_is_shown_or_refused_in_words(compared, tmp_path):
    """No damage to one value leads to anything but a page or a typed error."""
    chance = random.Random(0)
    odd = [None, [], {}, "", "x", -1, 0, 1e308, 5e-324, -1e308, float("nan"), True, [None], [{}]]
    refused = 0
    for _ in range(400):
        document = copy.deepcopy(compared)
        place: Any = chance.choice(document["rows"])
        while True:
            key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key] or chance.random() < 0.3:
                break
            place = place[key]
        place[key] = chance.choice(odd)
        try:
            (read,) = stored.read([put(tmp_path, "odd", document)])
        except InvalidInputError:
            refused += 1
        else:
            assert len(read.rows) == len(document["rows"])
    assert 0 < refused < 400


@pytest.mark.parametrize("error", [0.0, 5e-324, 9e99, -1.0])
@pytest.mark.parametrize("alike", [True, False])
def test_any_number_has_a_chart(error, alike, compared, folder):
    document = copy.deepcopy(compared)
    for row in document["rows"] if alike else document["rows"][1:2]:
        row["error"]["rel_l2"] = row["time"]["median_s"] = row["peak_bytes"] = error
        row["heads"] = [one | {"rel_l2": error} for one in row["heads"]]
    json.dumps(page_of(folder, document).charts, allow_nan=False)


def test_rows_hold_heads(compared, grown):
    layers = [one["layer"] for one in compared["rows"][1]["heads"]]
    assert layers == [2, 2, 2, 10, 10, 10, 23, 23, 23]
    assert [one["layer"] for one in grown["rows"][0]["heads"]] == [None] * 8


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, report_pages.Seen]:
    """The page in light and in dark, and narrow."""
    profiles = tmp_path_factory.mktemp("profiles")
    views: dict[str, dict[str, Any]] = {
        "light": {},
        "dark": {"dark": True},
        "narrow": {"width": 500},
    }
    return {name: browse(whole, profiles / name, **view) for name, view in views.items()}


@needs_browser
@pytest.mark.parametrize("view", ["light", "dark", "narrow"])
def test_a_browser_draws_every_chart_without_complaint(view, seen, whole):
    assert seen[view].complaints == []
    charts = Page(whole.read_text(encoding="utf-8")).charts
    drawn = re.findall(
        r'<div class="chart[^"]*" id="([^"]+)".*?<svg(.*?)</svg>', seen[view].dom, re.S
    )
    assert [name for name, _ in drawn] == list(charts)
    assert all(svg.count("<path") > 5 and "NaN" not in svg for _, svg in drawn)
    assert 'data-drawn="yes"' in seen[view].dom
    for name in ("full", "mean_of_values"):
        assert re.search(rf"<text[^>]*>{name}", drawn[0][1])


@needs_browser
def test_letters_stand_out_from_the_paper_in_both_schemes(seen, whole):
    style = Page(whole.read_text(encoding="utf-8")).all("style")[0].text
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w+);", part))
        for part in style.split("@media (prefers-color-scheme: dark)")
    )
    for view, colours in (("light", light), ("dark", dark)):
        svg = "".join(re.findall(r"<svg.*?</svg>", seen[view].dom, re.S))
        fills = set(re.findall(r'<text[^>]*fill="([^"]+)"', svg))
        assert colours["ink"] in fills and colours["soft"] in fills
        assert colours["c1"] in svg and contrast(colours["ink"], colours["paper"]) >= 7
        cells = {"#111", "#fff"}  # letters on the heat map, whose colours do not change
        for fill in fills - cells - {colours["paper"]}:  # paper: the halo behind a name
            assert contrast(fill, colours["paper"]) >= 4.5, (view, fill)
        lines = [colours[f"c{at}"] for at in range(1, 8)]  # the names of lines have their colours
        assert min(contrast(colour, colours["paper"]) for colour in lines) >= 4.5
    assert contrast("#ffffff", "#000000") == pytest.approx(21)


def contrast(a: str, b: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


CLICKS = """
<script>
const table = document.querySelector("table.sortable");
const found = [];
for (const [title, times] of [["error", 1], ["error", 2], ["mechanism", 1]]) {
  const head = [...table.tHead.rows[0].cells].find((h) => h.textContent === title);
  const at = head.cellIndex;
  head.removeAttribute("aria-sort");
  const cells = () => [...table.tBodies[0].rows].map((row) => row.cells[at]);
  head.querySelector("button").focus();
  for (let n = 0; n < times; n++) document.activeElement.click();
  found.push([title, times, document.querySelectorAll("[aria-sort]").length,
    head.getAttribute("aria-sort"), cells().map((cell) => cell.textContent),
    cells().map((cell) => cell.dataset.v ?? null)]);
}
const said = document.createElement("pre");
said.id = "said";
said.textContent = JSON.stringify(found);
document.body.append(said);
</script>
"""


@needs_browser
def test_headers_sort_in_a_browser(compared, folder, tmp_path):
    document = copy.deepcopy(compared)
    document["rows"][2]["error"] = None
    page_of(folder, document)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", whole_text(folder))
    (folder / "clicked.html").write_text(text + CLICKS)
    view = browse(folder / "clicked.html", tmp_path)
    assert view.complaints == []
    (said,) = [e.text for e in Page(view.dom).all("pre") if e.attributes.get("id") == "said"]
    up, down, names = json.loads(said)
    stored_errors = sorted(r["error"]["rel_l2"] for r in document["rows"] if r["error"])
    for (_, _, sorts, direction, cells, keys), errors, word in (
        (up, stored_errors, "ascending"),
        (down, stored_errors[::-1], "descending"),
    ):
        assert sorts == 1 and direction == word
        assert [float(key) for key in keys[:-1]] == errors
        assert cells[-1] == "-" and keys[-1] is None  # what has no value stays last
    assert names[4] == sorted(names[4], key=str.casefold)


@needs_browser
def test_hostile_names_do_nothing_in_a_browser(compared, grown, folder, tmp_path):
    """Without the policy that would stop them anyway."""
    documents = [renamed(document, HOSTILE) for document in (compared, grown, evaluated())]
    page_of(folder, *documents)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", whole_text(folder))
    (folder / "hostile.html").write_text(text)
    view = browse(folder / "hostile.html", tmp_path)
    assert view.complaints == []
    assert "<title>Attention mechanisms, measured</title>" in view.dom
    assert 'data-drawn="yes"' in view.dom
