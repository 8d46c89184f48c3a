"""What the public call does around an implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import sparseattn as sa


class Plain(sa.Implementation):
    """A stranger's implementation, which asks for float32 products."""

    name = "plain"

    def run(self, mechanism, q, k, v, call):
        scores = q.float() @ k.float().transpose(-1, -2) * call.scale
        assert scores.dtype == torch.float32, "autocast turned the product back to half"
        return (scores.softmax(-1) @ v.float()).to(q.dtype), None


@dataclass(frozen=True)
class Everything(sa.MaskedSoftmax):
    """Every key."""

    name = "everything"

    def visible(self, i, j):
        return (i >= j) | (i < j)

    def implementations(self):
        return (Plain(),)


def test_autocast_casts_the_inputs_and_is_off_while_an_implementation_runs() -> None:
    q = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        out = sa.attention(q, q, q, Everything(), impl="plain")
    half = q.bfloat16()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, sa.attention(half, half, half, Everything(), impl="plain"))
