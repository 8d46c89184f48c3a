"""Implementations that fail at the ends of an argument's range: widths, scales, biases, ids."""

from __future__ import annotations

import torch
from planted_implementations import Chunks, Everything, Planted, plant, right
from torch import Tensor

import sparseattn as sa
from sparseattn import reference
from sparseattn.call import Placement

WIDTH = "any_width_is_served_whole"
SCALE = "any_finite_scale_is_taken"
BIAS = "bias_may_be_broadcast"
OUTSIDE = "queries_may_stand_outside_the_keys"
IDS = "segment_ids_only_name_documents"
HALF = "great_half_numbers_stay_finite"


@plant(WIDTH)
def head_width_cut_at_64(m, q, k, v, call):
    return right(m, q[..., :64], k[..., :64], v, call)


@plant(WIDTH)
def value_width_cut_at_64(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return torch.cat([out[..., :64], out[..., 64:] * 0], -1), lse


@plant(WIDTH)
def gradient_of_wide_values_cut(m, q, k, v, call):
    return right(m, q, k, torch.cat([v[..., :64], v[..., 64:].detach()], -1), call)


@plant(SCALE)
def scale_of_0_is_the_default(m, q, k, v, call):
    return right(m, q, k, v, call.replace(scale=call.scale or q.shape[-1] ** -0.5))


@plant(SCALE)
def scale_in_two_roots(m, q, k, v, call):
    root = abs(call.scale) ** 0.5
    return right(m, q * root, k * root, v, call.replace(scale=1.0))


@plant(BIAS)
def bias_of_all_queries_dropped(m, q, k, v, call):
    bias = call.bias
    dropped = bias is not None and bias.shape[2] == 1 < call.n
    return right(m, q, k, v, call.replace(bias=None) if dropped else call)


@plant(BIAS)
def gradient_of_the_last_query_for_all(m, q, k, v, call):
    bias = call.bias
    if bias is not None and bias.shape[2] == 1 < call.n:
        bias = torch.cat([bias.detach().expand(-1, -1, call.n - 1, -1), bias], 2)
    return right(m, q, k, v, call.replace(bias=bias))


@plant(BIAS)
def bias_of_row_0_for_all(m, q, k, v, call):
    bias = None if call.bias is None else call.bias[:1]
    return right(m, q, k, v, call.replace(bias=bias))


@plant(BIAS)
def bias_of_one_head_in_the_wrong_place(m, q, k, v, call):
    bias = call.bias
    if bias is not None and bias.shape[1] == 1 < call.q_heads:
        only = torch.arange(call.q_heads)[None, :, None, None] == 0
        bias = torch.where(only, bias, 0.0)
    return right(m, q, k, v, call.replace(bias=bias))


def _placed(call: sa.AttentionCall, q: Tensor) -> sa.AttentionCall:
    place = call.placement()
    return call.replace(fixed_placement=Placement(q, place.k, place.extent))


@plant(OUTSIDE)
def queries_past_the_last_key_are_zeros(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    if call.q_offset is None:
        return out, lse
    past = call.placement().q >= call.m
    return out.masked_fill(past[:, None, :, None], 0.0), lse


@plant(OUTSIDE, Chunks)
def queries_moved_to_the_last_key(m, q, k, v, call):
    if call.q_offset is None or not call.m:
        return right(m, q, k, v, call)
    return right(m, q, k, v, _placed(call, call.placement().q.clamp(max=call.m - 1)))


@plant(OUTSIDE)
def negative_positions_count_from_the_end(m, q, k, v, call):
    place = call.placement().q
    if call.q_offset is None or call.key_mask is not None:
        return right(m, q, k, v, call)
    return right(m, q, k, v, _placed(call, torch.where(place < 0, place + call.m, place)))


@plant(OUTSIDE)
def positions_in_32_bits(m, q, k, v, call):
    if isinstance(call.q_offset, int):
        call = call.replace(q_offset=(call.q_offset + 2**31) % 2**32 - 2**31 - 2**31)
        call = call.replace(q_offset=call.q_offset + 2**31)
    return right(m, q, k, v, call)


def _ids(call: sa.AttentionCall, kind: torch.dtype) -> sa.AttentionCall:
    if call.q_segments is None:
        return call
    q_ids, k_ids = call.q_segments.to(kind), call.kv_segments.to(kind)
    # What remains of an id must name one run: others are given away.
    place = call.placement()
    same = q_ids[:, :, None] == k_ids[:, None, :]
    return call.replace(
        q_segments=torch.zeros_like(call.q_segments),
        kv_segments=torch.zeros_like(call.kv_segments),
        fixed_placement=place,
        bias=torch.where(same[:, None], 0.0, -1e30),
    )


@plant(IDS)
def ids_in_8_bits(m, q, k, v, call):
    return right(m, q, k, v, _ids(call, torch.int8))


@plant(IDS)
def ids_in_32_bits(m, q, k, v, call):
    return right(m, q, k, v, _ids(call, torch.int32))


@plant(IDS)
def ids_in_float32(m, q, k, v, call):
    return right(m, q, k, v, _ids(call, torch.float32))


@plant(IDS)
def negative_ids_are_padding(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    if call.q_segments is None:
        return out, lse
    return out.masked_fill((call.q_segments < 0)[:, None, :, None], 0.0), lse


@plant(HALF)
def products_in_float16(m, q, k, v, call):
    if q.dtype != torch.float16:
        return right(m, q, k, v, call)
    whole = reference.grouped_scores(q, k)
    out, lse = right(m, q, k, v, call)
    return out.masked_fill(whole.isinf().any(-1, keepdim=True), torch.nan), lse


@plant(HALF)
def values_summed_before_they_are_divided(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    if q.dtype != torch.float16:
        return out, lse
    total = call.allowed().sum(-1, keepdim=True).clamp(min=1).to(out.dtype)
    return out * total / total, lse


class Refusing(Planted):
    """Right, and never of service."""

    def supports(self, mechanism: sa.Mechanism, call: sa.AttentionCall) -> list[str]:
        return ["it serves only the calls of another day"]


@plant("every_implementation_serves", lambda planted: Everything(planted=Refusing(right)))
def refuses_every_call(m, q, k, v, call):
    return right(m, q, k, v, call)
