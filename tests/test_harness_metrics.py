"""The harness's numbers on cases small enough to work out by hand, and on the recorded heads."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import sparseattn as sa
from sparseattn import reference
from sparseattn.call import AttentionCall
from sparseattn.harness import inputs, measure, metrics
from sparseattn.harness.growth import exponent


def sample(length: int = 48, heads: int = 4, kv_heads: int = 2, seed: int = 0, causal: bool = True):
    made = inputs.gaussian(length, seed, inputs.Shape(1, heads, kv_heads, 8))
    q, k, v = made.q.double(), made.k.double(), made.v.double()
    return q, k, v, AttentionCall.make(q, k, v, causal=causal)


# --- errors -------------------------------------------------------------------------------------


def test_row_errors_by_hand():
    ref = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]])[None, None].double()
    out = torch.tensor([[3.0, 4.0], [1.0, 1.0], [1.0, 2.0]])[None, None].double()
    errors, left_out = metrics.row_errors(out, ref)
    assert errors.tolist() == [0.0, 0.5] and left_out == 1
    record = metrics.approximation(out, ref, mean_error=0.5)
    assert record["rel_l2"] == pytest.approx(math.sqrt(3 / 29))
    assert record["row_p50"] == 0.25 and record["row_p95"] == pytest.approx(0.475)
    assert record["row_max"] == 0.5 and record["rows_left_out"] == 1
    assert record["vs_mean_of_values"] == pytest.approx(2 * math.sqrt(3 / 29))


def test_what_has_no_number_is_null():
    zero = torch.zeros(1, 1, 2, 2).double()
    record = metrics.approximation(torch.ones_like(zero), zero, mean_error=1.0)
    assert record["rel_l2"] is None and record["row_p50"] is None and record["row_max"] is None
    nan = metrics.approximation(torch.full_like(zero, math.nan), zero + 1, mean_error=1.0)
    assert nan["rel_l2"] is None and nan["vs_mean_of_values"] is None


@pytest.mark.parametrize("causal", [True, False])
def test_mean_of_values_is_the_mean_of_what_is_visible(causal):
    q, k, v, call = sample(causal=causal)
    mean = metrics.MeanOfValues()
    seen = [v[:, :, : i + 1] if causal else v for i in range(48)]
    expected = torch.stack([x.mean(2) for x in seen], 2).repeat_interleave(2, 1)
    for out in (
        reference.evaluate(mean, q, k, v, call)[0],
        sa.attention(q, k, v, mean, causal=causal),
    ):
        assert (out - expected).abs().max() <= 64 * metrics.EPS64 * v.abs().max()


# --- retained mass, oracle, identity --------------------------------------------------------------


def test_retained_mass_by_hand():
    # Equal logits: a row that keeps c of its i + 1 keys keeps c / (i + 1) of the mass.
    q, k, v, call = sample()
    k = torch.zeros_like(k)
    mech = sa.mechanism("windowed", window=4)
    out, _ = reference.evaluate(mech, q, k, v, call)
    inside = metrics.Exact(q, k, v, call).inside(mech, call, out)
    expected = [min(i + 1, 4) / (i + 1) for i in range(48)] * 4
    # A sum of 48 shares, each rounded, that is at most 1.
    assert np.abs(inside.mass - expected).max() <= 48 * metrics.EPS64
    assert inside.used == 4 * sum(min(i + 1, 4) for i in range(48))
    assert inside.allowed == 4 * 48 * 49 // 2


@pytest.mark.parametrize("keys", [1, 5, 200])
def test_the_oracle_of_a_row_is_oracle_top_k(keys):
    q, k, v, call = sample()
    mech = sa.mechanism("oracle_topk", keys=keys)
    call = mech.with_selection(q, k, call)
    out, _ = reference.evaluate(mech, q, k, v, call)
    inside = metrics.Exact(q, k, v, call).inside(mech, call, out)
    assert (inside.oracle - out).abs().max() <= 64 * metrics.EPS64 * v.abs().sum(2).max()


def test_the_oracle_keeps_at_least_as_much_mass():
    q, k, v, call = sample()
    exact = metrics.Exact(q, k, v, call)
    window = sa.mechanism("windowed", window=6)
    best = sa.mechanism("oracle_topk", keys=6)
    chosen = best.with_selection(q, k, call)
    masses = [
        exact.inside(m, c, reference.evaluate(m, q, k, v, c)[0]).mass
        for m, c in ((window, call), (best, chosen))
    ]
    assert (masses[1] >= masses[0] - 1e-14).all() and (masses[1] > masses[0]).any()


@pytest.mark.parametrize(
    "spec", ["full", "windowed(window=5)", "strided(stride=4)", "topk_blocks(block=4, top=2)"]
)
@pytest.mark.parametrize("causal", [True, False])
def test_the_identity_holds_for_masked_softmax(spec, causal):
    q, k, v, call = sample(causal=causal)
    mech = sa.mechanism(spec)
    call = mech.with_selection(q, k, call)
    out, _ = reference.evaluate(mech, q, k, v, call)
    assert metrics.Exact(q, k, v, call).inside(mech, call, out).consistent


def test_the_identity_can_fail():
    q, k, v, call = sample()
    mech, other = sa.mechanism("windowed", window=5), sa.mechanism("windowed", window=6)
    exact = metrics.Exact(q, k, v, call)
    wrong, _ = reference.evaluate(other, q, k, v, call)
    assert not exact.inside(mech, call, wrong).consistent  # another mask
    out, _ = reference.evaluate(mech, q, k, v, call)
    assert not exact.inside(mech, call, out * (1 + 1e-12)).consistent  # not renormalised
    assert not exact.inside(mech, call, out.clone().fill_(math.nan)).consistent


def test_errors_of_the_recorded_heads_are_those_of_the_table():
    # Heads 6 to 8 of data/README.md, which another script worked out (`record_inputs.py --facts`).
    made = inputs.source("recorded").make(2048, 0, True)
    q, k, v = made.q[:, 6:9].double(), made.k[:, 2:3].double(), made.v[:, 2:3].double()
    call = AttentionCall.make(q, k, v, causal=True)
    exact, _ = reference.exact(q, k, v, call)
    table = {
        sa.mechanism("windowed", window=256): (0.7049, 0.9891, 1.2462),
        sa.mechanism("windowed", window=252, sinks=4): (0.1668, 0.3834, 0.6774),
        metrics.MeanOfValues(): (1.0797, 1.1171, 1.1401),
    }
    for mech, expected in table.items():
        out, _ = reference.evaluate(mech, q, k, v, call)
        found = [metrics.relative_l2(out[:, h], exact[:, h]) for h in range(3)]
        # The table has four digits.
        assert all(abs(a - b) <= 0.5001e-4 for a, b in zip(found, expected, strict=True)), found


# --- rows, Pareto, growth -------------------------------------------------------------------------


def test_all_rows_are_checked_up_to_the_limit():
    assert metrics.checked_rows(4096, 0) is None
    rows = metrics.checked_rows(100_000, 3)
    assert len(rows) == 128 and rows.unique().tolist() == rows.tolist()
    assert {0, 99_999, 63, 64, 65} <= set(rows.tolist())
    assert metrics.checked_rows(100_000, 3).tolist() == rows.tolist()
    assert metrics.checked_rows(100_000, 4).tolist() != rows.tolist()


def pareto(points):
    common = {"input": "a", "length": 1, "dtype": "d", "causal": True, "seed": 0}
    rows = [
        {
            "status": status,
            "error": {"rel_l2": e},
            "time": None if t is None else {"median_s": t},
            **common,
        }
        for status, e, t in points
    ]
    metrics.mark_pareto(rows)
    return [row["pareto"] for row in rows]


def test_pareto():
    assert pareto([("ok", 0.0, 5.0), ("ok", 0.1, 1.0), ("ok", 0.1, 2.0), ("ok", 0.2, 1.0)]) == [
        True,
        True,
        False,
        False,
    ]
    assert pareto([("ok", 0.1, 1.0), ("ok", 0.1, 1.0)]) == [True, True]
    assert pareto([("failed", 0.0, 0.1), ("ok", 0.1, 1.0), ("ok", 0.0, None)]) == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_growth(power):
    points = [(n, 3e-4 * n**power) for n in (100, 1000, 5000)]
    assert exponent(points) == pytest.approx(power)
    assert exponent([*points, (64, None)]) == exponent(points)
    assert exponent([(100, 1.0), (100, 2.0), (200, None)]) is None


# --- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(inputs.GENERATED))
def test_generated_inputs_depend_on_the_seed_alone(name):
    source = inputs.source(name)
    first, again, other = (source.make(200, seed, True) for seed in (1, 1, 2))
    assert torch.equal(first.q, again.q) and torch.equal(first.v, again.v)
    assert not torch.equal(first.k, other.k)
    assert first.q.shape[2] == first.k.shape[2] == 200 and first.q.dtype == torch.float32


def mass_on(q, k, row):
    scores = q[0, 0, row] @ k[0, 0, : row + 1].T * q.shape[-1] ** -0.5
    return torch.softmax(scores, 0)


def test_the_needle_takes_the_mass_of_late_queries_and_the_sink_of_all():
    made = inputs.needle(512, 0)
    late = mass_on(made.q, made.k, 500)
    assert (
        late.max() > 0.9
        and 64 <= int(late.argmax()) < 256
        and mass_on(made.q, made.k, 100).max() < 0.9
    )
    made = inputs.sink_heavy(512, 0)
    assert all(mass_on(made.q, made.k, row)[0] > 0.5 for row in (1, 100, 511))


def test_recorded_is_cut_and_never_stretched(tmp_path):
    source = inputs.source("recorded")
    whole, short = source.make(2048, 0, True), source.make(100, 0, True)
    assert torch.equal(whole.q[:, :, :100], short.q) and short.v.shape == (1, 3, 100, 64)
    assert whole.scale is None and whole.provenance["sha256"] == source.sha256
    with pytest.raises(sa.InvalidInputError, match="sparseattn record"):
        source.check_length(2049)


def test_files_are_refused_in_words(tmp_path):
    from safetensors.torch import save_file

    good = torch.zeros(1, 2, 8, 4)
    save_file({"q": good, "k": good + 1}, tmp_path / "no_v.safetensors")
    with pytest.raises(sa.InvalidInputError, match="no tensor v"):
        inputs.source(tmp_path / "no_v.safetensors")
    save_file({"q": good, "k": good + 1, "v": good * math.nan}, tmp_path / "nan.safetensors")
    with pytest.raises(sa.InvalidInputError, match="NaN"):
        inputs.source(tmp_path / "nan.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(sa.InvalidInputError, match="cannot be read"):
        inputs.source(tmp_path / "text.safetensors")
    with pytest.raises(sa.InvalidInputError, match="gaussian"):
        inputs.source("gausian")


# --- memory ---------------------------------------------------------------------------------------


@dataclass
class Allocates:
    size: int

    def __call__(self) -> torch.Tensor:
        big = torch.ones(self.size // 4)
        return big[:1].clone()


@pytest.mark.parametrize("size", [2**25, 2**27])
def test_peak_memory_is_what_was_held_at_once(size):
    # In a process of its own: pages that other tests left to the heap would be counted or reused.
    code = f"""
import torch
from sparseattn.harness import measure

def allocate():
    big = torch.ones({size} // 4)
    return big[:1].clone()

measure.peak_bytes(allocate, torch.device("cpu"))
print(measure.peak_bytes(allocate, torch.device("cpu")))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # By resident pages, of which a few were there before; and Linux counts them in batches by
    # thread or core, so that a reading lags by up to a few hundred KiB.
    assert size - 2**20 <= int(run.stdout) <= 1.25 * size
    once = measure._allocator_peak(Allocates(size))
    assert size <= once <= size + 2**16
    # Twice one after the other is no more than once.
    twice = measure._allocator_peak(lambda: (Allocates(size)(), Allocates(size)()))
    assert twice <= size + 2**16
