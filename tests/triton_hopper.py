"""What tests ask of the forward kernel for Hopper in a process that has a triton: one JSON value.

`python triton_hopper.py served` prints which calls would launch it, `gradients` the kernels of
gradients, `keys` how many kernels 50 calls compile, and `compiled` what each cut of its table
compiles to.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import gpu_compile
import torch
from torch import Tensor

import sparseattn as sa
from sparseattn.engines import triton_launch

SM_90 = triton_launch.Target("cuda", 90)
BF16 = torch.bfloat16


def launches(run: Callable[[], Any]) -> list[triton_launch.Launch]:
    return gpu_compile.launches_of(SM_90, run)


def listed() -> sa.Mechanism:
    """Blocks of 128 of 896 queries and keys; some queries see none."""
    layout = sa.BlockLayout([0, 2, 2, 3, 4, 5, 6, 7], [0, 5, 2, 3, 4, 5, 6], 128)
    return sa.mechanism("block_sparse", layout=layout)


def served() -> dict[str, list[str]]:
    """The kernels that a call launches."""

    def found(q: Tensor, k: Tensor, spec: Any, **kw: Any) -> list[str]:
        kw = {"causal": True, "impl": "triton", **kw}
        run = lambda: sa.attention(q, k, k, spec, **kw)  # noqa: E731
        return [launch.kernel.__name__ for launch in launches(run)]

    window = "windowed(window=100)"
    blocks = listed()
    q, k = torch.zeros(2, 4, 900, 64, dtype=BF16), torch.zeros(2, 2, 900, 64, dtype=BF16)
    wide = torch.zeros(2, 4, 900, 96, dtype=BF16)
    rows = torch.zeros(900, 2, 4, 65, dtype=BF16).permute(1, 2, 0, 3)[..., :64]
    holes = torch.ones(2, 900, dtype=torch.bool)
    holes[:, 450] = False
    packed = torch.tensor([[0] * 300 + [1] * 600] * 2)
    many = torch.arange(900).div(30, rounding_mode="floor").repeat(2, 1)
    return {
        "band": found(q, k, window),
        "full": found(q, k, "full"),
        "heads between queries": found(q.transpose(1, 2).contiguous().transpose(1, 2), k, window),
        "packed": found(q, k, window, q_segments=packed),
        "queries before all keys": found(q, k, window, q_offset=-450),
        "blocks": found(*(x[:, :, :896] for x in (q, k)), blocks, causal=False),
        "blocks, causal": found(*(x[:, :, :896] for x in (q, k)), blocks),
        "many documents": found(q, k, window, q_segments=many),
        "holes": found(q, k, window, key_mask=holes),
        "softcap": found(q, k, window, softcap=3.0),
        "scale below 0": found(q, k, window, scale=-1.0),
        "two bands": found(q, k, "windowed(window=100, sinks=4)"),
        "width": found(wide, wide, window),
        "dtype": found(q.float(), k.float(), window),
        "steps": found(rows, rows, window),
        "one row for all": found(q, k[:, :, :1].expand(-1, -1, 900, -1), window),
    }


def gradients() -> dict[str, list[str]]:
    """The kernels that the gradients of a call launch."""

    def found(width: int, dtype: torch.dtype, spec: Any, **kw: Any) -> list[str]:
        q, k, v = (torch.zeros(2, 4, 900, width, dtype=dtype).requires_grad_() for _ in range(3))

        def run() -> None:
            out = sa.attention(q, k, v, spec, causal=True, impl="triton", **kw)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

        return [launch.kernel.__name__ for launch in launches(run)][1:]

    window = "windowed(window=100)"
    return {
        "band": found(128, BF16, window),
        "full": found(128, torch.float16, "full"),
        "narrow heads": found(64, BF16, window),
        "softcap": found(128, BF16, window, softcap=3.0),
        "lists": found(128, BF16, "windowed(window=100, sinks=4)"),
        "dtype": found(128, torch.float32, window),
    }


def keys() -> int:
    """How many kernels compile in 50 launches of other lengths, batches and windows."""
    found = set()
    for at in range(50):
        n, batch, heads = 520 + 7 * at, 1 + at % 3, 1 + at % 4
        x = torch.zeros(batch, heads, n, 64, dtype=BF16)
        spec = f"windowed(window={n // 3})"
        run = lambda x=x, s=spec: sa.attention(x, x, x, s, causal=True, impl="triton")  # noqa: E731
        for launch in launches(run):
            found.add(gpu_compile.key_of(SM_90, launch))
    return len(found)


def compiled() -> list[dict[str, Any]]:
    rows = []
    for spec in ("full", "windowed(window=100)", listed()):
        for d, dv in ((64, 64), (128, 128), (128, 64)):
            q, v = (torch.zeros(1, 2, 896, width, dtype=BF16) for width in (d, dv))
            (launch,) = launches(lambda q=q, v=v, s=spec: sa.attention(q, q, v, s, impl="triton"))
            found = gpu_compile.Found(SM_90, launch, "", [f"{spec} {d} {dv}"])
            row = gpu_compile.row_of(found)
            rows.append(row | {"problems": gpu_compile.problems(row)})
    return rows


if __name__ == "__main__":
    print(
        json.dumps(
            {"served": served, "gradients": gradients, "keys": keys, "compiled": compiled}[
                sys.argv[1]
            ]()
        )
    )
