"""The linear engine in torch: each mechanism against its formula, and the laws of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from linear_formulas import MECHANISMS, budget, dense, either, every, place_call, weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparseattn as sa
from sparseattn.engines import op
from sparseattn.engines.linear import plan
from sparseattn.reference import evaluate
from sparseattn.runs import Run, cut
from sparseattn_linear import Cosformer, Linear, Retention

LENGTHS = [1, 63, 65, 100, 257]
D, DV = 16, 5


def inputs(
    n: int, m: int, hq: int = 4, hkv: int = 2, batch: int = 2, dtype: Any = None, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, hq, n, D), (batch, hkv, m, D), (batch, hkv, m, DV)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def is_causal_only(mechanism: sa.KernelizedLinear) -> bool:
    return mechanism.name == "retention"


def scale_of(mechanism: sa.KernelizedLinear) -> float:
    return D**-0.5 if "scale" in mechanism.honours else 1.0


def attend(mechanism: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return sa.attention(q, k, v, mechanism, impl="torch", **options)


def check(mechanism: sa.KernelizedLinear, tensors: list[Tensor], **options: Any) -> None:
    """Output and gradients within the budget of their dtype."""
    rows, scale = place_call(tensors[0], tensors[1], options), scale_of(mechanism)
    dtype = tensors[0].dtype

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        out = function(*leaves)
        pull = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, leaves, pull.to(dtype))]

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(mechanism, q, k, v, rows, scale)

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = sa.AttentionCall.make(q, k, v, **options)
        return evaluate(mechanism, q, k, v, call, q.dtype)[0]

    refs = run(formula, torch.float64)
    results = run(lambda q, k, v: attend(mechanism, q, k, v, **options), dtype)
    naives = run(definition, dtype)
    if not all(torch.isfinite(x).all() for x in naives):
        naives = [x.to(dtype) for x in run(definition, torch.float32)]
    for name, result, ref, naive in zip(
        ("out", "dq", "dk", "dv"), results, refs, naives, strict=True
    ):
        assert result.dtype == dtype and result.shape == ref.shape
        error = (result.double() - ref).abs().max().item() if ref.numel() else 0.0
        tolerance = budget(ref, naive) if ref.numel() else 0.0
        assert error <= tolerance, f"{name}: error {error:.3g}, budget {tolerance:.3g}"


@either
@pytest.mark.parametrize("n", LENGTHS)
def test_output_and_gradients_at_ragged_lengths(
    mechanism: sa.KernelizedLinear, n: int, causal: bool
) -> None:
    check(mechanism, inputs(n, n, dtype=torch.float32), causal=causal)


@every
@pytest.mark.parametrize(
    ("n", "m", "offset"),
    [
        (100, 257, None),
        (257, 100, None),
        (1, 257, None),
        (90, 70, -10),
        (90, 70, 33),
        (40, 200, 100),
        (20, 100, 300),
        (130, 70, torch.tensor([-5, 40])),
        (5, 7, -20),
        (70, 140, torch.tensor([-80, 300])),
    ],
    ids=str,
)
def test_unequal_lengths_and_offsets(
    mechanism: sa.KernelizedLinear, n: int, m: int, offset: Any
) -> None:
    given = {} if offset is None else {"q_offset": offset}
    tensors = inputs(n, m, dtype=torch.float32)
    check(mechanism, tensors, causal=True, **given)
    if not is_causal_only(mechanism):
        check(mechanism, tensors, causal=False, **given)


def test_one_query_of_performer_at_batch_2() -> None:
    performer = next(m for m in MECHANISMS if m.name == "performer")
    check(performer, inputs(1, 257, batch=2, dtype=torch.float32), causal=True)


@every
@pytest.mark.parametrize(("hq", "hkv"), [(1, 1), (6, 2), (4, 1), (3, 3)])
def test_grouped_heads(mechanism: sa.KernelizedLinear, hq: int, hkv: int) -> None:
    check(mechanism, inputs(150, 150, hq, hkv, dtype=torch.float32), causal=True)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(mechanism: sa.KernelizedLinear, dtype: torch.dtype) -> None:
    check(mechanism, inputs(200, 200, dtype=dtype), causal=True)


@either
def test_float64(mechanism: sa.KernelizedLinear, causal: bool) -> None:
    q, k, v = inputs(257, 257, dtype=torch.float64)
    rows = place_call(q, k, {"causal": causal})
    maps = weights(mechanism, q, k, rows, scale_of(mechanism))
    mass = maps.abs() @ v.abs().repeat_interleave(2, dim=1)
    error = (attend(mechanism, q, k, v, causal=causal) - maps @ v.repeat_interleave(2, 1)).abs()
    assert error.max() <= 64 * torch.finfo(torch.float64).eps * mass.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@either
def test_accumulation_is_not_in_the_half_type(
    mechanism: sa.KernelizedLinear, dtype: torch.dtype, causal: bool
) -> None:
    # Long rows, in float32 and rounded once: the budget is that of float32, but for the rounding.
    # Values around 1: means of zero would leave nothing for a coarse sum to lose.
    n = 3000
    mechanism = Cosformer(horizon=n) if isinstance(mechanism, Cosformer) else mechanism
    q, k, v = inputs(n, n, 2, 1, batch=1, dtype=torch.float64)
    q, k, v = q.to(dtype), k.to(dtype), (v + 1).to(dtype)
    call = sa.AttentionCall.make(q, k, v, causal=causal)
    ref = evaluate(mechanism, q, k, v, call, torch.float64)[0][:, :, -200:]
    naive = evaluate(mechanism, q, k, v, call, torch.float32)[0][:, :, -200:]
    out = attend(mechanism, q, k, v, causal=causal)[:, :, -200:]
    exact = 2 * (naive.double() - ref).abs().max()
    rounded = budget(ref, ref.to(dtype))
    assert (out.double() - ref).abs().max() <= exact + rounded


@either
@pytest.mark.parametrize("kind", ["left", "right", "holes", "none_in_one_row"])
def test_key_masks(mechanism: sa.KernelizedLinear, kind: str, causal: bool) -> None:
    n, m = (130, 150) if kind == "holes" else (150, 150)
    mask = torch.ones(2, m, dtype=torch.bool)
    if kind == "left":
        mask[0, :37] = False
    elif kind == "right":
        mask[1, 100:] = False
    elif kind == "holes":
        mask = torch.rand(2, m, generator=torch.Generator().manual_seed(1)) > 0.4
    else:
        mask[0] = False
    tensors = inputs(n, m, dtype=torch.float32)
    check(mechanism, tensors, causal=causal, key_mask=mask)
    # What the mask hides is inert, bit for bit.
    hidden = ~mask[:, None, :, None]
    clean = gradients(mechanism, tensors, causal=causal, key_mask=mask)
    q, k, v = tensors
    dirty = [q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf)]
    for a, b in zip(clean, gradients(mechanism, dirty, causal=causal, key_mask=mask), strict=True):
        assert torch.equal(a, b)


def gradients(mechanism: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The output, and the gradients of q, k and v for a fixed gradient of the output."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = attend(mechanism, *leaves, **options)
    pull = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, pull)]


@either
def test_packed_documents(mechanism: sa.KernelizedLinear, causal: bool) -> None:
    ids = torch.tensor([[0] * 70 + [3] * 1 + [1] * 89, [5] * 20 + [2] * 140])
    keys = torch.tensor([[0] * 90 + [4] * 30 + [1] * 60, [2] * 75 + [5] * 105])
    check(mechanism, inputs(160, 160, dtype=torch.float32), causal=causal, q_segments=ids)
    tensors = inputs(160, 180, dtype=torch.float32)
    mask = torch.rand(2, 180, generator=torch.Generator().manual_seed(2)) > 0.2
    check(mechanism, tensors, causal=causal, q_segments=ids, kv_segments=keys, key_mask=mask)


@every
def test_a_packed_document_equals_the_document_alone(mechanism: sa.KernelizedLinear) -> None:
    q, k, v = inputs(150, 150, batch=1, dtype=torch.float32)
    ids = torch.tensor([[7] * 64 + [8] * 86])
    out = attend(mechanism, q, k, v, causal=True, q_segments=ids)
    for own in (slice(0, 64), slice(64, 150)):
        alone = attend(mechanism, q[:, :, own], k[:, :, own], v[:, :, own], causal=True)
        assert torch.equal(out[:, :, own], alone)


@every
def test_unseen_keys_and_queries_are_inert(mechanism: sa.KernelizedLinear) -> None:
    # Queries at -10 to 79 over 120 keys: the first ten see nothing, the last forty keys are unseen.
    tensors = inputs(90, 120, dtype=torch.float32)
    clean = gradients(mechanism, tensors, causal=True, q_offset=-10)
    dirty = [t.clone() for t in tensors]
    dirty[0][:, :, :10] = torch.nan
    dirty[1][:, :, 80:] = torch.nan
    dirty[2][:, :, 80:] = torch.inf
    for a, b in zip(clean, gradients(mechanism, dirty, causal=True, q_offset=-10), strict=True):
        assert torch.equal(a, b)
    out, dq, dk, dv = clean
    for unseen in (out[:, :, :10], dq[:, :, :10], dk[:, :, 80:], dv[:, :, 80:]):
        assert torch.equal(unseen, torch.zeros_like(unseen))


@every
@pytest.mark.parametrize(
    ("where", "bad"), [("q", torch.nan), ("k", torch.nan), ("v", torch.nan), ("v", torch.inf)]
)
def test_nan_in_what_is_seen_stays_visible(
    mechanism: sa.KernelizedLinear, where: str, bad: float
) -> None:
    tensors = inputs(150, 150, dtype=torch.float32)
    at = "qkv".index(where)
    clean = [t.clone() for t in tensors]
    tensors[at][:, 0, 70, 2] = bad
    out, dq, _, _ = gradients(mechanism, tensors, causal=True)
    rows = slice(70, 71) if where == "q" else slice(70, None)
    columns: Any = 2 if where == "v" else slice(None)
    assert not torch.isfinite(out[:, 0, rows, columns]).any()
    assert where == "q" or not torch.isfinite(dq[:, 0, 70]).all()
    if not is_causal_only(mechanism):
        everyone = slice(70, 71) if where == "q" else slice(None)
        assert not torch.isfinite(attend(mechanism, *tensors)[:, 0, everyone, columns]).any()
    # Not promised, but kept on the CPU: it reaches no earlier row, and moves no bit of one.
    assert torch.equal(out[:, :, :70], attend(mechanism, *clean, causal=True)[:, :, :70])
    assert torch.isfinite(dq[:, :, :70]).all()


@every
@pytest.mark.parametrize("cut_at", [1, 40, 64, 100, 191])
def test_future_tokens_change_no_past_bit(mechanism: sa.KernelizedLinear, cut_at: int) -> None:
    tensors = inputs(200, 200, dtype=torch.float32)
    before = attend(mechanism, *tensors, causal=True)[:, :, :cut_at]
    others = inputs(200, 200, dtype=torch.float32, seed=9)
    for tensor, other in zip(tensors, others, strict=True):
        tensor[:, :, cut_at:] = 30 * other[:, :, cut_at:]
    assert torch.equal(before, attend(mechanism, *tensors, causal=True)[:, :, :cut_at])


@every
def test_the_same_call_gives_the_same_bits(mechanism: sa.KernelizedLinear) -> None:
    tensors = inputs(300, 300, dtype=torch.float32)
    first = gradients(mechanism, tensors, causal=True)
    for a, b in zip(first, gradients(mechanism, tensors, causal=True), strict=True):
        assert torch.equal(a, b)


@every
def test_queries_in_pieces_with_q_offset(mechanism: sa.KernelizedLinear) -> None:
    q, k, v = inputs(200, 200, dtype=torch.float32)
    pieces = [
        attend(mechanism, q[:, :, a:b], k, v, causal=True, q_offset=a)
        for a, b in ((0, 1), (1, 50), (50, 130), (130, 200))
    ]
    rows, scale = place_call(q, k, {"causal": True}), scale_of(mechanism)
    ref = dense(mechanism, q.double(), k.double(), v.double(), rows, scale)
    error = (torch.cat(pieces, 2).double() - ref).abs().max().item()
    assert error <= budget(ref, dense(mechanism, q, k, v, rows, scale))


@every
@pytest.mark.parametrize("kind", ["transposed", "expanded"])
def test_strides_and_inputs_left_alone(mechanism: sa.KernelizedLinear, kind: str) -> None:
    q, k, v = inputs(100, 100, dtype=torch.float32)
    if kind == "transposed":
        odd = [x.mT.contiguous().mT for x in (q, k, v)]
    else:
        odd = [x[:, :1].expand(-1, x.shape[1], -1, -1) for x in (q, k, v)]
    kept = [x.clone() for x in odd]
    check(mechanism, odd, causal=True)
    assert all(torch.equal(x, y) for x, y in zip(kept, odd, strict=True))


@every
@pytest.mark.parametrize(
    ("batch", "hq", "hkv", "n", "m", "dv"),
    [
        (0, 2, 1, 5, 5, 3),
        (2, 0, 0, 5, 5, 3),
        (2, 2, 1, 0, 5, 3),
        (2, 2, 1, 5, 0, 3),
        (2, 2, 1, 5, 5, 0),
    ],
)
def test_empty_dimensions(
    mechanism: sa.KernelizedLinear, batch: int, hq: int, hkv: int, n: int, m: int, dv: int
) -> None:
    q, k = torch.randn(batch, hq, n, D), torch.randn(batch, hkv, m, D)
    v = torch.randn(batch, hkv, m, dv)
    out, *grads = gradients(mechanism, [q, k, v], causal=True)
    assert torch.equal(out, torch.zeros(batch, hq, n, dv))
    for grad, of in zip(grads, (q, k, v), strict=True):
        assert torch.equal(grad, torch.zeros_like(of))


@every
def test_gradcheck(mechanism: sa.KernelizedLinear) -> None:
    q, k, v = inputs(71, 68, hq=2, hkv=1, batch=1, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    mask = torch.rand(1, 68, generator=torch.Generator().manual_seed(3)) > 0.3

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(mechanism, q, k, v, causal=True, key_mask=mask)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    attend_op = torch.ops.sparseattn.attend.default

    def spy(mechanism: Any, kernel: str, q: Tensor, k: Tensor, v: Tensor, call: Any) -> Any:
        key = op.intern.key(mechanism)
        args = (q, k, v, *(None,) * 8, key, call.causal, call.scale)
        seen.append((*args, None, kernel))
        return attend_op(*seen[-1])

    monkeypatch.setattr(op, "attend", spy)
    tensors = inputs(10, 10, dtype=torch.float32)
    attend(Linear(), *tensors, causal=True)
    assert seen
    args = [t.requires_grad_(grad) if torch.is_tensor(t) else t for t in seen[0]]
    torch.library.opcheck(attend_op, args)


@every
def test_compiles_whole_with_gradients(mechanism: sa.KernelizedLinear) -> None:
    tensors = inputs(100, 100, dtype=torch.float32)
    compiled = torch.compile(
        lambda q, k, v: attend(mechanism, q, k, v, causal=True).sin(),
        fullgraph=True,
        backend="aot_eager",
    )
    for run in (compiled, lambda q, k, v: attend(mechanism, q, k, v, causal=True).sin()):
        leaves = [t.detach().requires_grad_() for t in tensors]
        run(*leaves).sum().backward()
        if run is compiled:
            grads = [t.grad for t in leaves]
    assert all(torch.equal(a, b.grad) for a, b in zip(grads, leaves, strict=True))


@dataclass(frozen=True)
class _Signed(sa.KernelizedLinear):
    """Features of either sign: row sums may cancel."""

    name = "signed_features"
    honours = frozenset()

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return x


def test_a_row_sum_of_exactly_zero_gives_zero() -> None:
    q = torch.ones(1, 1, 2, 1)
    k, v = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1), torch.tensor([3.0, 5.0]).view(1, 1, 2, 1)
    out, dq, dk, dv = gradients(_Signed(), [q, k, v])
    for x in (out, dq, dk, dv):
        assert torch.equal(x, torch.zeros_like(x))
    # Tiny is not zero.
    small = gradients(_Signed(), [q, k.abs() * 1e-30, v])[0]
    assert float((small - 4.0).abs().max()) <= 4.0 * 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class _Strong(sa.KernelizedLinear):
    """The strongest decay promised: half a position."""

    name = "strong_decay"
    honours = frozenset()
    normalize = False

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return x

    def decay(self, call: sa.AttentionCall) -> Tensor:
        return torch.full((call.q_heads,), 0.5)


def test_strong_decay_over_long_chunks() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(1500, 1500, batch=1, dtype=torch.float32))
    out = attend(_Strong(), q, k, v, causal=True)
    out.sum().backward()
    i = torch.arange(1500)
    powers = 0.5 ** (i[:, None] - i).clamp(min=0).double().masked_fill(i[:, None] < i, torch.inf)

    def formula(dtype: torch.dtype) -> list[Tensor]:
        x, y, z = (t.detach().to(dtype).requires_grad_() for t in (q, k, v))
        w = (x @ y.repeat_interleave(2, 1).mT) * powers.to(dtype)
        result = w @ z.repeat_interleave(2, 1)
        return [result.detach(), *torch.autograd.grad(result.sum(), (x, y, z))]

    results = [out.detach(), q.grad, k.grad, v.grad]
    for result, ref, naive in zip(
        results, formula(torch.float64), formula(torch.float32), strict=True
    ):
        assert (result.double() - ref).abs().max().item() <= budget(ref, naive)


def test_a_decay_without_causality_is_refused_by_the_kernel() -> None:
    q, k, v = inputs(4, 4, dtype=torch.float32)
    with pytest.raises(sa.UnsupportedCallError, match="causal"):
        attend(_Strong(), q, k, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(
    ("n", "m", "offset"),
    [
        (1, 1, 0),
        (300, 300, 0),
        (300, 200, -100),
        (200, 300, 100),
        (5, 3, 400),
        (9, 300, 20),
        (9, 9, -99),
    ],
)
def test_a_plan_serves_each_seen_row_once_and_in_order(
    n: int, m: int, offset: int, chunks: int, causal: bool
) -> None:
    q, k, v = (torch.zeros(1, 1, x, 1) for x in (n, m, m))
    call = sa.AttentionCall.make(q, k, v, causal=causal, q_offset=offset)
    steps = plan.plan(call, chunks)
    queries = [p for s in steps if s.queries for p in range(s.start, s.stop)]
    keys = [p for s in steps if s.keys for p in range(s.key_rows.start, s.key_rows.stop)]
    reach = range(offset, offset + n)
    assert queries == [p for p in reach if p >= 0 or not causal]
    assert keys == [p for p in range(m) if p < reach.stop or not causal]
    done = -1
    for step in steps:
        if causal:
            assert step.start > done and (
                not step.queries or not step.keys or step.size <= plan.CHUNK
            )
        done = step.stop - 1


class _Watch(TorchDispatchMode):
    """Remembers the largest storage that any operation returned."""

    largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if torch.is_tensor(result):
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


@every
def test_memory_beside_the_tensors_does_not_grow_with_length(
    mechanism: sa.KernelizedLinear,
) -> None:
    kernel = op.KERNELS["linear:torch"]
    largest = []
    for n in (4096, 8192):
        q, k, v = inputs(n, n, batch=1, dtype=torch.float32)
        call = sa.AttentionCall.make(q, k, v, causal=True)
        with _Watch() as watch:
            out, _ = kernel.forward(mechanism, q, k, v, call)
            kernel.backward(mechanism, out, None, q, k, v, out, out.new_empty(0), call)
        largest.append(watch.largest)
    # Features and states are those of one step; only tensors like q itself have N rows.
    assert largest[1] <= max(largest[0], q.nbytes)


def test_runs_of_a_batch_are_told_apart() -> None:
    # Rows with different paddings and one without any key, in one call.
    mask = torch.ones(4, 80, dtype=torch.bool)
    mask[0, :30], mask[1, 50:], mask[2] = False, False, False
    tensors = inputs(80, 80, batch=4, dtype=torch.float32)
    assert len({(r.keys.start, r.keys.stop) for r in runs_of(tensors, mask)}) == 3
    check(Retention(), tensors, causal=True, key_mask=mask)


def runs_of(tensors: list[Tensor], mask: Tensor) -> list[Run]:
    return cut(sa.AttentionCall.make(*tensors, causal=True, key_mask=mask))
