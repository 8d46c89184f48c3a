"""Kernelised mechanisms on the C++ kernels, for `test_native_linear`: `native_linear.py GROUP`.

Prints as JSON the verdicts of a group of calls, forward and gradients, and rules of conduct. A
process of its own, since what the kernels are built for is said in the environment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import sparseattn as sa
from sparseattn.call import AttentionCall
from sparseattn.engines import op
from sparseattn.engines.native import library
from sparseattn.testing.budgets import Budgets

F32, BF16 = torch.float32, torch.bfloat16
Case = tuple[str, list[Tensor], dict[str, Any]]
SPECS = ("linear", "performer(features=40)", "cosformer", "retention")


def qkv(
    n: int, m: int, heads: int, kv: int, width: int, dtype: torch.dtype, values: int = 0
) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = ((heads, n, width), (kv, m, width), (kv, m, values or width))
    return [torch.randn(2, *shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


def mask_of(m: int) -> Tensor:
    """Holes, and a first row that begins late."""
    mask = torch.rand(2, m, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[0, :60] = False
    return mask


def packed(n: int) -> Tensor:
    return torch.stack([torch.arange(n) // 130, (torch.arange(n) > n // 3).long()])


def wide() -> Iterator[Case]:
    """Calls of many pairs, which are computed in float32 where causal."""
    for spec in SPECS:
        yield spec, qkv(600, 600, 2, 2, 16, F32), {"causal": True}
        yield spec, qkv(530, 900, 4, 2, 20, F32, 40), {"causal": True, "q_offset": -30}
        yield spec, qkv(900, 530, 2, 1, 33, F32, 17), {"causal": True, "q_offset": 0}
        yield spec, qkv(900, 900, 2, 2, 16, F32), {"causal": True, "key_mask": mask_of(900)}
        if spec != "retention":
            yield spec, qkv(600, 700, 4, 2, 16, F32), {}
            yield spec, qkv(600, 700, 2, 2, 16, F32), {"key_mask": mask_of(700)}
    yield "linear", qkv(1700, 1700, 1, 1, 256, F32), {"causal": True}


def half() -> Iterator[Case]:
    for spec in SPECS:
        yield spec, qkv(257, 257, 4, 2, 16, BF16, 24), {"causal": True}
        yield spec, qkv(300, 300, 2, 2, 16, BF16), {"causal": True, "q_segments": packed(300)}
        if spec != "retention":
            yield spec, qkv(100, 130, 2, 2, 20, BF16), {"key_mask": mask_of(130)}


def few() -> Iterator[Case]:
    """Calls of few pairs, which are computed in float64."""
    for spec in SPECS:
        yield spec, qkv(1, 65, 2, 2, 16, F32), {"causal": True}
        yield spec, qkv(100, 100, 4, 2, 16, F32, 5), {"causal": True, "key_mask": mask_of(100)}
        if spec != "retention":
            yield spec, qkv(65, 1, 2, 2, 16, F32), {}
            yield spec, qkv(130, 40, 4, 2, 16, F32), {}


def small() -> Iterator[Case]:
    """What planted bugs are looked for with."""
    yield "linear", qkv(600, 900, 4, 2, 16, F32), {"causal": True}
    yield "cosformer", qkv(600, 600, 2, 2, 16, F32), {"key_mask": mask_of(600)}
    yield "performer(features=40)", qkv(600, 600, 2, 2, 16, F32), {"causal": True}
    yield "retention", qkv(1700, 1700, 4, 2, 16, F32), {"causal": True}  # some span decays little
    yield "linear", qkv(900, 900, 2, 2, 16, F32), {"causal": True, "key_mask": mask_of(900)}


def verdicts(spec: str, x: list[Tensor], kw: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """The error and the budget of out and each gradient."""
    made = sa.mechanism(spec)
    out = sa.attention(*x, made, impl="native", **kw)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    grads = torch.autograd.grad(out, x, seed)
    budgets = Budgets(made, *x, AttentionCall.make(*x, **kw), (seed, None))
    found = (budgets.out(out), *budgets.grads(grads, nearby=True))
    for word, one in zip(("out", "dq", "dk", "dv"), found, strict=True):
        yield word, one.error, one.budget


def conduct() -> dict[str, bool]:
    """Rules that are not a matter of digits."""
    found = {}
    mask = mask_of(600)
    for dtype in (F32, BF16):
        for spec in SPECS:
            name = f"{spec}, {dtype}"
            q, k, v = (x.detach() for x in qkv(600, 600, 4, 2, 16, dtype))
            kw: dict[str, Any] = {"causal": True, "key_mask": mask, "impl": "native"}
            clean = sa.attention(q, k, v, spec, **kw)
            hidden = ~mask[:, None, :, None]
            bad = [x.masked_fill(hidden, torch.nan) for x in (k, v)]
            found[f"{name}: unseen keys are inert"] = torch.equal(
                clean, sa.attention(q, *bad, spec, **kw)
            )
            found[f"{name}: a query that sees no key is 0"] = bool((clean[0, :, :60] == 0).all())
            found[f"{name}: the same bits alone"] = torch.equal(
                clean[1:], sa.attention(q[1:], k[1:], v[1:], spec, **{**kw, "key_mask": mask[1:]})
            )
            kw = {"causal": True, "impl": "native"}
            clean = sa.attention(q, k, v, spec, **kw)
            for word, at in (("tokens", 550), ("values", 570)):
                late = [x.clone() for x in (q, k, v)]
                for x in late if word == "tokens" else late[2:]:
                    x[:, :, at:] = torch.nan
                other = sa.attention(*late, spec, **kw)
                found[f"{name}: later {word} change no earlier bit"] = torch.equal(
                    clean[:, :, :at], other[:, :, :at]
                )
                shown = other[:, :, at:].isnan()
                found[f"{name}: NaN in {word} stays visible"] = bool(shown.all())
            found[f"{name}: any strides"] = torch.equal(
                clean, sa.attention(*(x.mT.contiguous().mT for x in (q, k, v)), spec, **kw)
            )
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                x = qkv(2500, 2500, 2, 1, 16, dtype)
                out = sa.attention(*x, spec, **kw)
                results.append([out, *torch.autograd.grad(out.square().sum(), x)])
            torch.set_num_threads(1)
            found[f"{name}: the same bits with any number of threads"] = all(
                torch.equal(a, b)
                for other in results[1:]
                for a, b in zip(results[0], other, strict=True)
            )
    q, k, v = qkv(600, 600, 2, 2, 64, F32)
    q, k = (30 * x.detach() for x in (q, k))
    lost, own = (
        sa.attention(q, k, v, "performer", causal=True, impl=impl) for impl in ("native", "torch")
    )
    found["features that underflow are evaluated again"] = bool((lost - own).abs().max() < 1e-5)
    return found


GROUPS = {f.__name__: f for f in (wide, half, few, small)}


def main(name: str) -> None:
    assert not library.missing(), library.missing()
    if name == "conduct":
        print(json.dumps(conduct()))
        return
    op.FEW.clear()  # the kernels serve every size here, and the operator widens nothing
    found = {}
    for at, (spec, x, kw) in enumerate(GROUPS[name]()):
        found[f"{at} {spec} {x[0].dtype}"] = list(verdicts(spec, x, kw))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
