"""Implementations whose second or forward derivatives are silently wrong."""

from __future__ import annotations

from typing import Any

import torch
from planted_implementations import plant, right
from torch import Tensor

SECOND = "second_derivatives_are_right_or_refused"
FORWARD_MODE = "forward_mode_is_right_or_refused"
FUNC = "func_transforms_are_right_or_refused"


class _Opaque(torch.autograd.Function):
    """Its gradient is right, and constant: what a second derivative or a tangent would miss."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.detach()

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)


class _Recomputed(torch.autograd.Function):
    """Gradients that the backward pass computes apart, as kernels do, and forgets whence."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, run: Any) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.run = run
        return run(q, k, v)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            out = ctx.run(*leaves)
        return (*torch.autograd.grad(out, leaves, grad.detach()), None)


def _wrapped(tensor: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@plant(SECOND)
def the_first_derivative_is_a_constant(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return _Opaque.apply(out), lse


@plant(SECOND)
def gradients_from_a_kernel(m, q, k, v, call):
    plain = q.requires_grad and call.sink_logits is None and call.bias is None
    if _wrapped(q) or not plain or q.dtype != torch.float64:
        return right(m, q, k, v, call)
    out = _Recomputed.apply(q, k, v, lambda *t: right(m, *t, call)[0])
    return out, right(m, q, k, v, call)[1]


@plant(SECOND)
def the_value_alone_has_no_second_derivative(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    only = v.requires_grad and not q.requires_grad
    return (_Opaque.apply(out) if only and not _wrapped(v) else out), lse


@plant(FORWARD_MODE)
def tangents_of_zero(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return _Opaque.apply(out), lse


@plant(FORWARD_MODE)
def the_tangent_of_k_is_lost(m, q, k, v, call):
    return right(m, q, k if k.requires_grad and not _wrapped(k) else _Opaque.apply(k), v, call)


@plant(FORWARD_MODE)
def the_tangent_of_lse_is_lost(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out, _Opaque.apply(lse)


@plant(FUNC)
def slopes_lost_under_func(m, q, k, v, call):
    return right(m, q.detach() if _wrapped(q) else q, k, v, call)


@plant(FUNC)
def tangents_of_gradients_lost(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return (_Opaque.apply(out) if _wrapped(out) else out), lse
