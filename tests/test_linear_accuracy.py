"""The linear engine within DESIGN's budget, word for word: outputs and gradients, no widening."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from linear_formulas import dense, either, every, place_call
from safetensors.torch import load_file
from torch import Tensor

import sparseattn as sa
from sparseattn.engines.linear.state import State
from sparseattn.harness.inputs import RECORDED
from sparseattn.reference import evaluate
from sparseattn.testing.budgets import distance, rounding, rule
from sparseattn_linear import Performer, Taylor
from sparseattn_linear.features import draw

NAMES = ("out", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny products: threads that wait for each other cost minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def results(
    function: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The output, and the gradients of q, k and v for a fixed gradient of the output."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    (pull,) = normal(tuple(out.shape), seed=5)
    grads = torch.autograd.grad(out, leaves, pull.to(tensors[0].dtype).to(dtype))
    return [out.detach(), *grads]


def check(
    mechanism: sa.KernelizedLinear, tensors: list[Tensor], dense_too: bool, **options: Any
) -> None:
    """`max|x - ref| <= 2 * max|naive - ref| + 2 * rounding` for out, dq, dk and dv.

    The naive computation is the mechanism's own definition, and with `dense_too` also the dense
    formula, written without features where it can be: whichever errs less.
    """
    dtype = tensors[0].dtype
    rows = place_call(tensors[0], tensors[1], options) if dense_too else []
    scale = tensors[0].shape[-1] ** -0.5 if "scale" in mechanism.honours else 1.0

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = sa.AttentionCall.make(q, k, v, **options)
        return evaluate(mechanism, q, k, v, call, q.dtype)[0]

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(mechanism, q, k, v, rows, scale)

    def engine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sa.attention(q, k, v, mechanism, impl="torch", **options)

    refs, found = results(definition, tensors, torch.float64), results(engine, tensors, dtype)
    budgets = [float("inf")] * 4
    for function in (definition, formula) if dense_too else (definition,):
        naives = results(function, tensors, dtype)
        if not all(torch.isfinite(x).all() for x in naives):
            naives = [x.to(dtype) for x in results(function, tensors, torch.float32)]
        each = [rule(naive, ref, dtype) for naive, ref in zip(naives, refs, strict=True)]
        budgets = [min(pair) for pair in zip(budgets, each, strict=True)]
    for name, x, ref, budget in zip(NAMES, found, refs, budgets, strict=True):
        error = distance(x, ref)
        assert error <= budget, f"{name} {options}: error {error:.3g}, budget {budget:.3g}"


SHAPES = [(1, 1), (1, 65), (1, 257), (63, 63), (63, 1), (65, 100), (100, 1), (100, 65), (257, 257)]


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_small_ragged_calls(
    mechanism: sa.KernelizedLinear, dtype: torch.dtype, causal: bool
) -> None:
    for n, m in SHAPES:
        for heads, kv_heads, batch in ((4, 2, 2), (1, 1, 1)):
            shapes = (batch, heads, n, 16), (batch, kv_heads, m, 16), (batch, kv_heads, m, 5)
            tensors = [x.to(dtype) for x in normal(*shapes, seed=n + m)]
            check(mechanism, tensors, True, causal=causal)
            if batch > 1:
                check(mechanism, tensors, True, causal=causal, q_offset=m // 3)
                mask = torch.rand(batch, m, generator=torch.Generator().manual_seed(n)) > 0.3
                check(mechanism, tensors, True, causal=causal, key_mask=mask)
    if causal:
        ids = torch.tensor([[0] * 70 + [3] + [1] * 89, [5] * 20 + [2] * 140])
        tensors = [x.to(dtype) for x in normal((2, 4, 160, 16), (2, 2, 160, 16), (2, 2, 160, 5))]
        check(mechanism, tensors, True, causal=True, q_segments=ids)


def recorded(length: int = 2048) -> list[Tensor]:
    """Three query heads, each with a key-value head of its own, of a real model."""
    held = load_file(RECORDED)
    q, k, v = (held[name][:, :, :length].float() for name in "qkv")
    return [q[:, ::3], k, v]


@either
def test_recorded_inputs(mechanism: sa.KernelizedLinear, causal: bool) -> None:
    check(sa.mechanism(mechanism.name), recorded(), False, causal=causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_taylor_beyond_the_lengths_that_are_weighed_pair_by_pair(causal: bool) -> None:
    # Values of width 1 make the state cheap, so that features serve from some hundred rows on.
    q, k, v = recorded(900)
    check(Taylor(), [q, k, v[..., :1].contiguous()], False, causal=causal)


def test_queries_far_along_see_many_keys() -> None:
    q, k, v = recorded()
    for mechanism in (sa.mechanism("linear"), sa.mechanism("cosformer")):
        check(mechanism, [q[:, :, -300:].contiguous(), k, v], False, causal=True)


@every
def test_future_tokens_change_no_past_bit_of_a_long_call(mechanism: sa.KernelizedLinear) -> None:
    n, at = 690, 333
    shapes = (1, 4, n, 16), (1, 2, n, 16), (1, 2, n, 5)
    tensors = [x.float() for x in normal(*shapes)]
    before = sa.attention(*tensors, mechanism, causal=True, impl="torch")[:, :, :at]
    for tensor, other in zip(tensors, normal(*shapes, seed=9), strict=True):
        tensor[:, :, at:] = 30 * other[:, :, at:].float()
    after = sa.attention(*tensors, mechanism, causal=True, impl="torch")
    assert torch.equal(before, after[:, :, :at]) and torch.isfinite(after).all()


def test_a_state_keeps_the_digits_of_a_long_sum() -> None:
    state, total = State((1, 1, 4, 4), torch.float32, torch.device("cpu")), 0.0
    (added,) = normal((1, 1, 4, 4))
    added = added.abs().float()
    for _ in range(20_000):
        state.advance(added, 64, None)
    total = 20_000 * added.double()
    found = state.read(torch.empty(1, 1, 4, 4)).double()
    # Sixteen chunks are summed in float32, the sums of those in float64, and rounded once.
    assert ((found - total).abs() <= 16 * torch.finfo(torch.float32).eps * total).all()


# Features that underflow.


def softmax_over_features(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Performer's definition in logarithms, which nothing can underflow; float64."""
    rows, scale = draw(256, q.shape[-1], 0, True), q.shape[-1] ** -0.5
    x, y = (t.double() * scale**0.5 for t in (q, k))
    a, e = (t @ rows.T - t.square().sum(-1, keepdim=True) / 2 for t in (x, y))
    logits = torch.stack([(row[:, :, None] + e).logsumexp(-1) for row in a.unbind(2)], dim=2)
    if causal:
        hidden = torch.ones(q.shape[2], k.shape[2]).triu(1).bool()
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1) @ v.double()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("std", [5.0, 8.0, 20.0])
@pytest.mark.parametrize("n", [70, 550])
def test_performer_of_long_keys_is_its_definition(std: float, causal: bool, n: int) -> None:
    shape = (1, 2, n, 32)
    q, k, v = (x.float() for x in normal(shape, shape, (1, 2, n, 3)))
    q, k = q * std, k * std
    k[:, :, : n // 2] *= 0.2  # rows that the fast sweep holds, and rows that it does not
    expected = results(lambda q, k, v: softmax_over_features(q, k, v, causal), [q, k, v], q.dtype)

    def run(impl: str) -> Callable[..., Tensor]:
        return lambda q, k, v: sa.attention(q, k, v, "performer", causal=causal, impl=impl)

    exact = results(lambda *x: softmax_over_features(*x, causal), [q, k, v], torch.float64)
    reference = results(run("reference"), [q, k, v], torch.float64)
    for name, x, y in zip(NAMES, reference, exact, strict=True):
        assert distance(x, y) <= 1e-9 * float(y.abs().max()), name
    # An exponent is a float32 sum of squares where the fast sweep serves, and off by so much.
    size = float((k * k).sum(-1).max()) * k.shape[-1] ** -0.5
    for name, x, y in zip(NAMES, results(run("torch"), [q, k, v], q.dtype), exact, strict=True):
        bound = 4 * torch.finfo(torch.float32).eps * size * float(y.abs().max())
        assert distance(x, y) <= bound + 2 * rounding(y, q.dtype), name
    assert all(torch.isfinite(x).all() for x in expected)


def test_performer_where_every_feature_is_lost_is_nan_and_never_zero() -> None:
    # Queries along one axis and keys along its opposite: no feature is large for both.
    q = torch.zeros(1, 1, 40, 32)
    q[..., 0] = 3000.0
    for impl in ("torch", "reference"):
        out = sa.attention(q, -q, torch.ones(1, 1, 40, 3), "performer", impl=impl)
        assert not (out == 0).any()
        assert (out.isnan() | (out == 1)).all()


def test_performer_of_short_keys_is_swept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 600, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.delattr(Performer, "scaled_map")  # would fail if a row were evaluated again
    plain = sa.attention(q, q, q, "performer", causal=True, impl="torch")
    monkeypatch.undo()
    assert torch.equal(plain, sa.attention(q, q, q, "performer", causal=True, impl="torch"))


# Compiled, and imported.


@pytest.mark.parametrize("dynamic", [False, True])
def test_performer_in_its_definition_compiles(dynamic: bool) -> None:
    torch._dynamo.reset()

    def run(x: Tensor) -> Tensor:
        return sa.attention(x, x, x, "performer", causal=True, impl="reference")

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (20, 33):
        x = torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n))
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, plain = compiled(leaf), run(other)
        out.sin().sum().backward()
        plain.sin().sum().backward()
        assert distance(out, plain) <= 2 * rounding(plain.double(), x.dtype)
        assert distance(leaf.grad, other.grad) <= 4 * rounding(other.grad.double(), x.dtype)


def test_importing_the_plugin_does_not_import_the_compiler() -> None:
    code = "import sys, sparseattn_linear; assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
