"""Decode caches: any cutting of a run into calls equals one call, and keeps what it needs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cache_runs import (
    HQ,
    NAMES,
    RINGS,
    apart,
    cache_for,
    caching,
    check_law,
    decode,
    made,
    masks,
    pieces,
)

import sparseattn as sa
from sparseattn import cache_state
from sparseattn.cache import Cache, KeyCache
from sparseattn.cache_ring import Bound, RingCache, bound_of
from sparseattn.cache_state import StateCache
from sparseattn.testing.examples import examples

REACH = {  # mechanisms whose caches have a constant size, and what they keep
    "windowed": RingCache,
    "dilated": RingCache,
    "chunked": RingCache,
    "longformer": RingCache,
    "linear": StateCache,
    "performer": StateCache,
    "taylor": StateCache,
    "cosformer": StateCache,
    "retention": StateCache,
}


# The law.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_any_cutting_equals_one_call(name, dtype):
    for mech in caching(name):
        kw = {"return_lse": True} if "lse" in mech.honours else {}
        cache = check_law(mech, *made(80, dtype), **kw)
        assert type(cache) is REACH.get(name, KeyCache)


@pytest.mark.parametrize("mask", ["left", "late", "never", "holes"])
@pytest.mark.parametrize("name", NAMES)
def test_masks_are_remembered(name, mask):
    for mech in caching(name)[:1]:
        check_law(mech, *made(80), key_mask=masks(mask, 80))


@pytest.mark.parametrize("name", NAMES)
def test_softcap_sinks_and_scale_go_through(name):
    for mech in caching(name)[:1]:
        kw: dict[str, Any] = {}
        kw |= {"scale": 0.7} if "scale" in mech.honours else {}
        kw |= {"softcap": 2.0} if "softcap" in mech.honours else {}
        if "sink_logits" in mech.honours:
            kw["sink_logits"] = torch.linspace(-1, 1, HQ)
        check_law(mech, *made(60), cuts=("ones", "mixed"), **kw)
        if "sink_logits" in kw:
            check_law(mech, *made(60), cuts=("mixed",), sink_logits=kw["sink_logits"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
@pytest.mark.parametrize("spec", ["full", "windowed(window=9, sinks=3)", "linear", "retention"])
def test_other_dtypes(spec, dtype):
    check_law(sa.mechanism(spec), *made(60, dtype), cuts=("ones", "mixed"))


@pytest.mark.parametrize("spec", RINGS)
def test_a_ring_that_comes_round_many_times(spec):
    mech = sa.mechanism(spec)
    check_law(mech, *made(150), return_lse=True)
    for mask in ("late", "holes"):
        check_law(mech, *made(150), cuts=("ones", "mixed"), key_mask=masks(mask, 150))


def test_buffers_of_a_large_ring_grow(monkeypatch):
    monkeypatch.setattr("sparseattn.cache_ring._ROOM", 4)
    for spec in ("windowed(window=40, sinks=25)", "windowed(window=20, sinks=45)"):
        mask = masks("holes", 130)
        mask[:, :10] = True
        check_law(sa.mechanism(spec), *made(130), key_mask=mask)
        check_law(sa.mechanism(spec), *made(130))


def test_a_chunk_is_cut_into_pieces_of_bounded_size(monkeypatch):
    monkeypatch.setattr("sparseattn.cache_ring._PAIRS", 64)
    check_law(sa.mechanism("windowed(window=40, sinks=2)"), *made(200), cuts=("step then chunk",))


def test_states_stay_exact_over_thousands_of_tokens():
    for spec in ("linear", "retention", "performer(features=16)"):
        check_law(sa.mechanism(spec), *made(1500), cuts=("mixed",))


def test_keys_too_long_for_their_features():
    # exp(-|k|^2 / 2) underflows, in float64 too; quotients do not.
    q, k, v = made(70)
    k[:, :, 10:20] *= 25
    k[:, :, :5] *= 40
    check_law(sa.mechanism("performer(features=32)"), q, k, v)


def test_every_implementation_that_a_cache_takes():
    q, k, v = made(60)
    for spec in ("full", "windowed(window=9, sinks=3)", "dilated(window=4, dilation=3)"):
        for impl in ("reference", "torch"):
            check_law(sa.mechanism(spec), q, k, v, cuts=("ones", "mixed"), impl=impl)


# What they keep.


@pytest.mark.parametrize("name", REACH)
def test_memory_does_not_grow_with_the_length(name):
    for mech in examples(name):
        cache = mech.new_cache(1, 1, 4, 4)
        x = torch.zeros(1, 1, 256, 4)
        sizes = set()
        for _ in range(16):
            sa.attention(x, x, x, mech, causal=True, cache=cache)
            one = x[:, :, :1]
            sa.attention(one, one, one, mech, causal=True, cache=cache)
            sizes.add(cache.nbytes)
        assert cache.length == 16 * 257 and len(sizes) == 1


def test_what_is_kept_is_what_the_pattern_needs():
    assert bound_of(sa.mechanism("windowed", window=9, sinks=3)) == Bound(3, 8, True)
    assert bound_of(sa.mechanism("windowed", window=(4, 2))) == Bound(0, 4, True)
    assert bound_of(sa.mechanism("dilated", window=3, dilation=4)) == Bound(0, 8, False)
    assert bound_of(sa.mechanism("chunked", chunk=16)) == Bound(0, 15, False)
    assert bound_of(sa.mechanism("longformer", window=3, global_tokens=9)) == Bound(9, 8, False)
    for unbounded in ("full", "strided", "bigbird"):
        assert bound_of(sa.mechanism(unbounded)) is None
    cache = sa.mechanism("windowed", window=9, sinks=3).new_cache(2, 3, 8, 5)
    assert cache.nbytes == 2 * 3 * (9 + 3) * (8 + 5) * 4


def test_all_keys_are_kept_in_buffers_that_double():
    mech, x = sa.mechanism("full"), torch.zeros(1, 1, 1, 4)
    cache = mech.new_cache(1, 1, 4, 4)
    sizes = []
    for _ in range(2000):
        sa.attention(x, x, x, mech, causal=True, cache=cache)
        sizes.append(cache.nbytes)
    assert len(set(sizes)) == 6  # 64 to 2,048 keys: no copy of all at each step
    assert sizes[-1] < 2 * 2 * 2000 * 4 * 4
    assert cache.k.shape == (1, 1, 2000, 4) and cache.key_mask is None


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_copies_what_it_keeps(name):
    for mech in caching(name)[:1]:
        q, k, v = made(40)
        mask = masks("holes", 40)
        expected, _, _ = decode(mech, q, k, v, "mixed", key_mask=mask)
        cache = cache_for(mech, q, k, v)
        outs = []
        for rows in pieces(40, "mixed"):
            new = [x[:, :, rows].clone() for x in (q, k, v)]
            own = mask[:, rows].clone()
            outs.append(sa.attention(*new, mech, causal=True, cache=cache, key_mask=own))
            for x in new:
                x.fill_(torch.nan)
            own.logical_not_()
        assert torch.equal(torch.cat(outs, 2), expected)


@pytest.mark.parametrize("name", NAMES)
def test_beam_search_moves_rows(name):
    for mech in caching(name)[:1]:
        q, k, v = made(50)
        mask = masks("late", 50)
        index = torch.tensor([1, 1])
        cache = decode(mech, *(x[:, :, :30] for x in (q, k, v)), "mixed", key_mask=mask[:, :30])[2]
        before = cache.nbytes
        cache.reorder(index)
        assert cache.length == 30 and cache.nbytes == before
        rest = [x[:, :, 30:] for x in (q, k, v)]
        out = sa.attention(*rest, mech, causal=True, cache=cache, key_mask=mask[:, 30:])
        joined = [torch.cat([x[index][:, :, :30], x[:, :, 30:]], 2) for x in (q, k, v)]
        whole = torch.cat([mask[index][:, :30], mask[:, 30:]], 1)
        expected = decode(mech, *joined, "step then chunk", key_mask=whole)[0][:, :, 30:]
        limit = apart(mech, *joined, key_mask=whole)
        assert (out - expected).abs().max() <= limit
        for bad in ([0], [0, 2], [-1, 0]):
            with pytest.raises(sa.InvalidInputError, match="index"):
                cache.reorder(torch.tensor(bad))
        with pytest.raises(sa.InvalidInputError, match="int64"):
            cache.reorder(torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("spec", ["full", "windowed(window=5, sinks=2)", "linear", "performer"])
def test_copies_and_resets(spec):
    mech = sa.mechanism(spec)
    q, k, v = made(30)
    cache = decode(mech, q, k, v, "mixed", key_mask=masks("holes", 30))[2]
    fork = copy.deepcopy(cache)
    new = (q[:, :, :3], k[:, :, :3], v[:, :, :3])
    first = sa.attention(*new, mech, causal=True, cache=cache)
    assert (cache.length, fork.length) == (33, 30)
    assert torch.equal(first, sa.attention(*new, mech, causal=True, cache=fork))
    cache.reset()
    assert cache.length == 0
    assert torch.equal(decode(mech, q, k, v, "mixed", cache)[0], decode(mech, q, k, v, "mixed")[0])
    assert mech.name in repr(cache) and "length=30" in repr(cache)


# The law can fail.


def planted_eviction(patch):
    known = RingCache.__init__

    def early(self, *args, bound, **kw):
        known(self, *args, bound=bound._replace(reach=bound.reach - 1), **kw)

    patch.setattr(RingCache, "__init__", early)


def planted_forgetting(patch):
    patch.setattr(Cache, "_whole_mask", lambda self, mask, n: None)
    patch.setattr(KeyCache, "_whole_mask", lambda self, mask, n: None)


def planted_positions(patch):
    patch.setattr("sparseattn.cache_ring.starts", lambda *args: None)


def planted_decay(patch):
    right = cache_state._decays
    patch.setattr(
        cache_state,
        "_decays",
        lambda g, n: right(g, n)._replace(before=right(g, n).before / g.max()),
    )


PLANTED: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "a key evicted too early": (planted_eviction, "windowed(window=9, sinks=3)", {}),
    "a forgotten mask": (planted_forgetting, "full", {"key_mask": masks("holes", 60)}),
    "a mask forgotten by a ring": (planted_forgetting, RINGS[1], {"key_mask": masks("late", 60)}),
    "a mask forgotten by a state": (planted_forgetting, "linear", {"key_mask": masks("left", 60)}),
    "sinks eaten by padding": (planted_positions, RINGS[1], {"key_mask": masks("left", 60)}),
    "a decay one step short": (planted_decay, "retention", {}),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_bug_breaks_the_law(case, monkeypatch):
    plant, spec, kw = PLANTED[case]
    mech = sa.mechanism(spec)
    check_law(mech, *made(60), cuts=("mixed",), **kw)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_law(mech, *made(60), cuts=("mixed",), **kw)


def test_a_planted_alias_is_seen(monkeypatch):
    kept = KeyCache._written

    def alias(self, held, new, total):
        return kept(self, held, new, total) if self.length else new

    monkeypatch.setattr(KeyCache, "_written", alias)
    with pytest.raises(AssertionError):
        test_a_cache_copies_what_it_keeps("full")
