"""Wrong implementations of right mechanisms, each with the law that must convict it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import sparseattn as sa
from sparseattn import reference
from sparseattn.implementation import REFERENCE

Result = tuple[Tensor, "Tensor | None"]
Run = Callable[[sa.Mechanism, Tensor, Tensor, Tensor, sa.AttentionCall], Result]


class Planted(sa.Implementation):
    """An implementation that is one function."""

    name = "planted"

    def __init__(self, run: Run) -> None:
        self._run = run

    def run(
        self, mechanism: sa.Mechanism, q: Tensor, k: Tensor, v: Tensor, call: sa.AttentionCall
    ) -> Result:
        return self._run(mechanism, q, k, v, call)


@dataclass(frozen=True)
class Everything(sa.MaskedSoftmax):
    """Exact attention, by whatever implementation it is given."""

    name = "planted_everything"
    nature = "exact"
    planted: Planted | None = None

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i >= i) & (j >= j)

    def implementations(self) -> tuple[sa.Implementation, ...]:
        return (self.planted,)


@dataclass(frozen=True)
class Near(Everything):
    """The last `window` keys."""

    name = "planted_near"
    nature = "masked_softmax"
    window: int = 4

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() < self.window


@dataclass(frozen=True)
class Chunks(Everything):
    """Chunks that see themselves: a pattern of absolute positions."""

    name = "planted_chunks"
    nature = "masked_softmax"
    chunk: int = 4

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return i // self.chunk == j // self.chunk


PLANTED: list[tuple[str, str, sa.Mechanism]] = []


def plant(law: str, base: Callable[..., Everything] = Everything) -> Callable[[Run], Run]:
    """Put a wrong way to run `base` beside the law that catches it."""

    def add(run: Run) -> Run:
        PLANTED.append((run.__name__, law, base(planted=Planted(run))))
        return run

    return add


def right(m: sa.Mechanism, q: Tensor, k: Tensor, v: Tensor, call: sa.AttentionCall) -> Result:
    return REFERENCE.run(m, q, k, v, call)


FORWARD = "forward_is_the_definition"


@plant(FORWARD)
def zeros(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out * 0, lse


@plant(FORWARD)
def all_nan(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out * torch.nan, lse


@plant(FORWARD)
def scaled_output(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out * 1.0001, lse


@plant(FORWARD)
def computed_in_half(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out.to(torch.bfloat16).to(q.dtype), lse


@plant(FORWARD)
def wrong_dtype(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out.double(), lse


@plant(FORWARD)
def last_row_never_written(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    made = torch.empty(out.shape, dtype=out.dtype)
    made[:, :, :-1] = out[:, :, :-1]
    return made + 0 * out.detach().nan_to_num(), lse


@plant(FORWARD)
def fails_on_long_rows(m, q, k, v, call):
    if call.m > 50:
        raise RuntimeError("block index out of range")
    return right(m, q, k, v, call)


@plant(FORWARD, Near)
def window_off_by_one(m, q, k, v, call):
    return right(Near(window=m.window + 1), q, k, v, call)


@plant(FORWARD)
def key_mask_ignored(m, q, k, v, call):
    return right(m, q, k, v, call.replace(key_mask=None))


@plant(FORWARD)
def softcap_ignored(m, q, k, v, call):
    return right(m, q, k, v, call.replace(softcap=None))


@plant(FORWARD)
def scale_ignored(m, q, k, v, call):
    return right(m, q, k, v, call.replace(scale=q.shape[-1] ** -0.5))


@plant("no_argument_is_ignored")
def bias_ignored(m, q, k, v, call):
    return right(m, q, k, v, call.replace(bias=None))


@plant("no_argument_is_ignored")
def sink_logits_ignored(m, q, k, v, call):
    return right(m, q, k, v, call.replace(sink_logits=None))


@plant("no_argument_is_ignored")
def causal_ignored(m, q, k, v, call):
    return right(m, q, k, v, call.replace(causal=False))


@plant("packing_is_invisible")
def segments_ignored(m, q, k, v, call):
    return right(m, q, k, v, call.replace(q_segments=None, kv_segments=None))


@plant("queries_may_be_cut", Near)
def offset_ignored(m, q, k, v, call):
    return right(m, q, k, v, call.replace(q_offset=None))


@plant("padding_is_invisible", Chunks)
def positions_count_the_padding(m, q, k, v, call):
    return right(m, q, k, v, call.replace(fixed_placement=call.replace(key_mask=None).placement()))


@plant("strides_do_not_matter")
def strides_assumed(m, q, k, v, call):
    contiguous = torch.empty(q.shape).stride()
    return right(m, q.as_strided(q.shape, contiguous) if q.stride(0) else q * 2, k, v, call)


@plant("strides_do_not_matter")
def columns_assumed_dense(m, q, k, v, call):
    dense = q if q.stride(-1) == 1 or not q.numel() else q.flatten().reshape(q.shape).flip(-1)
    return right(m, dense, k, v, call)


def _other_head(m, q, k, v, call):
    # Query head h reads h % Hkv.
    heads = torch.arange(call.q_heads) % max(call.kv_heads, 1)
    return right(m, q, k[:, heads], v[:, heads], call.replace(kv_heads=call.q_heads))


@plant("grouped_heads_are_repeated_heads")
def wrong_head_mapping(m, q, k, v, call):
    return _other_head(m, q, k, v, call)


@plant("heads_are_independent")
def heads_mixed(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out + 1e-6 * out.mean(1, keepdim=True), lse


@plant("heads_are_independent")
def one_head_for_all(m, q, k, v, call):
    return right(m, q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), call)


@plant("batches_are_independent")
def batch_mixed(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out + 1e-6 * out.mean(0, keepdim=True), lse


@plant("keys_may_be_permuted")
def last_key_counts_double(m, q, k, v, call):
    return right(m, q, k, torch.cat([v[:, :, :-1], 2 * v[:, :, -1:]], 2), call)


@plant("the_future_changes_nothing")
def later_values_leak(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out + 1e-6 * v.mean() if v.numel() else out, lse


@plant("values_enter_linearly")
def values_clipped(m, q, k, v, call):
    return right(m, q, k, v.clamp(-1, 1), call)


@plant("lse_is_the_definition")
def lse_in_base_two(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out, lse / 0.6931471805599453


@plant("lse_is_the_definition")
def lse_without_the_sink(m, q, k, v, call):
    return right(m, q, k, v, call)[0], right(m, q, k, v, call.replace(sink_logits=None))[1]


@plant("results_merge_by_lse")
def lse_of_the_maximum(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    scores = reference.logits(q, k, call).masked_fill(~m.mask(call), -torch.inf)
    return out, scores.amax(-1).to(lse.dtype) if call.m else lse


@plant("empty_rows_are_zero")
def empty_rows_get_the_mean(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    blind = ~call.allowed().any(-1)[..., None]
    groups = call.q_heads // max(call.kv_heads, 1)
    mean = v.mean(2, keepdim=True).repeat_interleave(groups, 1)
    return torch.where(blind & bool(call.m), mean, out), lse


@plant("unseen_keys_are_inert")
def products_before_the_mask(m, q, k, v, call):
    weights, lse = m.definition(q, k, call)
    return reference.grouped_apply(weights, v), lse


@plant("nan_stays_visible")
def nan_made_plausible(m, q, k, v, call):
    out, lse = right(m, q, k, v, call)
    return out.nan_to_num(0.0), lse


@plant("empty_sizes_are_legal")
def empty_sizes_crash(m, q, k, v, call):
    if not v.numel():
        raise IndexError("amax(): expected a dimension that is not empty")
    return right(m, q, k, v, call)
