"""Wrong mechanisms: definitions, layouts, selections and options that break the contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from planted_implementations import PLANTED
from torch import Tensor

import sparseattn as sa
from sparseattn import reference


def plant(law: str, *args: Any) -> Any:
    """Put a wrong mechanism's class, built with `args`, beside the law that catches it."""

    def add(cls: type[sa.Mechanism]) -> type[sa.Mechanism]:
        PLANTED.append((cls.name, law, cls(*args)))
        return cls

    return add


@dataclass(frozen=True)
class Dense(sa.Mechanism):
    """Softmax by its own map, served by the reference alone."""

    nature = "masked_softmax"
    honours = frozenset({"scale"})

    def weights(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        return reference.masked_softmax(reference.logits(q, k, call), self.seen(call))[0]

    def seen(self, call: sa.AttentionCall) -> Tensor:
        return call.allowed()


@dataclass(frozen=True)
class Window(sa.MaskedSoftmax):
    """The window, right."""

    window: int = 4

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() < self.window


@dataclass(frozen=True)
class Blocks(sa.MaskedSoftmax):
    """Each query chooses its own block of 2 keys, and the past ones that it weighs most."""

    name = "planted_blocks"
    block = 2
    top: int = 3

    def scores(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        """The mean logit of each past block, inf of the own, -inf of later ones."""
        groups = call.q_heads // max(call.kv_heads, 1)
        padded = torch.nn.functional.pad(k, (0, 0, 0, -call.m % self.block))
        means = padded.unflatten(2, (-1, self.block)).mean(3).repeat_interleave(groups, 1)
        scores = q @ means.transpose(-1, -2)
        own = (torch.arange(call.n) + call.offset)[:, None] // self.block
        at = torch.arange(scores.shape[-1])
        scores = scores.masked_fill(at == own, torch.inf).masked_fill(at > own, -torch.inf)
        return scores.masked_fill(self.masked(call)[:, None, None], -torch.inf)

    def masked(self, call: sa.AttentionCall) -> Tensor:
        """Blocks of masked keys alone: bool `[B or 1, blocks]`."""
        if call.key_mask is None:
            return torch.zeros(1, -(-call.m // self.block), dtype=torch.bool)
        padded = torch.nn.functional.pad(call.key_mask, (0, -call.m % self.block))
        return ~padded.unflatten(1, (-1, self.block)).any(2)

    def select(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        scores = self.scores(q, k, call)
        order = scores.sort(stable=True, dim=-1, descending=True)
        ids = order.indices.masked_fill(order.values == -torch.inf, -1)
        return ids[..., : self.top].to(torch.int32)


@plant("serves_the_basic_call")
@dataclass(frozen=True)
class RefusesAll(Dense):
    name = "refuses_all"

    def supports(self, call: sa.AttentionCall) -> list[str]:
        return ["not today"]


@plant("serves_the_basic_call")
@dataclass(frozen=True)
class EndsTheProcess(Dense):
    name = "ends_the_process"

    def implementations(self) -> tuple[sa.Implementation, ...]:
        raise SystemExit(3)


@plant("compiling_changes_nothing")
@dataclass(frozen=True)
class ReferenceReadsTheHost(Dense):
    name = "reference_reads_the_host"

    def weights(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        return super().weights(q if float(q.detach().abs().sum()) else q + 1, k, call)


@plant("the_map_stays_within_the_masks")
@dataclass(frozen=True)
class LeaksOneFutureToken(Dense):
    name = "leaks_one_future_token"

    def seen(self, call: sa.AttentionCall) -> Tensor:
        place = call.placement()
        return (place.k[:, None, :] <= place.q[:, :, None] + 1)[:, None].expand(
            -1, 1, call.n, call.m
        )


@plant("the_map_stays_within_the_masks")
@dataclass(frozen=True)
class IgnoresEveryMask(Dense):
    name = "ignores_every_mask"

    def seen(self, call: sa.AttentionCall) -> Tensor:
        return torch.ones_like(call.allowed())


@plant("softmax_rows_sum_to_one")
@dataclass(frozen=True)
class NotRenormalised(Window):
    name = "not_renormalised"

    def definition(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Any:
        full, lse = reference.masked_softmax(reference.logits(q, k, call), call.allowed())
        return full.masked_fill(~self.mask(call), 0.0), lse


@plant("softmax_maps_are_softmax")
@dataclass(frozen=True)
class AnotherTemperature(Dense):
    name = "another_temperature"

    def weights(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        return super().weights(q * 1.1, k, call)


@plant("softmax_maps_are_softmax")
@dataclass(frozen=True)
class CallsItselfExact(Window):
    name = "calls_itself_exact"
    nature = "exact"


@plant("no_argument_is_ignored")
@dataclass(frozen=True)
class SaysItHonoursSoftcap(Dense):
    name = "says_it_honours_softcap"
    honours = frozenset({"scale", "softcap"})

    def weights(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        return super().weights(q, k, call.replace(softcap=None))


@plant("layout_is_what_is_visible")
@dataclass(frozen=True)
class LayoutOffByOne(Window):
    name = "layout_off_by_one"

    def layout(self, grid: sa.Grid) -> sa.Layout:
        return grid.band(self.window, self.window - 1)


@plant("layout_is_what_is_visible")
@dataclass(frozen=True)
class LayoutWrongFarAway(Window):
    name = "layout_wrong_far_away"

    def layout(self, grid: sa.Grid) -> sa.Layout:
        found = grid.band(self.window - 1, self.window - 1)
        return found | grid.first_keys(1) if grid.m > 600 else found


@plant("density_counts_the_pairs")
@dataclass(frozen=True)
class BoastsOfItsDensity(Window):
    name = "boasts_of_its_density"

    def density(self, call: sa.AttentionCall) -> float:
        return super().density(call) / 2


@plant("window_means_what_it_says")
@dataclass(frozen=True)
class WindowOneTooWide(Window):
    name = "window_one_too_wide"

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= self.window


@plant("all_blocks_are_full")
@dataclass(frozen=True)
class NeverTheFirstBlock(sa.MaskedSoftmax):
    name = "never_the_first_block"
    chunk: int = 4

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i // self.chunk == j // self.chunk) & ((j > 0) | (i == 0))


@plant("the_spec_is_the_mechanism")
@dataclass(eq=True, unsafe_hash=True)
class NotFrozen(Dense.__mro__[1]):  # type: ignore[misc]
    name = "not_frozen"
    size: int = 4

    def weights(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        return reference.masked_softmax(reference.logits(q, k, call), call.allowed())[0]


@plant("the_spec_is_the_mechanism")
@dataclass(frozen=True)
class ReprIsNoSpec(Window):
    name = "repr_is_no_spec"

    def __repr__(self) -> str:
        return "a window"


@dataclass(frozen=True)
class Features(sa.KernelizedLinear):
    """Kernelised attention with `exp` of each entry."""

    honours = frozenset()

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return x.exp()


@plant("kernel_rows_sum_to_one")
@dataclass(frozen=True)
class DividedByTheCount(Features):
    name = "divided_by_the_count"

    def weights(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        scores = reference.grouped_scores(q.exp(), k.exp()).masked_fill(~call.allowed(), 0.0)
        return scores / call.allowed().sum(-1, keepdim=True).clamp(min=1)


@plant("fused_maps_are_the_maps")
@dataclass(frozen=True)
class FusesAnotherScale(Features):
    name = "fuses_another_scale"

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return torch.relu(x)

    def fused_maps(self, call: sa.AttentionCall) -> tuple[sa.FusedMap, sa.FusedMap]:
        return sa.FusedMap("relu"), sa.FusedMap("relu", scale=2.0)


@plant("fused_maps_are_the_maps")
@dataclass(frozen=True)
class FusesHalfOfItsFeatures(Features):
    name = "fuses_half_of_its_features"

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return torch.cat([torch.relu(x), torch.relu(-x)], dim=-1)

    def fused_maps(self, call: sa.AttentionCall) -> tuple[sa.FusedMap, sa.FusedMap]:
        return sa.FusedMap("relu"), sa.FusedMap("relu")


@plant("the_future_changes_nothing")
@dataclass(frozen=True)
class StabiliserLooksAhead(Features):
    name = "stabiliser_looks_ahead"

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return (x - x.amax(2, keepdim=True)).exp() if x.shape[2] else x


@plant("lse_is_refused_where_there_is_none")
@dataclass(frozen=True)
class ServesAnLseItLacks(Features):
    name = "serves_an_lse_it_lacks"

    def refusals(self, call: sa.AttentionCall) -> list[str]:
        return []


@plant("estimates_converge")
@dataclass(frozen=True)
class OneFeatureManyTimes(sa.KernelizedLinear):
    name = "one_feature_many_times"
    nature = "softmax_estimate"
    honours = frozenset({"scale"})
    features: int = 8
    seed: int = 0

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        x = x * call.scale**0.5
        g = torch.Generator().manual_seed(self.seed)
        row = torch.randn(x.shape[-1], generator=g).to(x)
        one = (x @ row - (x * x).sum(-1) / 2).exp()
        return one[..., None].expand(*one.shape, self.features) / self.features**0.5


@plant("looking_ahead_is_for_prefill")
@dataclass(frozen=True)
class LooksAheadAndTrains(Blocks):
    name = "looks_ahead_and_trains"
    looks_ahead = True

    def refusals(self, call: sa.AttentionCall) -> list[str]:
        return []


@plant("selections_are_block_ids")
@dataclass(frozen=True)
class ChoosesTwice(Blocks):
    name = "chooses_twice"

    def select(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        ids = super().select(q, k, call)
        return torch.cat([ids, ids[..., :1]], -1)


@plant("hidden_blocks_are_not_selected")
@dataclass(frozen=True)
class ChoosesTheFuture(Blocks):
    name = "chooses_the_future"

    def select(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        blocks = -(-call.m // self.block)
        every = torch.arange(blocks, dtype=torch.int32)
        return every.expand(*q.shape[:3], blocks).contiguous()


@plant("hidden_blocks_are_not_selected")
@dataclass(frozen=True)
class ForgetsTheHoles(Blocks):
    name = "forgets_the_holes"

    def masked(self, call: sa.AttentionCall) -> Tensor:
        return torch.zeros(1, -(-call.m // self.block), dtype=torch.bool)


@plant("ties_go_to_the_lowest_index")
@dataclass(frozen=True)
class TiesGoToTheHighest(Blocks):
    name = "ties_go_to_the_highest"

    def select(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        scores = self.scores(q, k, call).flip(-1)
        order = scores.sort(stable=True, dim=-1, descending=True)
        ids = (scores.shape[-1] - 1 - order.indices).masked_fill(order.values == -torch.inf, -1)
        return ids[..., : self.top].to(torch.int32)


@plant("ties_go_to_the_lowest_index")
@dataclass(frozen=True)
class TiesGoBothWays(Blocks):
    """The best block by the lowest index, the others by the highest."""

    name = "ties_go_both_ways"
    top: int = 4

    def select(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        return torch.cat(
            [
                Blocks(top=2).select(q, k, call),
                TiesGoToTheHighest(top=3).select(q, k, call)[..., 2:],
            ],
            -1,
        )


@plant("selections_see_no_future")
@dataclass(frozen=True)
class ChoosesByTheMeanQuery(Blocks):
    name = "chooses_by_the_mean_query"

    def scores(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        return super().scores(q.mean(2, keepdim=True).expand_as(q), k, call)


@plant("selections_are_repeatable")
@dataclass(frozen=True)
class ChoosesAtRandom(Blocks):
    name = "chooses_at_random"

    def scores(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        found = super().scores(q, k, call)
        return found + torch.rand(found.shape).to(found)


class _Louder(sa.Implementation):
    name = "torch"

    def run(
        self, mechanism: sa.Mechanism, q: Tensor, k: Tensor, v: Tensor, call: sa.AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = sa.MaskedSoftmax.implementations(mechanism)[-1].run(mechanism, q, k, v, call)  # type: ignore[arg-type]
        return out * 1.01, lse


@plant("autocast_casts_the_inputs")
@dataclass(frozen=True)
class OtherMathsUnderAutocast(sa.MaskedSoftmax):
    name = "other_maths_under_autocast"

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() < 5

    def implementations(self) -> tuple[sa.Implementation, ...]:
        # `run` itself never sees autocast on, so the bug is in what is chosen under it.
        found = super().implementations()
        if not torch.is_autocast_enabled("cpu"):
            return found
        return (_Louder(), *(one for one in found if one.name != _Louder.name))
