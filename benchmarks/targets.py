"""How fast the implementations are beside their peers on a CPU: ratios from one process.

    python benchmarks/targets.py [--only WORD] [--impl torch native] [--rounds 9] [--json PATH]

Each case races one call of this package, by each implementation, against a peer: the runs
alternate, in shuffled order, after a warm-up of all, and the ratio of the medians is printed beside
the target that we hold ourselves to. Every output is checked against the definition by the usual
budget before a ratio is printed. `targets_page.py` makes docs/performance.md of what is stored.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseattn as sa
from sparseattn.engines.native import library
from sparseattn.engines.softmax import in_native
from sparseattn.harness import manifest, measure, store
from sparseattn.layout import Grid
from sparseattn.testing import budgets

Run = Callable[[], Any]
THREADS = 2
IMPLS = ("torch", "native")


@dataclass
class Case:
    """A race: `ours` by each implementation against `peer`.

    Attributes:
        targets: the least ratio `peer / ours` that we want of each of `IMPLS`; None where none is
            set. An implementation beyond the last is left out.
        checked: raises where an implementation's numbers are wrong.
    """

    name: str
    peer_name: str
    targets: tuple[float | None, ...]
    ours: Callable[[str], Any]
    peer: Run
    checked: Callable[[str], None] = lambda impl: None
    length: int = 0


def race(runs: list[Run], rounds: int) -> list[list[float]]:
    """Seconds of each, in rounds of all."""
    seconds: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(rounds):
        for at in random.sample(range(len(runs)), len(runs)):
            start = time.perf_counter()
            runs[at]()
            seconds[at].append(time.perf_counter() - start)
    return seconds


def tensors(n: int, dtype: torch.dtype, dim: int = 64, heads: int = 8) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    return tuple(torch.randn(1, heads, n, dim, generator=g).to(dtype) for _ in range(3))


def check(
    mechanism: sa.Mechanism, q: Tensor, k: Tensor, v: Tensor, impl: str, **given: Any
) -> None:
    """The last 128 rows of a call, by the budget of the package."""
    with torch.no_grad():
        out = sa.attention(q, k, v, mechanism, impl=impl, **given)[:, :, -128:]
    call = sa.AttentionCall.make(q, k, v, **given).take_rows(slice(q.shape[2] - 128, None))
    error, budget = budgets.arithmetic(mechanism, q[:, :, -128:], k, v, call, out)
    if not error <= budget:
        raise SystemExit(f"{mechanism!r}, {impl}: arithmetic error {error:.3g} over {budget:.3g}")


def name_of(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "bf16"


def attend(
    name: str,
    mechanism: sa.Mechanism,
    x: tuple[Tensor, ...],
    targets: tuple[float | None, ...],
    peer: tuple[str, Run],
    backward: bool = False,
    **given: Any,
) -> Case:
    """A case of one call of `attention`, forward or with its gradients."""
    grad = torch.randn_like(x[2])

    def ours(impl: str) -> Any:
        out = sa.attention(*x, mechanism, impl=impl, **given)
        return torch.autograd.grad(out, x, grad) if backward else out

    return Case(
        f"{name}, N={x[0].shape[2]}, {name_of(x[0].dtype)}",
        peer[0],
        targets,
        ours,
        peer[1],
        lambda impl: check(mechanism, *x, impl, **given),
        x[0].shape[2],
    )


def sdpa(x: tuple[Tensor, ...], causal: bool, backward: bool = False) -> tuple[str, Run]:
    """torch's own exact attention."""
    grad = torch.randn_like(x[2])

    def run() -> Any:
        out = F.scaled_dot_product_attention(*x, is_causal=causal)
        return torch.autograd.grad(out, x, grad) if backward else out

    return "SDPA causal" if causal else "SDPA", run


def windows() -> Iterator[Case]:
    causal, both = sa.mechanism("windowed(window=256)"), sa.mechanism("windowed(window=129)")
    for dtype, first, second in (
        (torch.float32, (9, 18), (18, 34)),
        (torch.bfloat16, (8, 32), (19, 50)),
    ):
        x = tensors(8192, dtype)
        yield attend("window 256, causal", causal, x, first, sdpa(x, True), causal=True)
        yield attend("window +-128", both, x, second, sdpa(x, False))
    for dtype, targets in ((torch.float32, (15, 32)), (torch.bfloat16, (None, 50))):
        x = tuple(y.requires_grad_() for y in tensors(16384, dtype))
        name = "window 256, causal, forward + backward"
        yield attend(name, causal, x, targets, sdpa(x, True, True), backward=True, causal=True)
    for window in (256, 1024):
        x = tensors(2 * window, torch.float32)
        mech = sa.mechanism("windowed", window=window)
        for impl, factor in (("torch", 2.0), ("native", 1.5)):
            x = tensors(int(factor * window), torch.float32)
            peer = partial(sa.attention, *x, "full", causal=True, impl=impl)
            targets = (1.2,) if impl == "torch" else (None, 1.2)
            yield attend(
                f"window {window}, causal", mech, x, targets, (f"full, {impl}", peer), causal=True
            )


def block_sparse() -> Iterator[Case]:
    n, size = 4096, 64
    rows = n // size
    for density in (0.1, 0.25, 0.5):
        g = torch.Generator().manual_seed(0)
        kept = torch.rand(rows, rows, generator=g) < density
        kept.fill_diagonal_(True)
        counts = kept.sum(1)
        indptr = [0, *counts.cumsum(0).tolist()]
        layout = sa.BlockLayout(indptr, kept.nonzero()[:, 1].tolist(), size)
        mech = sa.mechanism("block_sparse", layout=layout)
        real = float(kept.float().mean())
        for dtype, native in ((torch.float32, 1.2), (torch.bfloat16, 2.1)):
            x = tensors(n, dtype)
            torch_target = 0.6 / real if dtype == torch.float32 else None
            targets = (torch_target, native / real)
            yield attend(f"64-blocks at density {real:.1%}", mech, x, targets, sdpa(x, False))


@dataclass(frozen=True)
class ReadyMade(sa.KernelizedLinear):
    """Positive features that the caller made: the engine alone."""

    name = "ready_made"

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return x

    def fused_maps(self, call: sa.AttentionCall) -> tuple[sa.FusedMap, sa.FusedMap]:
        return sa.FusedMap(), sa.FusedMap()


def linear() -> Iterator[Case]:
    n = 8192
    q, k, v = tensors(n, torch.float32)
    peer = sdpa((q, k, v), True)
    for features, targets in ((64, (14, 45)), (256, (5.5, 15))):
        fq, fk, _ = (x.abs() + 0.1 for x in tensors(n, torch.float32, dim=features))
        name = f"causal linear, {features} features ready made"
        yield attend(name, ReadyMade(), (fq, fk, v), targets, peer, causal=True)
    mech = sa.mechanism("linear")
    yield attend("causal linear, elu + 1", mech, (q, k, v), (12, 32), peer, causal=True)
    try:
        from performer_pytorch.performer_pytorch import (  # type: ignore[import-not-found]
            gaussian_orthogonal_random_matrix,
            softmax_kernel,
        )
    except ImportError:
        print("performer-pytorch is not installed: its feature map is left out", file=sys.stderr)
        return
    mech: Any = sa.mechanism("performer(features=256)")
    call = sa.AttentionCall.make(q, k, v, causal=True)
    positions = torch.arange(n)[None]
    projection = gaussian_orthogonal_random_matrix(256, 64)
    yield Case(
        f"FAVOR+ map, 256 features, N={n}, fp32",
        "performer-pytorch",
        (3,),
        lambda impl: mech.query_map(q, positions, call),
        lambda: softmax_kernel(q, projection_matrix=projection, is_query=True),
    )


def dense() -> Iterator[Case]:
    full = sa.mechanism("full")
    for n in (1024, 4096, 16384):
        for dtype in (torch.float32, torch.bfloat16):
            for causal in (True, False):
                half = dtype == torch.bfloat16
                native = (2.3 if causal else 2.1) if half else (1.3 if causal else 1.08)
                torch_target = 1.0 if n == 4096 and not half else None
                for backward in (False, True):
                    if backward and n == 16384:
                        continue  # minutes: 4,096 shows it
                    x = tensors(n, dtype)
                    if backward:
                        x = tuple(y.requires_grad_() for y in x)
                    name = f"full, {'causal' if causal else 'not causal'}"
                    name += ", forward + backward" if backward else ""
                    targets = (None, 1.0) if backward else (torch_target, native)
                    yield attend(
                        *(name, full, x, targets, sdpa(x, causal, backward), backward),
                        causal=causal,
                    )


# What is measured, its value, and what it may be at most.
Limit = tuple[str, float | None, float]


def bare_native(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """The C++ kernel of a causal call, alone."""
    heard: list[tuple[str, bytes]] = []
    kept: list[Any] = []  # all that the block points to
    call, pack = library.call, in_native.pack

    def packed(*given: Any) -> bytes:
        kept.append(given)
        return pack(*given)

    library.call, in_native.pack = lambda name, block: heard.append((name, block)), packed
    try:
        sa.attention(q, k, v, causal=True, impl="native")
    finally:
        library.call, in_native.pack = call, pack
    return lambda kept=kept: call(*heard[0])


def overhead(rounds: int) -> Iterator[Limit]:
    """Microseconds that a public call costs beyond its kernel, at N = 128."""
    q, k, v = tensors(128, torch.float32)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def many(run: Run) -> Run:
        return lambda: [run() for _ in range(50)]

    # A causal call without gradients; torch's kernel and ours are called with what it calls them.
    bare: dict[str, Run] = {"torch": lambda: kernel(q, k, v, 0.0, True)}
    if not library.missing():
        bare["native"] = bare_native(q, k, v)
    for impl, most in (("torch", 60.0), ("native", 30.0)):
        if impl in bare:
            call = partial(sa.attention, q, k, v, "full", causal=True, impl=impl)
            ours, alone = race([many(call), many(bare[impl])], rounds)
            extra = [1e6 * (a - b) / 50 for a, b in zip(ours, alone, strict=True)]
            yield f"{impl}, us", statistics.median(extra), most


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

    for impl in available():
        run = partial(sa.attention, q, k, v, mech, causal=True, impl=impl)
        run()
        peak = measure.peak_bytes(run, torch.device("cpu"))
        size = 4 * q.numel() * q.element_size()
        yield f"{impl}, peak over inputs + outputs", None if peak is None else peak / size, 2.0


LIMITS: dict[str, Callable[[int], Iterator[Limit]]] = {
    "call overhead at N=128": overhead,
    "layout of 1,000,000 tokens": layouts,
    "memory of window 256 at N=65536": memory,
}


def available() -> list[str]:
    """The implementations that this machine has."""
    return [impl for impl in IMPLS if impl != "native" or not library.missing()]


def measured(case: Case, impls: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of a case: one for each implementation that it has a place for."""
    taken = [
        (impl, target)
        for impl, target in zip(IMPLS, case.targets, strict=False)
        if impl in impls and not (target is None and len(case.targets) > 1 and impl == "torch")
    ]
    served = []
    for impl, target in taken:
        try:
            case.checked(impl)
        except sa.UnsupportedCallError as error:
            print(f"{case.name}: {impl} is left out: {error.reasons[0]}", file=sys.stderr)
            continue
        served.append((impl, target))
    if not served:
        return
    *ours, peer = race([*(partial(case.ours, impl) for impl, _ in served), case.peer], rounds)
    for (impl, target), own in zip(served, ours, strict=True):
        each = sorted(p / o for p, o in zip(peer, own, strict=True))
        yield {
            "name": case.name,
            "peer": case.peer_name,
            "impl": impl,
            "ratio": statistics.median(peer) / statistics.median(own),
            "quartiles": [each[len(each) // 4], each[(3 * len(each)) // 4]],
            "target": target,
            "ours_s": statistics.median(own),
            "peer_s": statistics.median(peer),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--longest", type=int, default=2**20, help="cases of no more queries")
    parser.add_argument("--impl", nargs="+", default=list(IMPLS), choices=IMPLS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="store the results there")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows: list[dict[str, Any]] = []
    impls = [impl for impl in available() if impl in given.impl]
    print(f"{'case':58}{'beside':16}{'impl':8}{'ratio':>8}{'spread':>14}{'target':>8}")
    for group in (windows, block_sparse, linear, dense):
        for case in group():
            if given.only not in case.name or case.length > given.longest:
                continue
            for row in measured(case, impls, given.rounds):
                low, high = row["quartiles"]
                target = row["target"]
                print(
                    f"{case.name:58}{case.peer_name:16}{row['impl']:8}{row['ratio']:8.2f}"
                    f"{f'{low:.2f}-{high:.2f}':>14}{'-' if target is None else f'{target:.2f}':>8}"
                    f"{'' if target is None or row['ratio'] >= target else '  short'}",
                    flush=True,
                )
                rows.append(row)
    print(f"\n{'limit':58}{'value':>12}{'at most':>12}")
    for name, limit in LIMITS.items():
        if given.only not in name:
            continue
        for what, value, most in limit(given.rounds):
            shown = "-" if value is None else f"{value:.2f}"
            over = "  over" if value is not None and value > most else ""
            print(f"{f'{name}: {what}':58}{shown:>12}{most:12.2f}{over}", flush=True)
            rows.append({"name": f"{name}: {what}", "value": value, "target": most})
    if given.json is not None:
        facts = manifest.conditions(torch.device("cpu"), None)
        store.write(given.json, {"manifest": facts, "rows": rows})


if __name__ == "__main__":
    main()
