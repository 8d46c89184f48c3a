"""Traced code: compile, export, vmap, and the derivatives that are refused."""

from __future__ import annotations

import io

import pytest
import torch

import sparseattn as sa
from sparseattn.engines import intern

SPECS = (
    "full",
    "windowed(window=8, sinks=2)",
    "bigbird(block=8)",
    "topk_blocks(block=8, top=2)",
    "linear",
)


def qkv(n: int = 40, grad: bool = True) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    return tuple(torch.randn(1, h, n, 16, generator=g).requires_grad_(grad) for h in (4, 2, 2))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("how", ["instance", "spec"])
def test_compiled_equals_eager_bit_for_bit(spec: str, how: str) -> None:
    torch._dynamo.reset()
    mechanism = sa.mechanism(spec) if how == "instance" else spec

    def run(q, k, v):
        return sa.attention(q, k, v, mechanism, causal=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (40, 65):
        x = qkv(n)
        out, expected = compiled(*x), run(*x)
        assert torch.equal(out, expected)
        grads = torch.autograd.grad(out.square().sum(), x)
        wanted = torch.autograd.grad(expected.square().sum(), x)
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


MASKS = {
    "padding": {"key_mask": torch.arange(40)[None] >= torch.tensor([[7], [0]])},
    "packing": {"q_segments": (torch.arange(40) > 15).expand(2, 40).to(torch.int64)},
    "offsets": {"q_offset": torch.tensor([0, -3])},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("spec", SPECS)
def test_masks_are_tensors_to_compiled_code(spec: str, masks: str) -> None:
    torch._dynamo.reset()
    x = [a.detach().expand(2, -1, -1, -1) for a in qkv()]
    names, given = zip(*MASKS[masks].items(), strict=True)

    def run(q, k, v, *given):
        words = dict(zip(names, given, strict=True))
        return sa.attention(q, k, v, spec, causal=True, **words)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(*x, *given), run(*x, *given))


class Windowed(torch.nn.Module):
    def forward(self, q, k, v):
        return sa.attention(q, k, v, "windowed(window=8)", causal=True)


def test_export_survives_a_file() -> None:
    x = qkv(grad=False)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Windowed(), x), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    assert torch.equal(loaded(*x), Windowed()(*x))


@pytest.mark.parametrize("spec", ["windowed(window=8)", "linear"])
def test_opcheck(spec: str) -> None:
    engine = "linear" if spec == "linear" else "softmax"
    sink = torch.randn(1, qkv()[0].shape[1], requires_grad=True) if engine == "softmax" else None
    rest = (*(None,) * 5, sink, None, None)
    key = intern.key(sa.mechanism(spec))
    args = (*qkv(), *rest, key, True, 0.25, None, f"{engine}:torch")
    torch.library.opcheck(torch.ops.sparseattn.attend.default, args)


def test_vmap_over_a_batch() -> None:
    x = [torch.stack([a, a.flip(2)]) for a in qkv(grad=False)]
    mapped = torch.func.vmap(Windowed())(*x)
    for at in range(2):
        alone = Windowed()(*(a[at] for a in x))
        exact = Windowed()(*(a[at].double() for a in x))
        # Both round exact attention; neither is further from the other than the two errors allow.
        assert (mapped[at] - exact).abs().max() <= 4 * (alone - exact).abs().max()


def test_forward_mode_is_refused_in_words() -> None:
    q, k, v = qkv(grad=False)
    with pytest.raises(sa.UnsupportedCallError, match="forward-mode"):
        torch.func.jvp(lambda x: sa.attention(x, k, v, "full"), (q,), (q,))


def test_second_derivatives_are_refused_never_left_out() -> None:
    q, k, v = qkv()
    out = sa.attention(q, k, v, "full")
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(sa.UnsupportedCallError, match="no second derivative"):
        grad.square().sum().backward()
    reference = sa.attention(q, k, v, "full", impl="reference")
    (grad,) = torch.autograd.grad(reference.sum(), q, create_graph=True)
    grad.square().sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0


def test_a_second_derivative_beside_another_path_is_refused_too() -> None:
    # Autograd skips a refusal that leads to no input: the sum would then be silently wrong.
    q, k, v = qkv()
    out = sa.attention(q, k, v, "full")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(sa.UnsupportedCallError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum() + q.square().sum(), q)
