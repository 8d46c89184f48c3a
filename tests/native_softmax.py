"""Static patterns on the C++ kernels, for `test_native_softmax`: `native_softmax.py GROUP`.

Prints as JSON the verdicts of a group of calls, forward and gradients, and rules of conduct. A
process of its own, since what the kernels are built for is said in the environment. Float32
kernels serve every size here: the operator's twice as many digits would leave them out of small
gradients.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton_selections import qkv, verdicts
from triton_softmax import mask_of

import sparseattn as sa

F32, BF16 = torch.float32, torch.bfloat16
Case = tuple[str, list[torch.Tensor], dict[str, Any]]
PACKED = torch.tensor([[0] * 31 + [1] * 49 + [2] * 20, [5] * 70 + [6] * 30])


def bands() -> Iterator[Case]:
    for dtype in (F32, BF16):
        for n in (63, 65, 100, 257):
            yield "full", qkv(n, n, 2, 2, 16, dtype), {"causal": True}
        yield "full", qkv(70, 130, 4, 1, 20, dtype, 40), {"causal": True, "softcap": 3.0}
        yield "full", qkv(130, 70, 3, 1, 33, dtype, 17), {"causal": True}
        yield "full", qkv(65, 90, 2, 2, 128, dtype, 256), {}
        yield "windowed(window=9)", qkv(257, 257, 2, 2, 16, dtype), {"causal": True}
        yield "windowed(window=(70, 20))", qkv(150, 150, 8, 2, 16, dtype), {"scale": -0.3}
        yield "full", qkv(100, 100, 2, 2, 16, dtype), {"scale": 0.0}
        holes = mask_of((0, 9, 100), (20, 40, 90))
        yield "full", qkv(100, 100, 2, 2, 16, dtype), {"causal": True, "key_mask": holes}
        yield "windowed(window=20)", qkv(100, 100, 2, 1, 16, dtype), {"q_segments": PACKED}
    sinks = torch.tensor([0.5, -1.0]).requires_grad_()
    yield "full", qkv(65, 65, 2, 2, 16, F32), {"causal": True, "sink_logits": sinks}


def lists() -> Iterator[Case]:
    for dtype in (F32, BF16):
        yield "bigbird(block=16)", qkv(257, 257, 4, 2, 16, dtype), {"causal": True}
        yield "bigbird(block=16)", qkv(100, 100, 2, 2, 16, dtype), {}
        yield "windowed(window=20, sinks=3)", qkv(130, 130, 2, 2, 16, dtype), {"causal": True}
        yield "longformer(window=20)", qkv(150, 150, 3, 1, 20, dtype), {"softcap": 2.0}
        yield "strided(stride=7)", qkv(100, 130, 2, 2, 16, dtype), {}
        holes = mask_of((0, 9, 100), (21, 40, 90))
        yield "bigbird(block=16)", qkv(100, 100, 2, 2, 16, dtype), {"key_mask": holes}
        yield (
            *("windowed(window=20, sinks=2)", qkv(100, 100, 4, 2, 16, dtype)),
            {"causal": True, "q_segments": PACKED},
        )


def few() -> Iterator[Case]:
    """Few queries, or few pairs: row by row."""
    for dtype in (F32, BF16):
        for spec in ("full", "windowed(window=300)", "windowed(window=40, sinks=3)"):
            yield spec, qkv(1, 1000, 4, 2, 16, dtype), {"causal": True}
        yield "bigbird(block=16)", qkv(3, 700, 6, 2, 20, dtype, 40), {"softcap": 3.0}
        holes = mask_of((0, 9, 700), (700, 0, 700))
        yield "windowed(window=300)", qkv(2, 700, 2, 2, 16, dtype), {"key_mask": holes}
    yield "full", qkv(20, 20, 2, 2, 16, F32), {"causal": True}
    yield "strided(stride=7)", qkv(30, 30, 2, 2, 16, F32), {}


def small() -> Iterator[Case]:
    """What planted bugs are looked for with."""
    yield "windowed(window=70)", qkv(150, 150, 4, 2, 16, F32), {"causal": True}
    yield "bigbird(block=16)", qkv(150, 150, 2, 2, 16, F32), {"causal": True}
    yield "full", qkv(2, 600, 4, 2, 16, F32), {"causal": True}
    yield "full", qkv(65, 65, 2, 2, 16, F32), {"causal": True, "softcap": 2.0}
    yield "full", qkv(700, 700, 1, 1, 16, F32), {"causal": True, "scale": 2.0}


def conduct() -> dict[str, bool]:
    """Rules that are not a matter of digits."""
    found = {}
    mask = mask_of((0, 9, 100), (20, 40, 90))
    for dtype in (F32, BF16):
        q, k, v = (x.detach() for x in qkv(100, 100, 4, 2, 16, dtype))
        for spec in ("full", "windowed(window=20)", "bigbird(block=16)"):
            name = f"{spec}, {dtype}"
            kw: dict[str, Any] = {"causal": True, "key_mask": mask, "impl": "native"}
            clean = sa.attention(q, k, v, spec, **kw)
            hidden = ~mask[:, None, :, None]
            bad = [x.masked_fill(hidden, torch.nan) for x in (k, v)]
            found[f"{name}: unseen keys are inert"] = torch.equal(
                clean, sa.attention(q, *bad, spec, **kw)
            )
            seen = v.clone()
            seen[0, :, 0] = torch.nan
            shown = sa.attention(q, k, seen, spec, **kw)
            found[f"{name}: NaN that is seen stays visible"] = bool(shown[0, :, 0].isnan().all())
            found[f"{name}: the same bits alone"] = torch.equal(
                clean[1:], sa.attention(q[1:], k[1:], v[1:], spec, **{**kw, "key_mask": mask[1:]})
            )
            late = [x.clone() for x in (q, k, v)]
            for x in late:
                x[:, :, 70:] = torch.nan
            kw = {"causal": True, "impl": "native"}
            found[f"{name}: later tokens change no earlier bit"] = torch.equal(
                sa.attention(q, k, v, spec, **kw)[:, :, :70],
                sa.attention(*late, spec, **kw)[:, :, :70],
            )
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                x = [y.detach().requires_grad_() for y in qkv(700, 700, 4, 2, 16, dtype)]
                out = sa.attention(*x, spec, **kw)
                results.append([out, *torch.autograd.grad(out.square().sum(), x)])
            torch.set_num_threads(1)
            found[f"{name}: the same bits with any number of threads"] = all(
                torch.equal(a, b)
                for other in results[1:]
                for a, b in zip(results[0], other, strict=True)
            )
    torch.set_num_threads(2)
    for dtype in (F32, BF16):
        for spec in ("full", "windowed(window=40)", "windowed(window=40, sinks=4)", "bigbird"):
            for holes in (False, True):
                found[f"{spec}, {dtype}, {holes}: a cache gives what one call does"] = _cached(
                    spec, dtype, holes
                )
    return found


def _cached(spec: str, dtype: torch.dtype, holes: bool) -> bool:
    mech = sa.mechanism(spec)
    q, k, v = (x.detach() for x in qkv(330, 330, 4, 2, 16, dtype))
    mask = mask_of((0, 9, 330), (20, 40, 330)) if holes else None
    cache = mech.new_cache(2, 2, 16, 16, q_heads=4, dtype=dtype)
    parts, at = [], 0
    for n in (300, 1, 1, 5, 1, 22):
        own = [x[:, :, at : at + n] for x in (q, k, v)]
        new = None if mask is None else mask[:, at : at + n]
        parts.append(
            sa.attention(*own, mech, causal=True, cache=cache, impl="native", key_mask=new)
        )
        at += n
    wide = [x.double() for x in (q, k, v)]
    whole = sa.attention(*wide, mech, causal=True, impl="reference", key_mask=mask)
    # Each output is a mean of values of about 1, of at most 4: sixteen of their last digits.
    most = 16 * torch.finfo(dtype).eps
    return (torch.cat(parts, dim=2) - whole).abs().max().item() <= most


GROUPS = {f.__name__: f for f in (bands, lists, few, small)}
ALL = ("bands", "lists", "few")


def main(name: str) -> None:
    if name == "conduct":
        print(json.dumps(conduct()))
        return
    found = {}
    cases = [case for group in (ALL if name == "all" else (name,)) for case in GROUPS[group]()]
    for at, (spec, x, kw) in enumerate(cases):
        exact = x[0].shape[2] < 4 or x[0].shape[2] * x[1].shape[2] < 1000
        marks = list(verdicts(spec, x, digits=exact, impl="native", **kw))
        found[f"{at} {spec} {x[0].dtype}"] = marks
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
