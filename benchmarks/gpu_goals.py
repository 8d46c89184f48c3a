"""What a GPU run is held to: facts that are no timing of a shape, and goals."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseattn as sa

Document = dict[str, Any]
_COLD = """
import time, torch, sparseattn as sa
x = torch.randn(1, 8, 1024, 128, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
start = time.perf_counter()
sa.attention(x, x, x, "windowed(window=256)", causal=True, impl="triton")
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def cold() -> float:
    """Seconds of the first call in a process, with nothing compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(x for x in sys.path if x)
        env = {**os.environ, "TRITON_CACHE_DIR": folder, "PYTHONPATH": path}
        words = [sys.executable, "-c", _COLD]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _normal(device: str, *shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=g, device=device).to(torch.bfloat16)


def _attend(x: Tensor, spec: str, **more: Any) -> Tensor:
    return sa.attention(x, x, x, spec, causal=True, impl="triton", **more)


def compilations(device: str) -> int:
    """Kernels compiled over 50 lengths, three batches and three windows, after the first call."""
    import triton

    found: list[str] = []
    _attend(_normal(device, 1, 4, 2048, 128), "windowed(window=256)")
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **given: found.append(given["repr"])
    try:
        for at in range(50):
            x = _normal(device, 1 + at % 3, 4, 1100 + 37 * at, 128)
            _attend(x, f"windowed(window={(200, 256, 511)[at % 3]})")
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    return len(found)


def same_bits(device: str) -> bool:
    """Whether output and gradients of two runs are the same to the bit."""

    def run() -> list[Tensor]:
        q, k, v = (_normal(device, 2, 8, 4096, 128, seed=i).requires_grad_() for i in range(3))
        out = sa.attention(q, k, v, "windowed(window=1024)", causal=True, impl="triton")
        return [out, *torch.autograd.grad(out, (q, k, v), _normal(device, *out.shape, seed=3))]

    return all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def _error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def error_ratio(device: str, spec: str) -> float:
    """Error of a causal call in bfloat16 over that of torch's own, against float64."""
    q, k, v = (_normal(device, 1, 4, 4096, 128, seed=i) for i in range(3))
    mech = sa.mechanism(spec)
    mask = mech.mask(sa.AttentionCall.make(q, k, v, causal=True))[:, :1].to(device)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    ours = sa.attention(q, k, v, mech, causal=True, impl="triton")
    return _error(ours, exact) / _error(theirs, exact)


def in_a_graph(device: str) -> bool:
    """Whether a decoding step that a CUDA graph replays gives what it gives outside of one."""
    q, k, v = (_normal(device, 2, 8, n, 128, seed=n) for n in (1, 4096, 4097))
    v = v[:, :, 1:]

    def step() -> Tensor:
        return sa.attention(q, k, v, "windowed(window=1000)", causal=True, impl="triton")

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    out.zero_()
    graph.replay()
    return torch.equal(out, expected)


def microseconds_of_a_call(device: str) -> float:
    """Of the host: a call on tensors so small that the GPU waits for it."""
    x = _normal(device, 1, 4, 512, 64)
    for _ in range(20):
        _attend(x, "windowed(window=64)")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        _attend(x, "windowed(window=64)")
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 200 * 1e6


def facts(device: str) -> dict[str, Callable[[], Any]]:
    """Each fact by its name; none takes more than seconds."""
    return {
        "first call, cold, s": cold,
        "compilations over 50 lengths": lambda: compilations(device),
        "forward and backward have the same bits twice": lambda: same_bits(device),
        "error over torch's, full": lambda: error_ratio(device, "full"),
        "error over torch's, window 256": lambda: error_ratio(device, "windowed(window=256)"),
        "a decoding step in a CUDA graph is right": lambda: in_a_graph(device),
        "host us of a small call": lambda: microseconds_of_a_call(device),
    }


def found(find: Callable[[], Any]) -> Any:
    """A fact, or as text what came instead of it: it must not cost the rows of the others."""
    try:
        return find()
    except Exception as error:  # of a compiler or a driver
        return f"{type(error).__name__}: {error}"[:300]


class Goal(NamedTuple):
    """A goal, what it asks for, what was found, and whether that is enough."""

    goal: str
    asked: str
    found: str
    met: bool


def goals(document: Document) -> Iterator[Goal]:
    """The goals for which the document has rows."""
    rows = {row["call"]: row for row in document["rows"]}

    def ratio(name: str, peer: str, least: float) -> Iterator[Goal]:
        if name in rows and peer in rows[name]["peers_ms"]:
            found = rows[name]["peers_ms"][peer] / rows[name]["ms"]
            yield Goal(name, f">= {least:g}x {peer}", f"{found:.2f}x", found >= least)

    def share(name: str, least: float) -> Iterator[Goal]:
        if name in rows:
            row = rows[name]
            roof = "arithmetic" if row["binds"] == "arithmetic" else "bandwidth"
            met = row["share"] >= least
            yield Goal(name, f">= {least:.0%} of {roof}", f"{row['share']:.0%}", met)

    for window in (1024, 4096):
        name = f"window {window}, N=65536, D=128, kv heads 32"
        yield from share(name, 0.55)
        yield from ratio(name, "flex", 1.6)
    yield from share("window 256, N=65536, D=128, kv heads 32", 0.75)
    yield from ratio("window 1024, N=65536, D=128, kv heads 32, forward + backward", "flex", 1.8)
    for n, density, most in ((16384, 0.25, 1.1), (16384, 0.5, 1.1), (16384, 0.1, 1.25)):
        name, dense = f"128-blocks at {density:.0%}, N={n}, D=128", f"dense, N={n}, D=128"
        if name in rows and dense in rows:
            found = rows[name]["ms"] / rows[dense]["ms"] / rows[name]["density"]
            asked = f"<= {most:g} x density x own dense"
            yield Goal(name, asked, f"{found:.2f}", found <= most)
    for name in ("dense causal, N=16384, D=128", "dense, N=16384, D=128"):
        yield from ratio(name, "flex", 1.0)
    for name in ("linear 2x16384x16x128", "linear 1x65536x32x128"):
        yield from share(name, 0.6)
        yield from ratio(name, "fla, features given", 2.5)
    yield from share("decode B=1, N=131072, kv heads 32", 0.88)
    for name, value in document["facts"].items():
        if isinstance(value, str):
            yield Goal(name, "a number", value, False)
        elif name.startswith("error over"):
            yield Goal(name, "<= 1.2", f"{value:.2f}", value <= 1.2)
        elif isinstance(value, bool):
            yield Goal(name, "yes", "yes" if value else "no", value)
        elif name.startswith("first call"):
            yield Goal(name, "< 2.5", f"{value:.2f}", value < 2.5)
        elif name.startswith("compilations"):
            yield Goal(name, "0", str(value), value == 0)
