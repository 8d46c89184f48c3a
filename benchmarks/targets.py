"""How fast the pure-PyTorch implementations are beside their peers: ratios from one process.

    python benchmarks/targets.py [--only WORD] [--rounds 9] [--json PATH]

Each line races a call of this package against a peer: the runs alternate, in shuffled order, after
a warm-up of both, and the ratio of the medians is printed beside the target that we hold ourselves
to. Every output is checked against the definition by the usual budget before a ratio is printed.
Peers that are not installed are left out, and said so: `pip install performer-pytorch`.

Times of a shared machine drift; the ratio of one run drifts less, and its spread is shown.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseattn as sa
from sparseattn.harness import manifest, measure, store
from sparseattn.layout import Grid
from sparseattn.testing import budgets

Run = Callable[[], Any]
THREADS = 2


@dataclass
class Case:
    """A race: `ours` against `peer`, and the least ratio `peer / ours` that we want."""

    name: str
    peer_name: str
    target: float
    ours: Run
    peer: Run


def race(ours: Run, peer: Run, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each, in rounds of both."""
    runs, seconds = (ours, peer), ([], [])  # type: tuple[Run, Run], tuple[list[float], list[float]]
    for run in runs:
        run()
    for _ in range(rounds):
        for at in random.sample((0, 1), 2):
            start = time.perf_counter()
            runs[at]()
            seconds[at].append(time.perf_counter() - start)
    return seconds


def tensors(n: int, dtype: torch.dtype, dim: int = 64, heads: int = 8) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    return tuple(torch.randn(1, heads, n, dim, generator=g).to(dtype) for _ in range(3))


def check(mechanism: sa.Mechanism, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> None:
    """The last 128 rows of a call, by the budget of the package."""
    out = sa.attention(q, k, v, mechanism, impl="torch", **given)[:, :, -128:]
    call = sa.AttentionCall.make(q, k, v, **given).take_rows(slice(q.shape[2] - 128, None))
    error, budget = budgets.arithmetic(mechanism, q[:, :, -128:], k, v, call, out)
    if not error <= budget:
        raise SystemExit(f"{mechanism!r}: arithmetic error {error:.3g} over {budget:.3g}")


def name_of(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "bf16"


def windows() -> Iterator[Case]:
    for dtype, causal_target, both_target in ((torch.float32, 9, 18), (torch.bfloat16, 8, 19)):
        q, k, v = tensors(8192, dtype)
        causal, both = sa.mechanism("windowed(window=256)"), sa.mechanism("windowed(window=129)")
        check(causal, q, k, v, causal=True)
        check(both, q, k, v)
        yield Case(
            f"window 256, causal, N=8192, {name_of(dtype)}",
            "SDPA causal",
            causal_target,
            lambda q=q, k=k, v=v, m=causal: sa.attention(q, k, v, m, causal=True, impl="torch"),
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        )
        yield Case(
            f"window +-128, N=8192, {name_of(dtype)}",
            "SDPA",
            both_target,
            lambda q=q, k=k, v=v, m=both: sa.attention(q, k, v, m, impl="torch"),
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
        )
    q, k, v = (x.requires_grad_() for x in tensors(16384, torch.float32))
    grad = torch.randn_like(v)
    yield Case(
        "window 256, causal, forward + backward, N=16384, fp32",
        "SDPA causal",
        15,
        lambda: torch.autograd.grad(
            sa.attention(q, k, v, "windowed(window=256)", causal=True, impl="torch"),
            (q, k, v),
            grad,
        ),
        lambda: torch.autograd.grad(
            F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad
        ),
    )
    for window in (256, 1024):
        q, k, v = tensors(2 * window, torch.float32)
        mech = sa.mechanism("windowed", window=window)
        check(mech, q, k, v, causal=True)
        yield Case(
            f"window {window}, causal, N={2 * window}, fp32",
            "full",
            1.2,
            lambda q=q, k=k, v=v, m=mech: sa.attention(q, k, v, m, causal=True, impl="torch"),
            lambda q=q, k=k, v=v: sa.attention(q, k, v, "full", causal=True, impl="torch"),
        )


def block_sparse() -> Iterator[Case]:
    n, size = 4096, 64
    q, k, v = tensors(n, torch.float32)
    rows = n // size
    for density in (0.1, 0.25, 0.5):
        g = torch.Generator().manual_seed(0)
        kept = torch.rand(rows, rows, generator=g) < density
        kept.fill_diagonal_(True)
        counts = kept.sum(1)
        indptr = [0, *counts.cumsum(0).tolist()]
        layout = sa.BlockLayout(indptr, kept.nonzero()[:, 1].tolist(), size)
        mech = sa.mechanism("block_sparse", layout=layout)
        check(mech, q, k, v)
        real = float(kept.float().mean())
        yield Case(
            f"64-blocks at density {real:.1%}, N={n}, fp32",
            "SDPA",
            0.6 / real,
            lambda m=mech: sa.attention(q, k, v, m, impl="torch"),
            lambda: F.scaled_dot_product_attention(q, k, v),
        )


@dataclass(frozen=True)
class ReadyMade(sa.KernelizedLinear):
    """Positive features that the caller made: the engine alone."""

    name = "ready_made"

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return x


def linear() -> Iterator[Case]:
    n = 8192
    for features, target in ((64, 14.0), (256, 5.5)):
        q, k, v = tensors(n, torch.float32)
        fq, fk, _ = (x.abs() + 0.1 for x in tensors(n, torch.float32, dim=features))
        check(ReadyMade(), fq, fk, v, causal=True)
        yield Case(
            f"causal linear, {features} features ready made, N={n}, fp32",
            "SDPA causal",
            target,
            lambda fq=fq, fk=fk, v=v: sa.attention(
                fq, fk, v, ReadyMade(), causal=True, impl="torch"
            ),
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        )
    q, k, v = tensors(n, torch.float32)
    check(sa.mechanism("linear"), q, k, v, causal=True)
    yield Case(
        f"causal linear, elu + 1, N={n}, fp32",
        "SDPA causal",
        12,
        lambda: sa.attention(q, k, v, "linear", causal=True, impl="torch"),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    )
    try:
        from performer_pytorch.performer_pytorch import (  # type: ignore[import-not-found]
            gaussian_orthogonal_random_matrix,
            softmax_kernel,
        )
    except ImportError:
        print("performer-pytorch is not installed: its feature map is left out", file=sys.stderr)
        return
    mech = sa.mechanism("performer(features=256)")
    call = sa.AttentionCall.make(q, k, v, causal=True)
    positions = torch.arange(n)[None]
    projection = gaussian_orthogonal_random_matrix(256, 64)
    yield Case(
        f"FAVOR+ map, 256 features, N={n}, fp32",
        "performer-pytorch",
        3,
        lambda: mech.query_map(q, positions, call),
        lambda: softmax_kernel(q, projection_matrix=projection, is_query=True),
    )


def dense() -> Iterator[Case]:
    for causal in (True, False):
        q, k, v = tensors(4096, torch.float32)
        check(sa.mechanism("full"), q, k, v, causal=causal)
        yield Case(
            f"full, {'causal' if causal else 'not causal'}, N=4096, fp32",
            "SDPA",
            1,
            lambda q=q, k=k, v=v, c=causal: sa.attention(q, k, v, causal=c, impl="torch"),
            lambda q=q, k=k, v=v, c=causal: F.scaled_dot_product_attention(q, k, v, is_causal=c),
        )


# What is measured, its value, and what it may be at most.
Limit = tuple[str, float | None, float]


def overhead(rounds: int) -> Iterator[Limit]:
    """Microseconds that a public call costs beyond torch's kernel, at N = 128."""
    q, k, v = tensors(128, torch.float32)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def many(run: Run) -> Run:
        return lambda: [run() for _ in range(50)]

    ours, bare = race(
        many(lambda: sa.attention(q, k, v, "full", causal=True, impl="torch")),
        many(lambda: kernel(q, k, v, 0.0, True)),
        rounds,
    )
    extra = [1e6 * (a - b) / 50 for a, b in zip(ours, bare, strict=True)]
    yield "us", statistics.median(extra), 60.0


def layouts(rounds: int) -> Iterator[Limit]:
    """Milliseconds and MB of the layouts of 1,000,000 tokens."""
    n = 1_000_000
    for spec in ("windowed(window=256)", "bigbird"):
        mech = sa.mechanism(spec)
        times, held = [], 0
        for _ in range(rounds):
            start = time.perf_counter()
            held = mech.clauses(Grid(n, n, True, 0)).lower(64, 64).nbytes
            times.append(time.perf_counter() - start)
        yield f"{spec}, ms", 1e3 * statistics.median(times), 50.0
        yield f"{spec}, MB", held / 1e6, 64.0


def memory(_: int) -> Iterator[Limit]:
    """Extra peak memory of a windowed call at N = 65,536 over its inputs plus outputs."""
    q, k, v = tensors(65536, torch.float32)
    mech = sa.mechanism("windowed(window=256)")

    def run() -> Tensor:
        return sa.attention(q, k, v, mech, causal=True, impl="torch")

    run()
    peak = measure.peak_bytes(run, torch.device("cpu"))
    size = 4 * q.numel() * q.element_size()
    yield "peak over inputs + outputs", None if peak is None else peak / size, 2.0


LIMITS: dict[str, Callable[[int], Iterator[Limit]]] = {
    "call overhead at N=128": overhead,
    "layout of 1,000,000 tokens": layouts,
    "memory of window 256 at N=65536": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="store the results there")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows: list[dict[str, Any]] = []
    print(f"{'case':58}{'beside':20}{'ratio':>8}{'spread':>14}{'target':>8}")
    for group in (windows, block_sparse, linear, dense):
        for case in group():
            if given.only not in case.name:
                continue
            ours, peer = race(case.ours, case.peer, given.rounds)
            ratio = statistics.median(peer) / statistics.median(ours)
            each = sorted(p / o for p, o in zip(peer, ours, strict=True))
            low, high = each[len(each) // 4], each[(3 * len(each)) // 4]
            print(
                f"{case.name:58}{case.peer_name:20}{ratio:8.2f}{f'{low:.2f}-{high:.2f}':>14}"
                f"{case.target:8.2f}{'' if ratio >= case.target else '  short'}",
                flush=True,
            )
            rows.append(
                {
                    "name": case.name,
                    "peer": case.peer_name,
                    "ratio": ratio,
                    "quartiles": [low, high],
                    "target": case.target,
                    "ours_s": statistics.median(ours),
                    "peer_s": statistics.median(peer),
                }
            )
    print(f"\n{'limit':58}{'value':>12}{'at most':>12}")
    for name, measured in LIMITS.items():
        if given.only not in name:
            continue
        for what, value, most in measured(given.rounds):
            shown = "-" if value is None else f"{value:.2f}"
            over = "  over" if value is not None and value > most else ""
            print(f"{f'{name}: {what}':58}{shown:>12}{most:12.2f}{over}", flush=True)
            rows.append({"name": f"{name}: {what}", "value": value, "target": most})
    if given.json is not None:
        facts = manifest.conditions(torch.device("cpu"), None)
        store.write(given.json, {"manifest": facts, "rows": rows})


if __name__ == "__main__":
    main()
