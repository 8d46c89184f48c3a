"""The comparison: honest rows, planted cheaters, journals that go on, and JSON without NaN."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import sparseattn as sa
from sparseattn.harness import run, setting, store
from sparseattn.harness.metrics import MeanOfValues

QUICK: dict[str, Any] = {"inputs": ["gaussian"], "lengths": [48], "runs": 3}


def honest(mechanism, q, k, v, call):
    w = mechanism.weights(q, k, call)
    return (w.unflatten(1, (call.kv_heads, -1)) @ v[:, :, None]).flatten(1, 2), None


class Planted(sa.Implementation):
    """An implementation whose `run` is given, and what it remembers between calls."""

    name = "planted"

    def __init__(self, act) -> None:
        self.act, self.memory, self.calls = act, {}, 0

    def run(self, mechanism, q, k, v, call):
        self.calls += 1
        return self.act(self, mechanism, q, k, v, call)


@dataclass(frozen=True)
class Near(sa.MaskedSoftmax):
    """The eight nearest keys, by the implementation under test."""

    name = "near"
    planted: ClassVar[Any] = None

    def visible(self, i, j):
        return (i - j).abs() < 8

    def implementations(self):
        return (type(self).planted,)


def mechanism(act, base: type = Near, **changes: Any) -> sa.Mechanism:
    body = {"name": f"near_{act.__name__}", "planted": Planted(act), "__doc__": act.__name__}
    return dataclass(frozen=True)(type(act.__name__, (base,), body | changes))()


def rows_of(*specs: Any, **given: Any) -> dict[str, dict[str, Any]]:
    result = run.compare(specs, **(QUICK | given))
    json.dumps(result, allow_nan=False)
    return {row["mechanism"].partition("(")[0]: row for row in result["rows"]}


# --- honest rows ----------------------------------------------------------------------------------


def test_a_row_has_every_field_and_controls_stand_beside():
    result = run.compare(["windowed(window=8)", "linear"], backward=True, **QUICK)
    assert set(result) == {"manifest", "rows"}
    rows = {row["mechanism"]: row for row in result["rows"]}
    assert list(rows) == ["full", "windowed(window=8, sinks=0)", "linear", "mean_of_values"]
    assert all(tuple(row) == store.ROW_FIELDS for row in result["rows"])
    assert [row["control"] for row in rows.values()] == [True, False, False, True]
    for row in rows.values():
        assert row["status"] == "ok", row["reason"]
        assert row["arithmetic"]["error"] <= row["arithmetic"]["budget"]
        assert row["time"]["runs"] == 3 and row["time"]["median_s"] > 0
        assert row["speedup"] == row["baseline_s"] / row["time"]["median_s"]
        for verdict in row["backward"]["arithmetic"].values():
            assert verdict["error"] <= verdict["budget"]
        assert row["backward"]["speedup"] > 0 and row["backward"]["status"] == "ok"
    assert rows["full"]["speedup"] == 1.0 and rows["full"]["error"]["rel_l2"] <= 1e-14
    assert rows["full"]["oracle_rel_l2"] is rows["linear"]["oracle_rel_l2"] is None
    window = rows["windowed(window=8, sinks=0)"]
    assert 0 < window["oracle_rel_l2"] < window["error"]["rel_l2"]
    used, allowed = sum(min(i + 1, 8) for i in range(48)), 48 * 49 / 2
    assert math.isclose(window["density"], used / allowed)
    assert rows["mean_of_values"]["error"]["vs_mean_of_values"] == 1.0
    assert rows["linear"]["retained_mass"] is None and "training" in rows["linear"]["notes"][0]


def test_the_manifest_says_how_it_was_measured():
    facts = run.compare(["full"], command="the command", seeds=[3], **QUICK)["manifest"]
    assert facts["command"] == "the command" and facts["seed"] == [3]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__ and facts["cpu"]
    assert {"commit", "gpu", "inputs", "dtype"} <= set(facts)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes(dtype):
    rows = rows_of("windowed(window=8)", "linear", dtype=dtype, backward=True)
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert {row["dtype"] for row in rows.values()} == {dtype}


def test_sampled_rows(monkeypatch):
    few = setting.checked_rows
    monkeypatch.setattr(setting, "checked_rows", lambda n, seed, **kw: few(n, seed, 16, 12))
    specs = "windowed(window=8)", "topk_blocks(block=4, top=2)", mechanism(forgets_dk)
    rows = rows_of(*specs, lengths=[96], backward=True)
    assert rows["windowed"]["status"] == rows["topk_blocks"]["status"] == "ok", rows
    assert rows["near_forgets_dk"]["status"] == "failed"


def test_refusals_are_no_failures():
    rows = rows_of("retention", "windowed(window=8)", causal=False)
    assert rows["retention"]["status"] == "unsupported"
    assert "causal" in rows["retention"]["reason"] and rows["retention"]["speedup"] is None
    assert rows["windowed"]["status"] == "ok"
    rows = rows_of("vertical_slash(last=4)", backward=True)
    assert rows["vertical_slash"]["status"] == "ok" and rows["vertical_slash"]["looks_ahead"]
    assert rows["vertical_slash"]["backward"]["status"] == "unsupported"
    assert rows["vertical_slash"]["select_s"] > 0


def test_a_row_worse_than_the_mean_says_so():
    rows = rows_of("retention", "full")
    assert rows["retention"]["error"]["vs_mean_of_values"] > 1
    assert "worse than the mean of the values" in rows["retention"]["notes"]
    assert not rows["full"]["notes"]


def test_bench_fits_exponents():
    result = run.bench(["full"], lengths=[32, 64], runs=2, backward=True)
    found = {record["mechanism"]: record for record in result["growth"]}
    assert found["full"]["lengths"] == [32, 64]
    assert found["full"]["time_exponent"] is not None
    assert found["full"]["backward_time_exponent"] is not None


@pytest.mark.parametrize(
    "given",
    [
        {"specs": ["nobody"]},
        {"inputs": ["nothing"]},
        {"inputs": ["recorded"], "lengths": [2049]},
        {"lengths": [0]},
        {"dtype": "int8"},
        {"impl": "nobody"},
        {"runs": 0},
        {"seeds": [-1]},
        {"seeds": []},
    ],
)
def test_bad_usage_raises_before_any_work(given):
    def progress(done, total, text):
        pytest.fail("work was begun")

    with pytest.raises(sa.SparseAttnError):
        run.compare(**({"specs": ["full"]} | QUICK | given), progress=progress)


# --- cheaters -------------------------------------------------------------------------------------


def replays(self, mechanism, q, k, v, call):
    return self.memory.setdefault("out", honest(mechanism, q, k, v, call))


def keeps_the_map(self, mechanism, q, k, v, call):
    w = self.memory.setdefault("map", mechanism.weights(q, k, call))
    return w @ v, None


def lags(self, mechanism, q, k, v, call):
    before, self.memory["out"] = self.memory.get("out"), honest(mechanism, q, k, v, call)
    return self.memory["out"] if before is None else before


def overwrites(self, mechanism, q, k, v, call):
    out, _ = honest(mechanism, q, k, v, call)
    return self.memory.setdefault("buffer", torch.empty_like(out)).copy_(out), None


def is_not_a_number(self, mechanism, q, k, v, call):
    return torch.full_like(q, math.nan), None


def mutates(self, mechanism, q, k, v, call):
    result = honest(mechanism, q, k, v, call)
    v.mul_(2)
    return result


def mutates_unseen(self, mechanism, q, k, v, call):
    result = honest(mechanism, q, k, v, call)
    k.data.mul_(2)  # leaves no trace in the version counter
    return result


def exits(self, mechanism, q, k, v, call):
    raise SystemExit(0)


def runs_out(self, mechanism, q, k, v, call):
    raise MemoryError("no more")


def halves(self, mechanism, q, k, v, call):
    return honest(mechanism, q, k, v, call)[0] * 0.5, None


def tires(self, mechanism, q, k, v, call):
    # Right while it is warmed up, wrong from then on.
    return honest(mechanism, q, k, v, call)[0] * (1.0 if self.calls <= 2 else 0.99), None


CHEATERS = [
    (replays, "arithmetic"),
    (keeps_the_map, "arithmetic"),
    (lags, "arithmetic"),
    (overwrites, "changed|wrote|written"),
    (is_not_a_number, "finite"),
    (mutates, "modified its input v"),
    (mutates_unseen, "modified its input k"),
    (exits, "SystemExit"),
    (runs_out, "MemoryError"),
    (halves, "arithmetic"),
    (tires, "arithmetic"),
]


@pytest.mark.parametrize(("act", "reason"), CHEATERS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_cheater_loses_its_own_row_and_shows_no_speed(act, reason):
    import re

    cheat = rows_of(mechanism(act), mechanism(honest_act))
    row, other = cheat[f"near_{act.__name__}"], cheat["near_honest_act"]
    assert row["status"] == "failed" and re.search(reason, row["reason"]), row["reason"]
    for name in ("time", "speedup", "peak_bytes"):
        assert row[name] is None
    assert not row["pareto"]
    assert other["status"] == "ok" and other["speedup"] > 0, other["reason"]


def honest_act(self, mechanism, q, k, v, call):
    return honest(mechanism, q, k, v, call)


def forgets_dk(self, mechanism, q, k, v, call):
    return honest(mechanism, q, k.detach(), v, call)


def doubles_dv(self, mechanism, q, k, v, call):
    return honest(mechanism, q, k, 2 * v - v.detach(), call)


@pytest.mark.parametrize(("act", "name"), [(forgets_dk, "dk"), (doubles_dv, "dv")])
def test_a_wrong_gradient_costs_the_speed(act, name):
    wrong = mechanism(act)
    row = rows_of(wrong)[f"near_{act.__name__}"]
    assert row["status"] == "ok"
    row = rows_of(wrong, backward=True)[f"near_{act.__name__}"]
    assert row["status"] == "failed" and name in row["reason"]
    assert row["speedup"] is None and row["time"] is None


def test_a_definition_that_contradicts_its_mask_is_found():
    def definition(self, q, k, call):
        w, lse = sa.MaskedSoftmax.definition(self, q, k, call)
        return w * (1 + 1e-9), lse

    def act(self, mechanism, q, k, v, call):
        return honest(mechanism, q, k, v, call)

    row = rows_of(mechanism(act, definition=definition))["near_act"]
    assert row["status"] == "failed" and "disagree" in row["reason"]


def test_ctrl_c_is_not_a_failed_row():
    def act(self, mechanism, q, k, v, call):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows_of(mechanism(act))


def test_plugins_inputs_and_metrics(monkeypatch):
    def broken(length, seed, causal):
        raise SystemExit("no data")

    def zeros(length, seed, causal):
        q = torch.randn(1, 2, length, 4, generator=torch.Generator().manual_seed(seed))
        return q, q + 1, torch.zeros_like(q)

    monkeypatch.setattr(run.registry, "inputs", lambda: {"broken": broken, "zeros": zeros})
    found = {"largest": lambda out, ref, call: (out - ref).abs().max(), "bad": lambda *a: 1 / 0}
    monkeypatch.setattr(run.registry, "metrics", lambda: found)
    result = run.compare(["windowed(window=4)"], **(QUICK | {"inputs": ["broken", "zeros"]}))
    json.dumps(result, allow_nan=False)
    for row in result["rows"]:
        if row["input"] == "broken":
            assert row["status"] == "failed" and "no data" in row["reason"]
        else:
            assert row["metrics"] == {"largest": 0.0, "bad": None}
            assert row["error"]["rows_left_out"] == 2 * 48
            assert any("metric bad" in note for note in row["notes"])


# --- journal --------------------------------------------------------------------------------------


def cut_off(path, after: int, specs, **given: Any) -> None:
    """A comparison that ends, as by ctrl-c, once `after` rows are done."""

    def progress(done, total, text):
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.compare(specs, journal=path, progress=progress, **(QUICK | given))


def test_resume_goes_on_and_measures_nothing_twice(tmp_path):
    path = tmp_path / "result.json.part"
    first, second = mechanism(honest_act), mechanism(halves)
    specs = [first, "windowed(window=8)", second]
    cut_off(path, 2, specs)
    with open(path, "ab") as file:
        file.write(b'{"mechanism": "cut o')  # the machine died in the middle of a line
    lines = path.read_bytes().splitlines(keepends=True)[:-1]
    before = [json.loads(line) for line in lines]
    assert [row["mechanism"] for row in before] == ["full", repr(first)]
    manifests = [row.pop("manifest") for row in before]
    assert manifests[0] == manifests[1] and manifests[0]["seed"] == [0]
    calls = type(first).planted.calls
    result = run.compare(specs, journal=path, resume=True, **QUICK)
    assert type(first).planted.calls == calls
    rows = result["rows"]
    assert [r["mechanism"] for r in rows] == [
        "full",
        repr(first),
        "windowed(window=8, sinks=0)",
        repr(second),
        "mean_of_values",
    ]
    for old, new in zip(before, rows, strict=False):
        assert {**old, "pareto": None} == {**new, "pareto": None}
    assert path.read_bytes().startswith(b"".join(lines))
    assert len(path.read_bytes().splitlines()) == 5
    again = run.compare(specs, journal=path, resume=True, **QUICK)
    assert again["rows"] == rows


@pytest.mark.parametrize(
    "change", [{"lengths": [40]}, {"runs": 2}, {"dtype": "float64"}, {"seeds": [5]}]
)
def test_another_manifest_is_refused(tmp_path, change):
    path = tmp_path / "r.part"
    cut_off(path, 1, ["full", "linear"])
    kept = path.read_bytes()
    with pytest.raises(sa.InvalidInputError, match="other conditions"):
        run.compare(["full", "linear"], journal=path, resume=True, **(QUICK | change))
    assert path.read_bytes() == kept


def test_a_journal_of_something_else_is_refused(tmp_path):
    path = tmp_path / "r.part"
    path.write_text("hello\nworld\n")
    with pytest.raises(sa.InvalidInputError, match="no JSON"):
        run.compare(["full"], journal=path, resume=True, **QUICK)
    path.write_text('{"a": 1}\n')
    with pytest.raises(sa.InvalidInputError, match="with its manifest"):
        run.compare(["full"], journal=path, resume=True, **QUICK)
    assert path.read_text() == '{"a": 1}\n'


def test_a_document_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "r.json"
    store.write(target, {"rows": [math.nan, math.inf, (1, 2.5)], "x": MeanOfValues()})
    assert json.loads(target.read_text()) == {"rows": [None, None, [1, 2.5]], "x": "mean_of_values"}

    class Bad:
        def __repr__(self):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.write(target, {"x": Bad()})
    assert json.loads(target.read_text())["rows"] and [p.name for p in tmp_path.iterdir()] == [
        "r.json"
    ]


def test_a_comparison_without_the_plugin_full():
    code = """
from sparseattn.harness import run
made = run.compare(None, inputs=["gaussian"], lengths=[32], runs=1)["rows"]
print([(row["mechanism"], row["status"], row["control"]) for row in made if row["control"]])
print(sorted({row["mechanism"].partition("(")[0] for row in made}))
"""
    environment = {**os.environ, "SPARSEATTN_PLUGINS": "linear"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    controls, names = done.stdout.splitlines()
    assert controls == "[('full', 'ok', True), ('mean_of_values', 'ok', True)]"
    assert names == "['full', 'linear', 'mean_of_values', 'performer', 'retention', 'taylor']"


def test_a_missing_implementation_loses_its_own_row_only():
    other = mechanism(honest_act)
    rows = run.compare([other, "windowed(window=8)"], impl="torch", **QUICK)["rows"]
    status = {row["mechanism"].partition("(")[0]: row["status"] for row in rows}
    assert status.pop(other.name) == "unsupported" and set(status.values()) == {"ok"}


def test_a_row_has_no_unknown_field():
    with pytest.raises(sa.InvalidInputError, match="speed"):
        store.new_row(speed=1.0)
