"""The laws that every mechanism keeps, and what these alone must do."""

from __future__ import annotations

import pytest
import torch
from sparseattn_logsparse import LogSparse, MirroredSoftmax, cosine, delayed

import sparseattn as sa
from sparseattn.testing import assert_mechanism, parametrize_with_checks


# Small options, so that short inputs have pairs both in and out of the pattern.
@parametrize_with_checks([LogSparse(near=3), MirroredSoftmax()])
def test_conformance(check):
    check()


def test_the_implementation_of_chunked_conforms():
    assert_mechanism("chunked(chunk=5)", impl="by_chunk")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (40, 40), (3, 70), (70, 3)])
def test_layout_is_the_definition(n, m, causal):
    mech = LogSparse(near=3)
    i, j = torch.arange(n)[:, None] + m - n, torch.arange(m)[None]
    expected = mech.visible(i, j) & ((j <= i) | (not causal))
    assert torch.equal(mech.layout(sa.Grid(n, m, causal)).mask(), expected)


def test_a_far_key_is_seen_at_powers_of_two():
    q = torch.randn(1, 1, 40, 8, generator=torch.Generator().manual_seed(0))
    seen = sa.attention_weights(q, q, "logsparse(near=1)", causal=True)[0, 0, 39].nonzero()
    assert (39 - seen.flatten()).tolist() == [32, 16, 8, 4, 2, 1, 0]


def test_auto_takes_the_providers_own_implementation_first():
    q = torch.randn(1, 2, 64, 8)
    # The engine's own, which are in C++ where a compiler is.
    engine = ("native", "torch")
    assert sa.explain(q, q, q, "chunked(chunk=16)").impl in engine
    with sa.prefer("by_chunk"):
        assert sa.explain(q, q, q, "chunked(chunk=16)").impl == "by_chunk"
        assert sa.explain(q, q, q, "chunked(chunk=16)", softcap=30.0).impl in engine


def test_the_input_has_its_answer_64_positions_back():
    q, k, _ = delayed(256, 0, True)
    weights = sa.attention_weights(q, k, causal=True)[:, :, 64:]
    best = weights.argmax(-1)
    assert (best == torch.arange(64, 256) - 64).float().mean() > 0.95
    assert torch.equal(q, delayed(256, 0, True)[0])
    assert delayed(10, 0, True)[0].shape == (1, 4, 10, 64)


def test_the_metric_is_1_where_nothing_is_lost():
    out = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    assert cosine(out, 3 * out, None) == pytest.approx(1.0)
    assert cosine(out, -out, None) == pytest.approx(-1.0)


@pytest.mark.parametrize("near", [0, -1, True])
def test_meaningless_options_are_refused(near):
    with pytest.raises(sa.InvalidInputError, match="near"):
        LogSparse(near=near)
