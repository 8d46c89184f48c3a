"""Implementations with wrong gradients, or that misbehave beside a right result."""

from __future__ import annotations

import random

import torch
from planted_implementations import Everything, Near, plant, right
from torch import Tensor

from sparseattn import reference

GRADIENTS = "gradients_are_the_definition"


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


@plant(GRADIENTS)
def gradient_of_q_scaled(m, q, k, v, call):
    return right(m, _ScaleGradient.apply(q, 1.01), k, v, call)


@plant(GRADIENTS)
def gradient_of_v_lost(m, q, k, v, call):
    return right(m, q, k, v.detach(), call)


@plant(GRADIENTS)
def gradient_of_sinks_lost(m, q, k, v, call):
    sink = call.sink_logits
    return right(m, q, k, v, call.replace(sink_logits=None if sink is None else sink.detach()))


@plant(GRADIENTS)
def gradient_of_bias_lost(m, q, k, v, call):
    bias = call.bias
    return right(m, q, k, v, call.replace(bias=None if bias is None else bias.detach()))


@plant(GRADIENTS)
def gradient_through_lse_lost(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out, lse.detach()


@plant(GRADIENTS)
def no_gradient_at_all(m, q, k, v, call):
    with torch.no_grad():
        return right(m, q, k, v, call)


@plant("each_gradient_stands_alone")
def gradient_of_k_needs_that_of_q(m, q, k, v, call):
    return right(m, q, k if q.requires_grad else k.detach() + 0 * k, v, call)


@plant("gradcheck")
def gradient_wrong_in_float64_only(m, q, k, v, call):
    factor = 1.01 if q.dtype == torch.float64 else 1.0
    return right(m, q, _ScaleGradient.apply(k, factor), v, call)


@plant("wanting_gradients_changes_nothing")
def other_numbers_when_training(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out * (1.001 if call.needs_grad else 1.0), lse


@plant("long_half_rows_are_summed_wide")
def summed_in_the_half_type(m, q, k, v, call):
    weights, lse = m.definition(q.float(), k.float(), call.to_dtype(torch.float32))
    weights = weights.to(q.dtype)
    total = v.new_zeros(*q.shape[:3], v.shape[3])
    for start in range(0, call.m, 16):
        keys = slice(start, start + 16)
        total = total + reference.grouped_apply(weights[..., keys], v[:, :, keys])
    return total, lse


@plant("the_same_call_gives_the_same_bits")
def noise_in_the_last_digit(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out * (1 + 1e-6 * torch.rand(out.shape).to(out.dtype)), lse


@plant("the_same_call_gives_the_same_bits")
def every_second_call_differs(m, q, k, v, call, calls=[0]):  # noqa: B006
    calls[0] += 1
    out, lse = right(m, q, k, v, call)
    return out * (1 + 1e-6 * (calls[0] % 2)), lse


@plant("the_same_call_gives_the_same_bits")
def every_second_gradient_differs(m, q, k, v, call, calls=[0]):  # noqa: B006
    calls[0] += 1
    return right(m, _ScaleGradient.apply(q, 1 + 1e-6 * (calls[0] % 2)), k, v, call)


@plant("the_output_answers")
def replayed_by_shape(m, q, k, v, call, kept={}):  # noqa: B006
    key = (q.shape, k.shape, v.shape, q.dtype)
    if key not in kept:
        kept[key] = right(m, q.detach(), k.detach(), v.detach(), call)
    out, lse = kept[key]
    return out.clone(), lse.clone()


@plant("the_output_answers")
def replayed_by_address(m, q, k, v, call, kept={}):  # noqa: B006
    key = (q.data_ptr(), k.data_ptr(), v.data_ptr(), q.shape, k.shape)
    if key not in kept:
        kept.clear()
        # The tensors are held too, so that no other can come to lie where they do.
        kept[key] = (*right(m, q.detach(), k.detach(), v.detach(), call), q, k, v)
    return kept[key][0].clone(), kept[key][1].clone()


@plant("inputs_are_not_modified")
def query_scaled_in_place(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    with torch.no_grad():
        q.mul_(call.scale)
    return out, lse


@plant("the_output_is_fresh")
def output_kept_and_reused(m, q, k, v, call, kept={}):  # noqa: B006
    out, lse = right(m, q, k, v, call)
    key = (out.shape, float(out.detach().sum()))
    return kept.setdefault(key, out.detach()), lse


@plant("the_output_is_fresh")
def output_lies_in_an_input(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    if call.needs_grad or q.shape != out.shape:
        return out, lse
    return q.copy_(out), lse


@plant("global_state_is_left_alone")
def seeds_the_process(m, q, k, v, call):
    torch.manual_seed(0)
    return right(m, q, k, v, call)


@plant("global_state_is_left_alone")
def draws_from_python(m, q, k, v, call):
    random.random()
    return right(m, q, k, v, call)


@plant("global_state_is_left_alone")
def switches_the_default_dtype(m, q, k, v, call):
    torch.set_default_dtype(torch.float64)
    return right(m, q, k, v, call)


@plant("global_state_is_left_alone")
def prints_its_shape(m, q, k, v, call):
    print(tuple(q.shape))
    return right(m, q, k, v, call)


class _PoisonedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad + 0 * ctx.saved_tensors[0].sum(), None


@plant("unseen_keys_are_inert")
def nan_of_unseen_values_in_gradients(m, q, k, v, call):
    return right(m, _PoisonedGradient.apply(q, v.detach()), k, v, call)


@plant("empty_rows_are_zero")
def blind_queries_have_gradients(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    small = q.nan_to_num(0.0).sum(-1, keepdim=True) * 0.1
    return out + (small - small.detach()), lse


@plant("empty_sizes_are_legal")
def without_keys_the_sink_is_forgotten(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out, lse if call.m else torch.full_like(lse, -torch.inf)


@plant("vmap_is_the_batch")
def reads_values_on_the_host(m, q, k, v, call):
    top = float(v.detach().abs().max().nan_to_num(1.0)) if v.numel() else 1.0
    out, lse = right(m, q, k, v / max(top, 1e-3), call)
    return out * max(top, 1e-3), lse


@plant("compiling_changes_nothing")
def other_numbers_when_compiled(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out * (1.01 if torch.compiler.is_compiling() else 1.0), lse


@plant("a_window_of_all_keys_is_full", Near)
def window_capped(m, q, k, v, call):
    return right(Near(window=min(m.window, 16)), q, k, v, call)


__all__ = ["Everything"]
