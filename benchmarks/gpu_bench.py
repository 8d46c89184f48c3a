"""The shapes that are timed on a GPU, ours against peers, as shares of a measured roof."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import gpu_model
import torch
import torch.nn.functional as F
from torch import Tensor

import sparseattn as sa

Run = Callable[[], Any]
Timer = Callable[[Run], float]  # milliseconds of one run
ROUNDS = 5
ADAPTERS = ("flex", "flash_attn", "fla")  # peers that plugins reach, where they are installed
_LONGEST_DENSE = 16384  # beyond it one dense run takes a tenth of a second


class Roof(NamedTuple):
    """What the device reaches: operations and bytes a second, copied (both ways) and read."""

    flops_per_s: float
    bytes_per_s: float
    read_bytes_per_s: float


def roof(timer: Timer, device: str, size: int = 8192, numbers: int = 2**28) -> Roof:
    """A matrix product of `size`, a copy of `numbers` of bfloat16, and their sum."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product = timer(lambda: a @ b)
    x = torch.zeros(numbers, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    copy = timer(lambda: y.copy_(x))
    words = x.view(torch.int32)
    read = timer(lambda: words.max())
    return Roof(2e3 * size**3 / product, 2e3 * x.nbytes / copy, 1e3 * x.nbytes / read)


@dataclass(frozen=True)
class Shape:
    """A line of the benchmark: a call on random normal bfloat16 tensors.

    Attributes:
        queries: of a decoding step; as many as keys where it is 0.
        dense: whether dense attention is raced too, whatever its result.
        density: of the pairs, where blocks are named.
    """

    name: str
    mech: Any
    batch: int
    heads: int
    kv_heads: int
    n: int
    width: int
    causal: bool = True
    backward: bool = False
    queries: int = 0
    dense: bool = True
    density: float | None = None

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        g = torch.Generator(device).manual_seed(0)
        rows = self.queries or self.n
        shapes = ((self.heads, rows), (self.kv_heads, self.n), (self.kv_heads, self.n))
        return tuple(
            torch.randn((self.batch, heads, length, self.width), generator=g, device=device).to(
                torch.bfloat16
            )
            for heads, length in shapes
        )

    def work(self) -> tuple[float, float]:
        """The least operations and bytes, as `gpu_model` counts them."""
        if self.queries:
            row = gpu_model.decode_row(self.batch, self.n, self.kv_heads, self.width, self.heads)
            return row.flops, row.bytes
        if not isinstance(self.mech, sa.MaskedSoftmax):
            row = gpu_model.linear_row(self.batch, self.n, self.heads, self.width)
            return row.flops, row.bytes
        if self.mech.is_dynamic:  # as many keys as its blocks hold; fewer where there are no more
            most = self.mech.top * self.mech.block
            seen = sum(min(i + 1, most) for i in range(self.n))
            size = 2 * (2 * self.heads + 2 * self.kv_heads) * self.n * self.width
            return 4.0 * self.width * self.batch * self.heads * seen, float(self.batch * size)
        call = gpu_model.shaped(
            self.heads, self.kv_heads, self.n, self.width, self.batch, self.causal
        )
        kernels = ("forward", "grad_queries", "grad_keys") if self.backward else ("forward",)
        rows = list(gpu_model.softmax_rows(self.name, self.mech, call, kernels))
        return sum(row.flops for row in rows), sum(row.bytes for row in rows)


def shapes() -> list[Shape]:
    """The benchmark, what matters most first: it may be cut off."""
    made = []

    def windows(n: int, window: int, width: int, kv: int, backward: bool = False) -> None:
        mech = sa.mechanism("windowed", window=window)
        name = f"window {window}, N={n}, D={width}, kv heads {kv}"
        name += ", forward + backward" if backward else ""
        dense = n <= _LONGEST_DENSE and window == 1024 and kv == 32
        made.append(Shape(name, mech, 1, 32, kv, n, width, backward=backward, dense=dense))

    for window in (1024, 4096, 256):
        windows(65536, window, 128, 32)
    windows(65536, 1024, 128, 32, backward=True)
    for n, density in ((16384, 0.25), (16384, 0.1), (16384, 0.5), (32768, 0.25), (32768, 0.1)):
        layout = gpu_model.scattered(n, density)
        mech = sa.mechanism("block_sparse", layout=layout)
        name = f"128-blocks at {density:.0%}, N={n}, D=128"
        kept = len(layout.indices) / (n // 128) ** 2  # at random, about as many as asked for
        shape = Shape(name, mech, 1, 32, 32, n, 128, causal=False, density=kept)
        made.append(replace(shape, dense=n <= _LONGEST_DENSE))
    full, linear = sa.mechanism("full"), sa.mechanism("linear")
    for n in (16384, 4096):
        made.append(Shape(f"dense causal, N={n}, D=128", full, 1, 32, 32, n, 128))
        name = f"dense, N={n}, D=128"
        made.append(Shape(name, full, 1, 32, 32, n, 128, causal=False))
    for batch, n, heads, width in gpu_model.LINEAR:
        name = f"linear {batch}x{n}x{heads}x{width}"
        made.append(Shape(name, linear, batch, heads, heads, n, width, dense=False))
    for kv in (32, 8):
        for batch, n in gpu_model.DECODE:
            name = f"decode B={batch}, N={n}, kv heads {kv}"
            made.append(Shape(name, full, batch, 32, kv, n, 128, queries=1))
    for n in (16384, 65536):
        mech = sa.mechanism("topk_blocks")
        shape = Shape(f"{mech}, N={n}, D=128, kv heads 8", mech, 1, 32, 8, n, 128)
        made.append(replace(shape, dense=n <= _LONGEST_DENSE))
    for window in (1024, 256, 4096):
        for n in (16384, 4096, 262144):
            for kv in (32, 8):
                windows(n, window, 128, kv)
        windows(65536, window, 64, 32)
        windows(65536, window, 128, 8, backward=True)
    return [one for one in made if one.n > getattr(one.mech, "window", 0)]


def call_of(shape: Shape, inputs: tuple[Tensor, ...], impl: str) -> Run:
    """One run of a shape by an implementation."""

    def attend() -> Tensor:
        return sa.attention(*inputs, shape.mech, causal=shape.causal, impl=impl)

    return _with_backward(shape, inputs, attend)


def _with_backward(shape: Shape, inputs: tuple[Tensor, ...], attend: Run) -> Run:
    if not shape.backward:
        return attend
    for x in inputs:
        x.requires_grad_()
    grad = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(attend(), inputs, grad)


def peers(shape: Shape, inputs: tuple[Tensor, ...]) -> dict[str, Run]:
    """Every peer by its name, whether or not it serves this shape."""
    found = {name: call_of(shape, inputs, name) for name in ADAPTERS}
    if shape.mech.name == "linear" and not shape.backward:
        found["fla, features given"] = _fla(inputs)
    if shape.dense:

        def dense() -> Tensor:
            causal = shape.causal and not shape.queries
            return F.scaled_dot_product_attention(
                *inputs, is_causal=causal, enable_gqa=shape.heads != shape.kv_heads
            )

        found["sdpa, dense"] = _with_backward(shape, inputs, dense)
    return found


def _fla(inputs: tuple[Tensor, ...]) -> Run:
    """fla's kernel with its own normaliser, on features that are there already."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in inputs)
    q, k = (F.elu(x) + 1 for x in (q, k))

    def run() -> Any:
        from fla.ops.linear_attn import chunk_linear_attn

        return chunk_linear_attn(q, k, v, scale=1.0, normalize=True)

    return run


def race(runs: dict[str, Run], timer: Timer, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Milliseconds of each run, in rounds of all, each in a new order."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            found[name].append(timer(runs[name]))
    return found


def measured(
    shape: Shape, top: Roof, timer: Timer, device: str, rounds: int = ROUNDS
) -> dict[str, Any]:
    """A row of the benchmark; `reason` says why there is no time of ours."""
    row: dict[str, Any] = {"call": shape.name, "ms": None, "reason": "", "peers_ms": {}}
    inputs = shape.inputs(device)
    ours = call_of(shape, inputs, "triton")
    try:
        ours()
    except Exception as error:  # of a compiler, a driver, or a refusal: the next row may do
        return row | {"reason": f"{type(error).__name__}: {error}"[:300]}
    runs, left_out = {"ours": ours}, {}
    for name, run in peers(shape, inputs).items():
        try:
            run()
            runs[name] = run
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {error}"[:120]
    times = race(runs, timer, rounds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    flops, size = shape.work()
    bandwidth = top.read_bytes_per_s if shape.queries else top.bytes_per_s
    by_flops, by_bytes = 1e3 * flops / top.flops_per_s, 1e3 * size / bandwidth
    ms = medians.pop("ours")
    return row | {
        "ms": ms,
        "rounds_ms": times,
        "peers_ms": medians,
        "left_out": left_out,
        "floor_ms": max(by_flops, by_bytes),
        "binds": "arithmetic" if by_flops > by_bytes else "memory",
        "share": max(by_flops, by_bytes) / ms,
        "density": shape.density,
    }


def measure_all(
    given: list[Shape],
    top: Roof,
    timer: Timer,
    device: str,
    done: set[str],
    late: Callable[[], bool],
) -> Iterator[dict[str, Any]]:
    """Rows of the shapes that are not done, until it is late."""
    for shape in given:
        if late():
            return
        if shape.name not in done:
            yield measured(shape, top, timer, device)
