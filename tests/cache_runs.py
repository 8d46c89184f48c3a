"""Runs cut into calls with a decode cache, and the law that the cutting does not matter."""

from __future__ import annotations

import itertools
from typing import Any

import torch

import sparseattn as sa
from sparseattn.cache import Cache
from sparseattn.testing.budgets import Budgets
from sparseattn.testing.examples import examples

NAMES = [record.name for record in sa.list_mechanisms()]
B, HQ, HKV, D, DV = 2, 4, 2, 8, 5
CUTS = {"all": (1000,), "ones": (1,), "mixed": (7, 1, 30, 2, 0, 17), "step then chunk": (1, 40)}
RINGS = [
    "windowed(window=1)",
    "windowed(window=20, sinks=3)",
    "windowed(window=4, sinks=30)",
    "windowed(window=(6, 3), sinks=1)",
    "dilated(window=4, dilation=3)",
    "chunked(chunk=7)",
    "longformer(window=5, global_tokens=9)",
    "longformer(window=(0, 4), global_tokens=2)",
]


def made(n: int, dtype: torch.dtype = torch.float32, seed: int = 0, kv: int = HKV):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return normal(B, HQ, n, D), normal(B, kv, n, D), normal(B, kv, n, DV)


def cache_for(mech: sa.Mechanism, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return mech.new_cache(k.shape[0], k.shape[1], k.shape[3], v.shape[3], dtype=q.dtype)


def pieces(n: int, cuts: str) -> list[slice]:
    found, start = [], 0
    for size in itertools.cycle(CUTS[cuts]):
        found.append(slice(start, min(start + size, n)))
        start += size
        if start >= n:
            return found
    raise AssertionError


def decode(mech, q, k, v, cuts, cache=None, **kw):
    """out, lse or None, and the cache, of a run in calls."""
    cache = cache_for(mech, q, k, v) if cache is None else cache
    mask = kw.pop("key_mask", None)
    outs, lses = [], []
    for rows in pieces(q.shape[2], cuts):
        given = kw if mask is None else kw | {"key_mask": mask[:, rows]}
        new = (x[:, :, rows] for x in (q, k, v))
        out = sa.attention(*new, mech, causal=True, cache=cache, **given)
        out, lse = out if kw.get("return_lse") else (out, None)
        outs.append(out)
        lses.append(lse)
    assert cache.length == q.shape[2]
    return torch.cat(outs, 2), torch.cat(lses, 2) if kw.get("return_lse") else None, cache


def check_law(mech, q, k, v, cuts=tuple(CUTS), **kw):
    """Every cutting is within the budget of one call's definition."""
    call = sa.AttentionCall.make(
        q,
        k,
        v,
        causal=True,
        needs_lse=kw.get("return_lse", False),
        **_without(kw, "return_lse", "impl"),
    )
    budgets = Budgets(mech, q, k, v, call)
    cache = None
    for name in cuts:
        out, lse, cache = decode(mech, q, k, v, name, **kw)
        assert out.dtype == q.dtype
        verdict = budgets.out(out)
        assert verdict.holds, (mech, name, verdict)
        if lse is not None:
            verdict = budgets.lse(lse)
            assert verdict.holds, (mech, name, "lse", verdict)
    return cache


def apart(mech, q, k, v, **kw) -> float:
    """How far two right outputs of one call may be from each other: each has its budget."""
    call = sa.AttentionCall.make(q, k, v, causal=True, **kw)
    return 2 * Budgets(mech, q, k, v, call).out_budget


def _without(kw: dict[str, Any], *words: str) -> dict[str, Any]:
    return {word: value for word, value in kw.items() if word not in words}


def masks(kind: str, n: int) -> torch.Tensor:
    at = torch.arange(n)[None]
    if kind == "left":
        return at >= torch.tensor([[5], [33]])
    if kind == "late":  # the second row begins within a later chunk; the first has holes as well
        return (at >= torch.tensor([[0], [45]])) & (at % 7 != 3)
    if kind == "never":
        return at.expand(B, n) >= torch.tensor([[n], [2]])
    g = torch.Generator().manual_seed(3)
    return torch.rand(B, n, generator=g) > 0.3  # holes, among the first keys too


def caching(name: str) -> list[sa.Mechanism]:
    return [] if name == "vertical_slash" else examples(name)


def held(cache: Cache) -> tuple[Any, ...]:
    return cache.length, cache.nbytes, cache.q_heads, [x.clone() for x in cache._tensors()]


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[:3] == b[:3] and all(torch.equal(x, y) for x, y in zip(a[3], b[3], strict=True))
