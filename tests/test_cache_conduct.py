"""What decode caches refuse, what reaches them and what does not, and strangers' mechanisms."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cache_runs import (
    DV,
    HKV,
    HQ,
    RINGS,
    B,
    D,
    apart,
    cache_for,
    check_law,
    decode,
    held,
    made,
    masks,
    pieces,
    same,
)

import sparseattn as sa
from sparseattn import functional
from sparseattn.cache import KeyCache
from sparseattn.cache_ring import RingCache
from sparseattn.testing.budgets import Budgets

# What they refuse, and that nothing changes then.


REFUSED: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "not causal": (sa.UnsupportedCallError, {"causal": False}, "causal=True"),
    "segments": (sa.UnsupportedCallError, {"q_segments": torch.zeros(B, 3).long()}, "segments"),
    "q_offset": (sa.UnsupportedCallError, {"q_offset": 3}, "q_offset"),
    "mechanism": (sa.InvalidInputError, {"mechanism": "strided"}, "strided"),
    "options": (sa.InvalidInputError, {"mechanism": "windowed(window=6)"}, "cache of its own"),
    "batch": (sa.InvalidInputError, {"batch": 1}, "batch"),
    "kv heads": (sa.InvalidInputError, {"kv": 4}, "heads 4"),
    "q heads": (sa.InvalidInputError, {"hq": 2}, "heads 2"),
    "width": (sa.InvalidInputError, {"d": 3}, "width 3"),
    "value width": (sa.InvalidInputError, {"dv": 3}, "width 3"),
    "dtype": (sa.InvalidInputError, {"dtype": torch.float64}, "float64"),
    "gradients": (sa.UnsupportedCallError, {"grad": True}, "gradient"),
    "lengths": (sa.InvalidInputError, {"m": 4}, "new tokens"),
    "mask": (sa.InvalidInputError, {"key_mask": torch.ones(B, 33, dtype=torch.bool)}, "key_mask"),
    "impl": (sa.InvalidInputError, {"impl": "nothing"}, "nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("spec", ["full", "windowed(window=5, sinks=2)", "retention"])
def test_a_refused_call_changes_nothing(spec, case):
    error, change, words = REFUSED[case]
    mech = sa.mechanism(spec)
    q, k, v = made(30)
    cache = decode(mech, q, k, v, "mixed")[2]
    before = held(cache)
    kw = {"causal": True, "mechanism": mech} | change
    sizes = {"batch": B, "hq": HQ, "kv": HKV, "d": D, "dv": DV, "m": 3, "dtype": q.dtype}
    sizes |= {word: kw.pop(word) for word in list(kw) if word in sizes}
    b, m, dtype, grad = sizes["batch"], sizes["m"], sizes["dtype"], kw.pop("grad", False)
    q = torch.ones(b, sizes["hq"], 3, sizes["d"], dtype=dtype, requires_grad=grad)
    k = torch.ones(b, sizes["kv"], m, sizes["d"], dtype=dtype)
    v = torch.ones(b, sizes["kv"], m, sizes["dv"], dtype=dtype)
    with pytest.raises(error, match=words):
        sa.attention(q, k, v, cache=cache, **kw)
    assert same(before, held(cache))


def test_gradients_are_refused_only_while_they_are_recorded():
    mech = sa.mechanism("full")
    q, k, v = (x.requires_grad_() for x in made(5))
    cache = cache_for(mech, q, k, v)
    with torch.no_grad():
        assert not sa.attention(q, k, v, mech, causal=True, cache=cache).requires_grad
    assert not any(x.requires_grad for x in cache._tensors())


def test_a_mechanism_that_looks_ahead_takes_no_cache():
    with pytest.raises(sa.UnsupportedCallError, match="looks ahead"):
        sa.mechanism("vertical_slash").new_cache(1, 1, 4, 4)


def test_a_bias_needs_all_keys():
    q, k, v = made(20)
    bias = torch.randn(1, HQ, 20, 20, generator=torch.Generator().manual_seed(1))
    mech = sa.mechanism("full")
    cache, outs = cache_for(mech, q, k, v), []
    for rows in pieces(20, "mixed"):
        new = [x[:, :, rows] for x in (q, k, v)]
        own = bias[:, :, rows, : rows.stop]
        outs.append(sa.attention(*new, mech, causal=True, cache=cache, bias=own))
    call = sa.AttentionCall.make(q, k, v, causal=True, bias=bias)
    verdict = Budgets(mech, q, k, v, call).out(torch.cat(outs, 2))
    assert verdict.holds, verdict
    with pytest.raises(sa.InvalidInputError, match="bias must have shape"):
        sa.attention(*new, mech, causal=True, cache=cache, bias=bias)
    ring = sa.mechanism("windowed", window=3)
    with pytest.raises(sa.UnsupportedCallError, match="bias"):
        sa.attention(*new, ring, causal=True, cache=cache_for(ring, q, k, v), bias=own)


def test_a_state_is_of_one_scale():
    mech = sa.mechanism("performer(features=8)")
    q, k, v = made(10)
    cache = decode(mech, q, k, v, "ones", scale=0.5)[2]
    with pytest.raises(sa.UnsupportedCallError, match=r"scale 0\.5"):
        sa.attention(q, k, v, mech, causal=True, cache=cache, scale=0.25)
    assert cache.length == 10


def test_a_sequence_longer_than_the_mechanism_serves_is_refused():
    mech = sa.mechanism("cosformer", horizon=32)
    q, k, v = made(32)
    cache = decode(mech, q, k, v, "mixed")[2]
    before = held(cache)
    with pytest.raises(sa.UnsupportedCallError, match="horizon"):
        sa.attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], mech, causal=True, cache=cache)
    assert same(before, held(cache))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": -1}, "batch"),
        ({"kv_heads": 1.5}, "kv_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"value_dim": None}, "value_dim"),
        ({"q_heads": 3}, "q_heads"),
        ({"dtype": torch.int32}, "dtype"),
        ({"device": "nowhere"}, "device"),
    ],
)
def test_a_cache_of_no_call_is_refused(change, words):
    sizes = {"batch": 1, "kv_heads": 2, "head_dim": 4, "value_dim": 4} | change
    with pytest.raises(sa.InvalidInputError, match=words):
        sa.mechanism("full").new_cache(**sizes)


def test_what_is_no_cache_is_refused():
    q, k, v = made(3)
    with pytest.raises(sa.InvalidInputError, match="new_cache"):
        sa.attention(q, k, v, causal=True, cache={})


# Conduct.


@pytest.mark.parametrize("spec", ["full", "windowed(window=3, sinks=1)", "linear", "retention"])
def test_empty_sizes_are_shaped_zeros(spec):
    mech = sa.mechanism(spec)
    for b, hq, hkv, n, dv in ((0, 4, 2, 3, 5), (2, 0, 0, 3, 5), (2, 4, 2, 0, 5), (2, 4, 2, 3, 0)):
        cache = mech.new_cache(b, hkv, 4, dv)
        for count in (n, 1, 0, n):
            q, k, v = (torch.ones(b, h, count, w) for h, w in ((hq, 4), (hkv, 4), (hkv, dv)))
            out = sa.attention(q, k, v, mech, causal=True, cache=cache)
            assert out.shape == (b, hq, count, dv) and not out.isnan().any()
        assert cache.length == 2 * n + 1
        cache.reorder(torch.arange(b))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_no_query_sees_is_inert(where, bad):
    for spec in ("full", *RINGS, "strided(stride=6)", "linear", "retention", "performer"):
        mech = sa.mechanism(spec)
        q, k, v = made(60)
        mask = masks("holes", 60)
        mask[:, 21:23] = False
        expected = decode(mech, q, k, v, "mixed", key_mask=mask)[0]
        limit = apart(mech, q, k, v, key_mask=mask)
        (k if where == "k" else v).transpose(1, 2)[~mask] = bad
        for cuts in ("mixed", "ones"):
            found = decode(mech, q, k, v, cuts, key_mask=mask)[0]
            assert (found - expected).abs().max() <= limit, spec


def test_a_later_nan_reaches_no_earlier_row_and_stays():
    for spec in ("windowed(window=9, sinks=3)", "chunked(chunk=16)", "linear", "retention"):
        mech = sa.mechanism(spec)
        q, k, v = made(60)
        clean = decode(mech, q, k, v, "step then chunk")[0]
        limit = apart(mech, q, k, v)
        v[0, 0, 30, 2] = torch.nan
        for cuts in ("step then chunk", "ones"):
            out = decode(mech, q, k, v, cuts)[0]
            assert (out[:, :, :30] - clean[:, :, :30]).abs().max() <= limit, spec
            assert out[0, 0, 30, 2].isnan() and not out[1].isnan().any()
            forgets = isinstance(cache_for(mech, q, k, v), RingCache)
            assert out[0, 0, 59, 2].isnan() != forgets


def test_evicted_keys_are_gone():
    mech = sa.mechanism("dilated(window=3, dilation=4)")
    q, k, v = made(60)
    v[:, :, :10] = torch.nan
    out = decode(mech, q, k, v, "ones")[0]
    assert not out[:, :, 20:].isnan().any()


def test_inference_mode_and_back():
    for spec in ("full", "windowed(window=5, sinks=2)", "linear"):
        mech = sa.mechanism(spec)
        q, k, v = made(20)
        expected = decode(mech, q, k, v, "ones")[0]
        cache, outs = cache_for(mech, q, k, v), []
        for t in range(20):
            with torch.inference_mode(t % 3 == 1):
                new = (x[:, :, t : t + 1] for x in (q, k, v))
                outs.append(sa.attention(*new, mech, causal=True, cache=cache))
        assert torch.equal(torch.cat(outs, 2), expected)


def test_autocast_decides_the_dtype():
    mech = sa.mechanism("windowed(window=5, sinks=2)")
    q, k, v = made(20)
    half = [x.bfloat16() for x in (q, k, v)]
    expected, _, cache = decode(mech, *half, "mixed")
    cache.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode(mech, q, k, v, "mixed", cache)[0], expected)


def test_strides_do_not_matter():
    mech = sa.mechanism("windowed(window=9, sinks=3)")
    q, k, v = made(50)
    expected = decode(mech, q, k, v, "mixed")[0]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(decode(mech, *strided, "mixed")[0], expected)
    one = k[:, :1].expand(-1, 2, -1, -1)
    check_law(mech, q, one, v)


def test_explain_says_what_serves_a_cached_call():
    mech = sa.mechanism("windowed(window=9, sinks=3)")
    q, k, v = made(20)
    cache = decode(mech, q, k, v, "mixed")[2]
    before = held(cache)
    new = [x[:, :, :1] for x in (q, k, v)]
    found = sa.explain(*new, mech, causal=True, cache=cache)
    assert found.impl in ("native", "torch") and not found.refusals
    assert (found.call.n, found.call.m, found.call.cached) == (1, 21, True)
    refused = sa.explain(*new, mech, causal=False, cache=cache)
    assert refused.impl is None and "causal=True" in str(refused)
    assert same(before, held(cache))


def test_one_call_with_the_name_and_its_options():
    q, k, v = made(6)
    cache = sa.mechanism("windowed", window=4).new_cache(B, HKV, D, DV, q_heads=HQ)
    sa.attention(q, k, v, "windowed", window=4, causal=True, cache=cache)
    sa.attention(q, k, v, "windowed(window=4)", causal=True, cache=cache)
    assert cache.length == 12


# Strangers.


@dataclass(frozen=True)
class Scattered(sa.MaskedSoftmax):
    """A pattern without clauses."""

    name = "scattered"

    def visible(self, i, j):
        return ((i * 7 + j * 3) % 4 != 0) | (i == j)


@dataclass(frozen=True)
class Means(sa.Mechanism):
    """The definition alone."""

    name = "means"
    honours = frozenset()

    def weights(self, q, k, call):
        seen = call.allowed().expand(call.batch, call.q_heads, -1, -1).to(q.dtype)
        return seen / seen.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Growing(sa.MaskedSoftmax):
    """A window that grows with the sequence: bounded on each grid, and on none for good."""

    name = "growing"

    def visible(self, i, j):
        return (i - j) * 2 <= i

    def layout(self, grid):
        return grid.band(grid.m, 0) & grid.pattern(self.visible)


class Steps(sa.Implementation):
    """Serves cached calls by itself."""

    name = "steps"

    def __init__(self, fault: str = "") -> None:
        self.fault, self.lengths = fault, []

    def run(self, mechanism, q, k, v, call):
        return sa.mechanism("full").implementations()[-1].run(mechanism, q, k, v, call)

    def step(self, mechanism, q, k, v, cache, call):
        self.lengths.append(cache.length)
        if self.fault == "raises":
            raise RuntimeError("planted")
        if self.fault == "shape":
            return q[:, :, :0], None
        keys, values = torch.cat([cache.k, k], 2), torch.cat([cache.v, v], 2)
        return self.run(mechanism, q, keys, values, call)


@dataclass(frozen=True)
class Stepping(sa.MaskedSoftmax):
    name = "stepping"
    tag: int = 0

    def visible(self, i, j):
        return (i - j < 5) & (j <= i)

    def layout(self, grid):
        return grid.band(4, None)

    def implementations(self):
        return (STEPS[self.tag],)

    def new_cache(self, *args, **kwargs):
        cache = super().new_cache(*args, **kwargs)
        assert type(cache) is KeyCache  # nothing here is known to read a ring
        return cache


STEPS = [Steps(), Steps("raises"), Steps("shape")]


@pytest.mark.parametrize("mech", [Scattered(), Means(), Growing()])
def test_strangers_decode_through_all_keys(mech):
    cache = check_law(mech, *made(60), key_mask=masks("left", 60))
    assert type(cache) is KeyCache


def test_a_stranger_serves_its_own_steps():
    mech = Stepping()
    STEPS[0].lengths.clear()
    check_law(mech, *made(20), cuts=("mixed",))
    assert STEPS[0].lengths == [0, 7, 8]


@pytest.mark.parametrize("tag", [1, 2])
def test_an_implementation_that_fails_leaves_the_cache(tag):
    mech = Stepping(tag)
    q, k, v = made(20)
    cache = cache_for(mech, q, k, v)
    before = held(cache)
    with pytest.raises((RuntimeError, sa.UnsupportedCallError)):
        sa.attention(q, k, v, mech, causal=True, cache=cache)
    assert same(before, held(cache))


@pytest.mark.parametrize("spec", ["full", "windowed(window=5, sinks=2)", "linear", "performer"])
def test_a_call_that_breaks_off_leaves_the_cache(spec, monkeypatch):
    mech = sa.mechanism(spec)
    q, k, v = made(30)
    for n in (1, 9):
        cache = decode(mech, q, k, v, "mixed")[2]
        twin = copy.deepcopy(cache)
        with monkeypatch.context() as patch:
            patch.setattr(functional, "_check_result", lambda *args: 1 / 0)
            new = [x[:, :, :n] for x in (q, k, v)]
            with pytest.raises(ZeroDivisionError):
                mask = torch.arange(n).expand(B, n) % 2 == 1
                sa.attention(*new, mech, causal=True, cache=cache, key_mask=mask)
        assert (cache.length, cache.nbytes) == (twin.length, twin.nbytes)
        later = [x[:, :, 9:] for x in (q, k, v)]
        assert torch.equal(
            decode(mech, *later, "mixed", _at(cache))[0],
            decode(mech, *later, "mixed", _at(twin))[0],
        )


def _at(cache):
    """The cache, for `decode`, which counts from 0."""

    class Counting:
        def __getattr__(self, word):
            return cache.length - 30 if word == "length" else getattr(cache, word)

    return Counting()


def test_an_implementation_of_whole_calls_is_refused_where_keys_are_gone():
    class Whole(sa.Implementation):
        name = "whole"

        def run(self, mechanism, q, k, v, call):
            return sa.mechanism("full").implementations()[-1].run(mechanism, q, k, v, call)

    mech = sa.mechanism("windowed(window=4)")
    cache = mech.new_cache(B, HKV, D, DV)
    q, k, v = made(9)
    call = sa.AttentionCall.make(q, k, v, causal=True)
    assert cache.serves(Whole(), cache.admit(mech, call)) == []
    sa.attention(q, k, v, mech, causal=True, cache=cache)
    assert cache.serves(Whole(), cache.admit(mech, call))
    linear = sa.mechanism("linear")
    cache = decode(linear, q, k, v, "mixed")[2]
    with pytest.raises(sa.UnsupportedCallError, match="running state"):
        sa.attention(q, k, v, linear, causal=True, cache=cache, impl="reference")
