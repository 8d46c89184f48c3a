"""The command line: what it prints, the JSON it writes, and its exit codes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sparseattn as sa
from sparseattn.cli import app, output, picture
from sparseattn.harness import store

ESCAPE = "\x1b"


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def run_json(*words: str, code: int = 0) -> Any:
    result = run(*words, "--json", "-")
    assert result.exit_code == code, result.output
    return strict(result.stdout)


def strict(text: str) -> Any:
    """JSON as RFC 8259 has it: Python's parser would let NaN through."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in JSON")

    return json.loads(text, parse_constant=refuse)


def subprocess_run(*words: str, path: Path | None = None, **env: str) -> Any:
    """The real entry point in a process of its own; `path` is put on PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if k != "SPARSEATTN_PLUGINS"} | env
    if path is not None:
        older = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *([older] if older else [])])
    code = "import sys; from sparseattn.cli import main; sys.argv[0] = 'sparseattn'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=300,
    )


def install(folder: Path, name: str, body: str) -> None:
    """A distribution with one plugin, as an installer leaves it."""
    (folder / f"{name}_plugin.py").write_text(body, encoding="utf-8")
    info = folder / f"{name}_dist-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[sparseattn]\n{name} = {name}_plugin:Plugin\n")


# --- help and start-up --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--help"], ["list", "--help"], ["show", "--help"], ["compare", "--help"]]
)
def test_help_imports_neither_torch_nor_rich_nor_a_plugin(words):
    code = (
        "import sys; from sparseattn.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    for module in ("torch", "numpy", "rich", "pluggy", "sparseattn_full"):
        assert f"'{module}'" not in done.stderr


def test_commands_of_this_version():
    text = run("--help").stdout
    for command in ("list", "show", "compare", "check", "bench", "doctor", "new"):
        assert f"\n  {command} " in text
        assert run(command, "--help").exit_code == 0
        assert "--json" in run(command, "--help").stdout


@pytest.mark.parametrize("words", [["nonsense"], ["list", "--nonsense"], ["show"], ["new"]])
def test_bad_usage_exits_with_two(words):
    assert run(*words).exit_code == 2


# --- list ---------------------------------------------------------------------------------------


def test_list_has_every_mechanism():
    text = run("list").stdout
    records = run_json("list")
    assert [r["name"] for r in records] == [r.name for r in sa.list_mechanisms()]
    for record, truth in zip(records, sa.list_mechanisms(), strict=True):
        assert record["status"] == "ok" and record["reason"] == ""
        assert (record["nature"], record["provider"]) == (truth.nature, truth.provider)
        assert record["looks_ahead"] is truth.looks_ahead
        assert list(record["options"]) == list(truth.options)
        assert record["name"] in text and record["nature"] in text
    windowed = next(r for r in records if r["name"] == "windowed")
    assert windowed["options"]["sinks"] == {"type": "int", "default": 0, "required": False}


def test_json_goes_to_a_file_whole_and_readable(tmp_path):
    target = tmp_path / "list.json"
    result = run("list", "--json", str(target))
    assert result.exit_code == 0
    assert "windowed" in result.stdout  # a file leaves the table on the screen
    assert strict(target.read_text()) == run_json("list")
    assert [p.name for p in tmp_path.iterdir()] == ["list.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("command", [["list"], ["doctor"], ["show", "full"], ["new", "fresh"]])
@pytest.mark.parametrize("place", ["", ".", "missing/x.json"])
def test_a_place_that_cannot_be_written_is_bad_usage(command, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*command, "--json", place)
    assert result.exit_code == 2
    assert "--json" in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- show ---------------------------------------------------------------------------------------


def test_show_says_what_a_mechanism_is():
    text = run("show", "windowed(window=7)").stdout
    for words in ("windowed(window=7, sinks=0)", "masked_softmax", "arXiv", "sinks", "segments"):
        assert words in text


def test_show_calls_are_what_the_mechanism_does():
    for name in ("full", "windowed", "linear", "vertical_slash"):
        record = run_json("show", name)
        mech = sa.mechanism(name)
        answers = {c["name"]: c for c in record["calls"]}
        q = torch.randn(1, 2, 12, 16)
        for word, value in (
            ("scale", 0.5),
            ("softcap", 30.0),
            ("sink_logits", torch.zeros(2)),
            ("bias", torch.zeros(1, 1, 1, 12)),
            ("return_lse", True),
        ):
            try:
                sa.attention(q, q, q, mech, causal=True, **{word: value})
                works = True
            except sa.UnsupportedCallError:
                works = False
            assert (answers[word]["status"] == "ok") is works, (name, word)
            assert bool(answers[word]["reason"]) is not works
            assert bool(answers[word]["impl"]) is works
        assert [i["name"] for i in record["implementations"]][-1] == "reference"


def test_show_a_mechanism_with_required_options_by_its_name():
    result = run("show", "block_sparse")
    assert result.exit_code == 0
    assert "layout" in result.stdout
    # A picture needs the mechanism itself.
    assert run("show", "block_sparse", "--length", "64").exit_code == 2


@pytest.mark.parametrize(
    "words",
    [
        ["show", "windowd"],
        ["show", "windowed(window=)"],
        ["show", "windowed(breadth=3)"],
        ["show", "windowed(window=0)"],
        ["show", "__import__('os')"],
        ["show", "full", "--length", "0"],
        ["show", "full", "--length", "1000000"],
        ["show", "full", "--length", "many"],
    ],
)
def test_errors_are_one_line_and_exit_two(words):
    result = run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    if "many" not in words:
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("spec", ["windowed(window=9, sinks=2)", "strided(stride=5)", "full"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 31, 64, 150])
def test_the_picture_counts_the_pairs(spec, causal, length):
    mech = sa.mechanism(spec)
    mask = mech.layout(sa.Grid(length, length, causal)).mask().double()
    drawn = picture.draw(mech, length, causal)
    allowed = length * (length + 1) // 2 if causal else length**2
    assert math.isclose(drawn.density, float(mask.sum()) / allowed)
    assert torch.equal(torch.from_numpy(drawn.fine), mask)  # a pixel a pair up to 1,024
    rows, columns = drawn.coarse.shape
    for r in range(rows):
        for c in range(columns):
            cell = mask[
                r * length // rows : (r + 1) * length // rows,
                c * length // columns : (c + 1) * length // columns,
            ]
            assert math.isclose(
                drawn.coarse[r, c],
                float(cell.mean()),
                abs_tol=cell.numel() * torch.finfo(torch.float64).eps,
            )
    lines = drawn.lines()
    for r, line in enumerate(lines[2 : 2 + rows]):
        for c, shade in enumerate(line[1:-1]):
            assert (shade == " ") is bool(drawn.coarse[r, c] == 0)


def test_the_picture_is_ascii_where_it_must_be():
    drawn = picture.draw(sa.mechanism("windowed(window=9)"), 64, True)
    assert all(line.isascii() for line in drawn.lines("ascii"))
    assert not all(line.isascii() for line in drawn.lines("utf-8"))


def test_a_dynamic_pattern_is_that_of_the_recorded_input():
    record = run_json("show", "topk_blocks(block=16, top=2)", "--length", "256")
    assert record["dynamic"] is True
    cells = record["pattern"]["cells"]
    assert len(cells) == 32 and len(cells[0]) == 64
    assert 0 < record["pattern"]["density"] < 0.6
    # More than the recorded input holds is refused, with the way out.
    assert run("show", "topk_blocks", "--length", "30000").exit_code == 2


def test_save_writes_an_image(tmp_path):
    image = pytest.importorskip("PIL.Image")
    target = tmp_path / "x.png"
    result = run("show", "windowed(window=3)", "--length", "40", "--save", str(target))
    assert result.exit_code == 0, result.output
    with image.open(target) as saved:
        zoom = saved.size[0] // 40
        assert saved.size == (40 * zoom, 40 * zoom)
        at = [[saved.getpixel((j * zoom, i * zoom)) == 0 for j in range(40)] for i in range(40)]
    assert at == [[0 <= i - j < 3 for j in range(40)] for i in range(40)]
    for bad in (tmp_path / "x.nonsense", tmp_path / "missing" / "x.png"):
        assert run("show", "full", "--length", "8", "--save", str(bad)).exit_code == 2


def test_save_without_pillow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = run("show", "full", "--length", "8", "--save", str(tmp_path / "x.png"))
    assert result.exit_code == 2
    assert "sparseattn[report]" in result.stderr


# --- doctor -------------------------------------------------------------------------------------


def test_doctor_has_plugins_devices_compilers_and_versions():
    records = run_json("doctor")
    kinds = {r["kind"] for r in records}
    assert kinds == {"plugin", "device", "compiler", "native", "version"}
    assert all({"name", "status", "reason", "distribution", "version"} <= set(r) for r in records)
    by_name = {(r["kind"], r["name"]): r for r in records}
    assert by_name["plugin", "windowed"]["status"] == "loaded"
    assert "windowed" in by_name["plugin", "windowed"]["mechanisms"]
    assert by_name["version", "torch"]["version"] == torch.__version__
    assert by_name["device", "cpu"]["status"] == "ok"


BROKEN = """
raise RuntimeError("\\x1b[31mno\\nway")
"""
LOUD = """
import sparseattn as sa
from dataclasses import dataclass
print("hello from a plugin")
@dataclass(frozen=True)
class Loud(sa.MaskedSoftmax):
    '''Words with [bold]brackets[/bold] and \\x1b[31mcodes.'''
    name = "loud"
    def visible(self, i, j):
        print("seen")
        return i == j
class Plugin:
    @sa.hookimpl
    def register_mechanisms(self, register):
        register(Loud)
"""


def test_a_broken_plugin_is_named_and_costs_nobody_else_anything(tmp_path):
    install(tmp_path, "wrecked", BROKEN)
    install(tmp_path, "loud", LOUD)
    done = subprocess_run("doctor", "--json", "-", path=tmp_path)
    assert done.returncode == 1, done.stderr
    plugins = {r["name"]: r for r in strict(done.stdout) if r["kind"] == "plugin"}
    assert plugins["wrecked"]["status"] == "broken"
    assert plugins["wrecked"]["distribution"] == "wrecked-dist"
    assert plugins["wrecked"]["version"] == "1.2"
    assert "RuntimeError" in plugins["wrecked"]["reason"]
    assert plugins["loud"]["status"] == plugins["full"]["status"] == "loaded"

    done = subprocess_run("doctor", path=tmp_path)
    assert done.returncode == 1
    assert ESCAPE not in done.stdout

    done = subprocess_run("list", path=tmp_path)
    assert done.returncode == 0
    assert ESCAPE not in done.stdout and "hello" not in done.stdout
    assert "[bold]brackets[/bold]" in done.stdout
    assert "wrecked" in done.stderr

    done = subprocess_run("doctor", "--json", "-", path=tmp_path, SPARSEATTN_PLUGINS="-wrecked")
    assert done.returncode == 0, done.stderr
    plugins = {r["name"]: r["status"] for r in strict(done.stdout) if r["kind"] == "plugin"}
    assert plugins["wrecked"] == "blocked"

    # A plugin that prints while it works does not get into the JSON.
    done = subprocess_run("show", "loud", "--length", "16", "--json", "-", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert strict(done.stdout)["pattern"]["density"] == pytest.approx(2 / 17)


def test_a_setting_that_names_no_plugin_is_a_warning_in_one_line():
    done = subprocess_run("list", SPARSEATTN_PLUGINS="full,nobody")
    assert done.returncode == 0
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "nobody" in warnings[0]
    assert ".py" not in done.stderr


# --- output -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["list"], ["show", "full", "--length", "32"], ["doctor"], ["--help"], ["show", "no"]]
)
def test_no_control_codes_when_piped(words):
    done = subprocess_run(*words, FORCE_COLOR="1", CLICOLOR_FORCE="1", TTY_COMPATIBLE="1")
    assert ESCAPE not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr


def test_a_terminal_that_has_ascii_only():
    done = subprocess_run("show", "windowed", "--length", "32", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


def test_plain_has_no_nan_and_no_objects():
    layout = sa.BlockLayout([0, 1], [0], 16)
    value = store.plain({"a": (1, math.nan, -math.inf), "b": layout, 3: {"c": None}})
    assert value == {"a": [1, None, None], "b": f"<{layout.digest}>", "3": {"c": None}}


def test_printable_keeps_words_and_no_control_codes():
    assert output.printable("a [b]\x1b[31m\nc é") == "a [b]\\x1b[31m c é"


def test_progress_is_silent_for_two_seconds_then_says_the_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    with output.Progress() as progress:
        now[0] += 1.9
        progress(1, 10, "early")
        assert capsys.readouterr().err == ""
        now[0] += 8.1
        progress(2, 10, "windowed")
        now[0] += 0.1
        progress(3, 10, "too soon after")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "2/10 windowed, about 40 s left\n"
