"""Kernelised mechanisms on Triton's interpreter, for `test_triton_linear`: `triton_linear.py NAME`.

Prints the verdicts of a group of calls as JSON: outputs and gradients against their budgets. Maps
that are fused in the kernels are held to `feature_map`, which the definition is made of.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton_selections import qkv

import sparseattn as sa
from sparseattn.call import AttentionCall
from sparseattn.testing.budgets import Budgets

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MECHANISMS = ("linear", "cosformer", "retention", "performer(features=32)", "taylor")
Case = tuple[str, list[torch.Tensor], dict[str, Any]]


def mechanisms() -> Iterator[Case]:
    for spec in MECHANISMS:
        yield spec, qkv(300, 290, 2, 1, 16, F32, 20), {"causal": True}
        if spec != "retention":
            yield spec, qkv(100, 130, 2, 2, 24, F32, 16), {}


def halves() -> Iterator[Case]:
    for spec in MECHANISMS:
        for dtype in (BF16, F16):
            yield spec, qkv(100, 130, 2, 1, 16, dtype), {"causal": True}


def masked() -> Iterator[Case]:
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[0, 9::3] = False
    mask[1, :20] = False
    packed = torch.tensor([[0] * 30 + [1] * 50 + [2] * 20, [5] * 70 + [6] * 30])
    for spec in ("linear", "retention"):
        yield spec, qkv(100, 100, 2, 1, 16, F32), {"causal": True, "key_mask": mask}
        yield spec, qkv(100, 100, 4, 2, 16, F32), {"causal": True, "q_segments": packed}


def carried() -> Iterator[Case]:
    """In half precision, so many that gradients are too, and past the first span."""
    packed = torch.arange(1100)[None] // torch.tensor([[40], [1060]])
    yield "linear", qkv(1100, 1090, 2, 1, 16, BF16, 20), {"causal": True}
    yield "retention", qkv(1100, 1100, 2, 1, 16, BF16), {"causal": True, "q_segments": packed}


def carried_too() -> Iterator[Case]:
    mask = torch.ones(2, 1100, dtype=torch.bool)
    mask[0, 9::3] = False
    mask[1, :1040] = False
    for spec in MECHANISMS[1:]:
        yield spec, qkv(1100, 1090, 2, 1, 16, BF16), {"causal": True}
    for spec in ("linear", "retention"):
        yield spec, qkv(1100, 1100, 2, 1, 16, BF16), {"causal": True, "key_mask": mask}
    yield "linear", qkv(1100, 600, 2, 2, 16, BF16), {}
    yield "retention", qkv(600, 1100, 2, 1, 16, BF16), {"causal": True}


def small() -> Iterator[Case]:
    """What planted bugs are looked for with."""
    yield "linear", qkv(300, 300, 4, 2, 16, F32), {"causal": True}
    yield "retention", qkv(300, 300, 2, 1, 16, F32), {"causal": True}


def steps() -> dict[str, list[tuple[str, float, float]]]:
    """Decoding token by token, after a cache took in the others."""
    found = {}
    for spec in ("linear", "cosformer", "retention"):
        for dtype in (F32, BF16):
            q, k, v = (t.detach() for t in qkv(37, 37, 4, 2, 24, dtype, 20))
            cache = sa.mechanism(spec).new_cache(*k.shape[:2], 24, 20, dtype=dtype)
            out = []
            for start, stop in ((0, 30), *((i, i + 1) for i in range(30, 37))):
                new = [x[:, :, start:stop] for x in (q, k, v)]
                impl = "triton" if start else "auto"
                out.append(sa.attention(*new, spec, causal=True, cache=cache, impl=impl))
            call = AttentionCall.make(q, k, v, causal=True)
            verdict = Budgets(sa.mechanism(spec), q, k, v, call).out(torch.cat(out, 2))
            found[f"{spec} {dtype}"] = [("out", verdict.error, verdict.budget)]
    return found


GROUPS = {f.__name__: f for f in (mechanisms, halves, masked, carried, carried_too, small)}


def main(name: str) -> None:
    if name == "steps":
        print(json.dumps(steps()))
        return
    found = {}
    for at, (spec, x, kw) in enumerate(GROUPS[name]()):
        out = sa.attention(*x, spec, impl="triton", **kw)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
        grads = torch.autograd.grad(out, x, grad)
        x = [t.detach() for t in x]
        call = AttentionCall.make(*x, **kw)
        budgets = Budgets(sa.mechanism(spec), *x, call, (grad, None))
        verdicts = zip(
            ("out", "dq", "dk", "dv"), (budgets.out(out), *budgets.grads(grads)), strict=True
        )
        found[f"{at} {spec} {out.dtype}"] = [(w, one.error, one.budget) for w, one in verdicts]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
