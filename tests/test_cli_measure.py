"""`compare`, `bench` and `check` on the command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from typing import Any

import pytest
from test_cli import ESCAPE, install, run, run_json, strict, subprocess_run

from sparseattn.cli import results

QUICK = ["--input", "gaussian", "--length", "96", "--runs", "2"]
ROW = {
    "mechanism",
    "nature",
    "impl",
    "input",
    "length",
    "causal",
    "dtype",
    "status",
    "reason",
    "error",
    "retained_mass",
    "arithmetic",
    "density",
    "time",
    "speedup",
    "peak_bytes",
    "pareto",
    "control",
    "oracle_rel_l2",
}

WRONG = """
import sparseattn as sa
from dataclasses import dataclass
class Fast(sa.Implementation):
    name = "fast"
    def run(self, mechanism, q, k, v, call):
        return v.repeat_interleave(call.groups, 1)[:, :, -call.n:] * 1.5, None
@dataclass(frozen=True)
class Wrong(sa.MaskedSoftmax):
    '''Itself only, by an implementation that is wrong.'''
    name = "wrong"
    def visible(self, i, j):
        return i == j
    def implementations(self):
        return (Fast(),)
class Plugin:
    @sa.hookimpl
    def register_mechanisms(self, register):
        register(Wrong)
"""


# --- compare ------------------------------------------------------------------------------------


def test_compare_writes_the_rows_of_the_contract():
    result = run_json("compare", "full", "windowed(window=16)", *QUICK)
    assert set(result) == {"manifest", "rows"}
    rows = result["rows"]
    assert all(set(row) >= ROW for row in rows)
    assert {(r["input"], r["length"], r["causal"], r["dtype"]) for r in rows} == {
        ("gaussian", 96, True, "float32")
    }
    by_name = {row["mechanism"]: row for row in rows}
    assert by_name["full"]["control"] is True
    assert by_name["full"]["error"]["rel_l2"] <= by_name["full"]["arithmetic"]["budget"]
    windowed = by_name["windowed(window=16, sinks=0)"]
    assert windowed["status"] == "ok" and windowed["error"]["rel_l2"] > 0
    assert windowed["time"]["runs"] == 2
    # Causal: row i sees min(i + 1, 16) of i + 1 keys.
    used = sum(min(i + 1, 16) for i in range(96))
    assert math.isclose(windowed["density"], used / (96 * 97 / 2))


def test_compare_options_repeat():
    words = ["--input", "gaussian", "--input", "needle", "--length", "48", "--length", "64"]
    rows = run_json("compare", "full", *words, "--no-causal", "--runs", "1")["rows"]
    found = {(r["input"], r["length"], r["causal"]) for r in rows}
    assert found == {(i, n, False) for i in ("gaussian", "needle") for n in (48, 64)}


def test_compare_prints_tables_and_keeps_a_file(tmp_path):
    target = tmp_path / "result.json"
    result = run("compare", "windowed(window=16)", "linear", *QUICK, "--json", str(target))
    assert result.exit_code == 0, result.output
    assert "gaussian, length 96, causal, float32" in result.stdout
    assert "windowed(window=16, sinks=0)" in result.stdout
    assert "pretrained softmax weights need training" in result.stdout
    assert ESCAPE not in result.stdout
    assert strict(target.read_text())["rows"]
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]  # no journal is left


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "nobody"],
        ["compare", "windowed(window=0)"],
        ["compare", "full", "--input", "nothing"],
        ["compare", "full", "--input", "missing.safetensors"],
        ["compare", "full", "--length", "0"],
        ["compare", "full", "--length", "1000000"],
        ["compare", "full", "--dtype", "int8"],
        ["compare", "full", "--device", "abacus"],
        ["compare", "full", "--device", "cuda:99"],
        ["compare", "full", "--impl", "nobody"],
        ["compare", "full", "--runs", "0"],
        ["compare", "full", "--resume"],
        ["compare", "full", "--resume", "--json", "-"],
        ["bench", "nobody"],
        ["bench", "full", "--dtype", "int8"],
        ["bench", "full", "--length", "-1"],
        ["check", "nobody"],
        ["check", "full", "--impl", "nobody"],
    ],
)
def test_bad_usage_exits_with_two_before_any_work(words):
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_wrong_implementation_fails_its_row_and_has_no_speed(tmp_path):
    install(tmp_path, "wrong", WRONG)
    words = ["compare", "wrong", "windowed(window=16)", *QUICK, "--json", "-"]
    done = subprocess_run(*words, path=tmp_path)
    assert done.returncode == 1, done.stderr
    rows = {row["mechanism"]: row for row in strict(done.stdout)["rows"]}
    assert rows["wrong"]["status"] == "failed" and rows["wrong"]["reason"]
    assert rows["wrong"]["speedup"] is None
    assert rows["windowed(window=16, sinks=0)"]["status"] == "ok"


def test_resume_goes_on_from_the_journal(tmp_path):
    target, journal = tmp_path / "r.json", tmp_path / "r.json.part"
    specs = [f"windowed(window={w})" for w in (3, 5, 9, 17)]
    words = ["compare", *specs, "--input", "gaussian", "--runs", "2", "--json", str(target)]
    words += [x for n in range(64, 320, 64) for x in ("--length", str(n))]
    code = "from sparseattn.cli import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 240
        while not (journal.is_file() and journal.read_bytes().count(b"\n") >= 7):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    assert not target.exists()
    kept = [json.loads(line) for line in journal.read_text().splitlines(True) if "\n" in line]
    medians = {row["time"]["median_s"] for row in kept if row.get("time")}
    assert medians
    result = subprocess_run(*words, "--resume")
    assert result.returncode == 0, result.stderr
    assert not journal.exists()
    rows = strict(target.read_text())["rows"]
    # What was measured before is not measured again: not one clock gives the same number twice.
    assert medians <= {row["time"]["median_s"] for row in rows if row["time"]}
    assert {row["length"] for row in rows} == set(range(64, 320, 64))
    keys = [(row["mechanism"], row["length"]) for row in rows]
    assert len(set(keys)) == len(keys)


# --- bench --------------------------------------------------------------------------------------


def test_bench_has_a_column_for_each_length():
    words = ["bench", "full", "windowed(window=16)", "--length", "64", "--length", "128"]
    result = run(*words, "--runs", "2")
    assert result.exit_code == 0, result.output
    assert "Median time" in result.stdout and "Peak memory" in result.stdout
    header = next(x for x in result.stdout.splitlines() if x.startswith("mechanism"))
    assert header.split()[1:3] == ["64", "128"]
    rows = run_json(*words, "--runs", "2", "--backward", "--dtype", "float64")["rows"]
    assert {row["length"] for row in rows} == {64, 128}
    assert {row["dtype"] for row in rows} == {"float64"}
    assert all(row["status"] == "ok" for row in rows)


# --- check --------------------------------------------------------------------------------------


def test_check_has_a_record_for_each_law():
    records = run_json("check", "full", "--impl", "reference")
    fields = {"name", "status", "reason", "law", "mechanism", "implementation", "case"}
    assert records and all(set(r) >= fields for r in records)
    assert len({r["law"] for r in records}) > 5
    assert not any(r["status"] == "failed" for r in records)
    assert any(r["status"] not in ("skipped",) for r in records)


def test_check_finds_a_wrong_implementation(tmp_path):
    install(tmp_path, "wrong", WRONG)
    done = subprocess_run("check", "wrong", "--impl", "fast", path=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed" in done.stdout and ESCAPE not in done.stdout
    done = subprocess_run("check", "wrong", "--impl", "fast", "--json", "-", path=tmp_path)
    assert done.returncode == 1
    assert any(r["status"] == "failed" and r["reason"] for r in strict(done.stdout))


# --- tables -------------------------------------------------------------------------------------


def row(**given: Any) -> dict[str, Any]:
    base = dict.fromkeys(ROW)
    base |= {"mechanism": "m", "nature": "masked_softmax", "input": "recorded", "length": 8}
    return base | {"causal": True, "dtype": "float32", "status": "ok", "reason": ""} | given


def test_a_row_says_what_its_reader_must_know(capsys):
    results.print_comparison(
        [
            row(mechanism="bad", notes=["worse than the mean of the values"]),
            row(mechanism="broken", status="failed", reason="error 3 is over its budget"),
            row(mechanism="other", notes=["another function", "a second note"]),
            row(mechanism="best", pareto=True, time={"median_s": 0.00123, "iqr_s": 2e-6}),
        ]
    )
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "worse than the mean of the values" in lines["bad"]
    assert "failed: error 3 is over its budget" in lines["broken"]
    assert "another function; a second note" in lines["other"]
    assert "1.23 ms" in lines["best"] and "2 us" in lines["best"] and "pareto" in lines["best"]
    assert "worse" not in lines["best"]


@pytest.mark.parametrize(
    ("value", "words"), [(None, "-"), (2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.2e-8, "42 ns")]
)
def test_seconds_in_words(value, words):
    assert results.seconds(value) == words
