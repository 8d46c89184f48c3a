"""Static patterns on Triton's interpreter, for `test_triton_softmax`: `triton_softmax.py NAME`.

Prints what it found as JSON: the verdicts of a group of calls, forward and gradients. Kernels
compute in the dtype that is given: the operator's twice as many digits for calls of few pairs would
leave the float32 kernels out. Where a row has few numbers they are kept: the definition in float32
may hit those by luck.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton_selections import qkv, verdicts

import sparseattn as sa
from sparseattn.engines import triton_launch
from sparseattn.engines.softmax import few_in_triton, in_triton

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Case = tuple[str, list[torch.Tensor], dict[str, Any]]


def mask_of(*rows: tuple[int, int, int]) -> torch.Tensor:
    """`[B, M]`: of each row the keys from the first number on, but every third after the second."""
    mask = torch.zeros(len(rows), rows[0][2], dtype=torch.bool)
    for row, (first, hole, stop) in zip(mask, rows, strict=True):
        row[first:stop] = True
        row[hole::3] = False
    return mask


def bands() -> Iterator[Case]:
    for n in (1, 63, 65, 100):
        yield "full", qkv(n, n, 2, 2, 16, F32), {"causal": True}
    yield "full", qkv(70, 130, 4, 1, 20, F32, 40), {"causal": True, "softcap": 3.0}
    yield "full", qkv(130, 70, 3, 1, 16, F32), {"causal": True}
    yield "windowed(window=9)", qkv(257, 257, 2, 2, 16, F32), {"causal": True}
    yield "windowed(window=(70, 20))", qkv(150, 150, 8, 2, 16, F32), {"scale": -0.3}
    yield "windowed(window=30)", qkv(100, 100, 2, 1, 16, BF16), {"causal": True}
    yield "full", qkv(100, 100, 2, 1, 32, F16), {}
    holes = mask_of((0, 9, 100), (20, 40, 90))
    yield "full", qkv(100, 100, 2, 2, 16, F32), {"causal": True, "key_mask": holes}
    packed = torch.tensor([[0] * 30 + [1] * 50 + [2] * 20, [5] * 70 + [6] * 30])
    yield "windowed(window=20)", qkv(100, 100, 2, 1, 16, F32), {"q_segments": packed}
    sinks = torch.tensor([0.5, -1.0]).requires_grad_()
    yield "full", qkv(65, 65, 2, 2, 16, F32), {"causal": True, "sink_logits": sinks}


def lists() -> Iterator[Case]:
    yield "bigbird(block=16)", qkv(257, 257, 4, 2, 16, F32), {"causal": True}
    yield "bigbird(block=16)", qkv(100, 100, 2, 2, 16, BF16), {}
    yield "windowed(window=20, sinks=3)", qkv(130, 130, 2, 2, 16, F32), {"causal": True}
    yield "longformer(window=20)", qkv(150, 150, 3, 1, 20, F32), {"softcap": 2.0}
    yield "strided(stride=7)", qkv(100, 130, 2, 2, 16, F32), {}
    yield "chunked(chunk=24)", qkv(100, 100, 2, 1, 16, F16), {"causal": True}
    holes = mask_of((0, 9, 100), (20, 40, 90))
    yield "bigbird(block=16)", qkv(100, 100, 2, 2, 16, F32), {"causal": True, "key_mask": holes}
    packed = torch.tensor([[0] * 30 + [1] * 50 + [2] * 20, [5] * 70 + [6] * 30])
    yield (
        *("windowed(window=20, sinks=2)", qkv(100, 100, 4, 2, 16, F32)),
        {"causal": True, "q_segments": packed},
    )


def few() -> Iterator[Case]:
    """Few queries over many keys: cut along the keys."""
    for spec in ("full", "windowed(window=300)", "windowed(window=40, sinks=3)"):
        yield spec, qkv(1, 1000, 4, 2, 16, F32), {"causal": True}
    yield "bigbird(block=16)", qkv(3, 700, 6, 2, 20, F32, 40), {"causal": True, "softcap": 3.0}
    holes = mask_of((0, 9, 700), (700, 0, 700))
    yield "windowed(window=300)", qkv(2, 700, 2, 2, 16, F32), {"causal": True, "key_mask": holes}
    yield "full", qkv(2, 600, 16, 1, 32, BF16), {}


def small() -> Iterator[Case]:
    """What planted bugs are looked for with."""
    yield "windowed(window=70)", qkv(150, 150, 4, 2, 16, F32), {"causal": True}
    yield "bigbird(block=16)", qkv(150, 150, 2, 2, 16, F32), {"causal": True}
    yield "full", qkv(2, 600, 4, 2, 16, F32), {"causal": True}


def conduct() -> dict[str, bool]:
    """Rules that are not a matter of digits, and which kernel serves what."""
    launched: list[str] = []

    def heard(kernel: Any, *args: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__)
        triton_launch.launch(kernel, *args, **options)

    in_triton.launch = few_in_triton.launch = heard  # type: ignore[assignment]
    found = {}
    q, k, v = (x.detach() for x in qkv(100, 100, 4, 2, 16, F32))
    mask = mask_of((0, 9, 100), (20, 40, 90))
    for spec in ("full", "windowed(window=20)", "bigbird(block=16)"):
        kw: dict[str, Any] = {"causal": True, "key_mask": mask, "impl": "triton"}
        clean = sa.attention(q, k, v, spec, **kw)
        hidden = ~mask[:, None, :, None]
        bad = [x.masked_fill(hidden, torch.nan) for x in (k, v)]
        found[f"{spec}: unseen keys are inert"] = torch.equal(
            clean, sa.attention(q, *bad, spec, **kw)
        )
        seen = v.clone()
        seen[0, :, 0] = torch.nan
        shown = sa.attention(q, k, seen, spec, **kw)
        found[f"{spec}: NaN that is seen stays visible"] = bool(shown[0, :, 0].isnan().all())
        found[f"{spec}: NaN reaches no other row of the batch"] = torch.equal(shown[1], clean[1])
        found[f"{spec}: the same bits alone"] = torch.equal(
            clean[1:], sa.attention(q[1:], k[1:], v[1:], spec, **{**kw, "key_mask": mask[1:]})
        )
        later = [x.detach() for x in qkv(70, 90, 4, 2, 16, F32)]
        for x in later[1:]:
            x[:, :, 70:] = torch.nan
        for x in later:
            x.requires_grad_()
        out = sa.attention(*later, spec, causal=True, q_offset=0, impl="triton")
        grads = torch.autograd.grad(out.sum(), later)
        found[f"{spec}: keys after all queries have no gradient"] = all(
            bool((x[:, :, 70:] == 0).all()) for x in grads[1:]
        )
    found["tiles served these"] = set(launched) == {"forward", "grad_queries", "grad_keys"}
    launched.clear()
    for spec in ("full", "windowed(window=40)", "windowed(window=40, sinks=4)", "bigbird(block=8)"):
        mech = sa.mechanism(spec)
        q, k, v = (x.detach() for x in qkv(330, 330, 4, 2, 16, F32))
        cache = mech.new_cache(2, 2, 16, 16, q_heads=4)
        parts, at = [], 0
        for n in (300, 1, 1, 5, 1, 22):
            own = [x[:, :, at : at + n] for x in (q, k, v)]
            parts.append(sa.attention(*own, mech, causal=True, cache=cache, impl="triton"))
            at += n
        whole = sa.attention(q, k, v, mech, causal=True, impl="reference")
        # Sixteen eps: each output is a mean of values of about 1, in two orders.
        most = 16 * torch.finfo(F32).eps
        error = (torch.cat(parts, dim=2) - whole).abs().max().item()
        found[f"{spec}: a cache gives the same as one call"] = error <= most
    found["steps were cut along the keys"] = {"part_of_keys", "merge_parts"} <= set(launched)
    return found


GROUPS = {f.__name__: f for f in (bands, lists, few, small)}


def main(name: str) -> None:
    if name == "conduct":
        print(json.dumps(conduct()))
        return
    found = {}
    for at, (spec, x, kw) in enumerate(GROUPS[name]()):
        few_numbers = x[0].shape[2] < 4
        found[f"{at} {spec} {x[0].dtype}"] = list(verdicts(spec, x, digits=few_numbers, **kw))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
