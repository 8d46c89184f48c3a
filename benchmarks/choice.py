"""What `impl="auto"` costs beside the better of `torch` and `native`, over a grid of lengths.

    python benchmarks/choice.py [--rounds 5] [--json PATH]

Each cell races the two implementations, interleaved; what auto takes is asked of `explain`. Its
cost is its median over the better one's: 1 where it chose well. The rule is held to a median within
5 % and a worst cell within 20 %.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from targets import THREADS, name_of, race, tensors

import sparseattn as sa
from sparseattn.harness import manifest, store

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SPECS = ("full", "windowed(window=256)", "bigbird", "strided", "dilated", "linear")
_BACKWARD_UP_TO = 2048  # longer ones take minutes, and change nothing


def once(spec: str, x: tuple[torch.Tensor, ...], backward: bool, impl: str) -> Any:
    """One call, with its gradients or without."""
    out = sa.attention(*x, spec, causal=True, impl=impl)
    return torch.autograd.grad(out.sum(), x) if backward else out


def cell(spec: str, n: int, dtype: torch.dtype, backward: bool, rounds: int) -> dict[str, Any]:
    """The medians of both implementations, and what auto takes."""
    x = tensors(n, dtype)
    if backward:
        x = tuple(y.requires_grad_() for y in x)
    chosen = sa.explain(*x, spec, causal=True).impl
    impls = ("torch", "native")
    often = max(1, 1024 // n)  # short calls in batches, that the clock can tell

    def many(impl: str) -> None:
        for _ in range(often):
            once(spec, x, backward, impl)

    times = race([partial(many, impl) for impl in impls], rounds)
    medians = dict(zip(impls, (statistics.median(t) / often for t in times), strict=True))
    cost = medians[chosen] / min(medians.values()) if chosen in medians else None
    return {
        "mechanism": spec,
        "length": n,
        "dtype": name_of(dtype),
        "backward": backward,
        "chosen": chosen,
        "torch_s": medians["torch"],
        "native_s": medians["native"],
        "cost": cost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="store the results there")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows = []
    dtypes = (torch.float32, torch.bfloat16)
    for spec, dtype, backward, n in product(SPECS, dtypes, (False, True), LENGTHS):
        if backward and n > _BACKWARD_UP_TO:
            continue
        row = cell(spec, n, dtype, backward, given.rounds)
        rows.append(row)
        print(
            f"{spec:24}{row['dtype']:6}{'with gradients' if backward else 'forward':16}{n:7}"
            f"  torch {1e3 * row['torch_s']:9.3f} ms  native {1e3 * row['native_s']:9.3f} ms"
            f"  {row['chosen']:8}{row['cost']:6.2f}",
            flush=True,
        )
    costs = [row["cost"] for row in rows]
    print(f"median {statistics.median(costs):.3f} (at most 1.05), worst {max(costs):.2f} (1.20)")
    if given.json is not None:
        facts = manifest.conditions(torch.device("cpu"), None)
        store.write(given.json, {"manifest": facts, "rows": rows})


if __name__ == "__main__":
    main()
