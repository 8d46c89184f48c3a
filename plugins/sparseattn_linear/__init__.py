"""Kernelised attention: the weights are `phi(q_i) . phi(k_j)`, the cost is O(N).

Positions i (query) and j (key) are absolute: they count from the first key that the call allows and
restart in each packed document. Sums are over the keys j that query i sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import sparseattn as sa

from .features import projection

_MOST_FEATURES = 2**16
_MOST_POSITIONS = 2**31 - 1
# exp(70) times a million keys and values of a thousand are within float32, whose greatest number is
# exp(88). Dropping more than exp(30) would take typical keys, near exp(0), to its least, exp(-87).
_CAP = 70.0
_MOST_DROPPED = 30.0
_TINY, _EPS = torch.finfo(torch.float64).tiny, torch.finfo(torch.float64).eps


def _check_int(mechanism: sa.Mechanism, option: str, least: int, most: int) -> None:
    value = getattr(mechanism, option)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise sa.InvalidInputError(
            f"{mechanism.name}: option {option} got {value!r:.80}, expected an int from {least} to "
            f"{most}"
        )


@dataclass(frozen=True)
class Linear(sa.KernelizedLinear):
    """Linear attention with the feature map `elu(x) + 1`.

    `W[i, j] = phi(q_i) . phi(k_j) / sum_j phi(q_i) . phi(k_j)`, with `phi(x) = elu(x) + 1`: `x + 1`
    where x > 0, else `exp(x)`. All weights are positive.

    Nature: a different function; pretrained softmax weights need training for it. Refuses: a scale,
    since the definition has none. Cost: O(N D Dv) time, a state of D (Dv + 1) numbers a head.
    """

    name = "linear"
    nature = "different_function"
    source = (
        "Katharopoulos et al. 2020, Transformers are RNNs, equations 5 and 7 (arXiv:2006.16236)"
    )
    honours = frozenset()

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return torch.nn.functional.elu(x) + 1

    def fused_maps(self, call: sa.AttentionCall) -> tuple[sa.FusedMap, sa.FusedMap]:
        return sa.FusedMap("elu_plus_one"), sa.FusedMap("elu_plus_one")


@dataclass(frozen=True)
class Performer(sa.KernelizedLinear):
    """FAVOR+: positive random features whose product estimates the softmax kernel.

    With `x = sqrt(scale) * q_i` or `k_j`, and rows `w_f` that are each N(0, I),

        phi_f(x) = exp(w_f . x - |x|^2 / 2) / sqrt(features)
        E[phi(q_i) . phi(k_j)] = exp(scale * q_i . k_j)

    and W is that product divided by its row sum. The error falls as `1 / sqrt(features)`, and grows
    with `exp(scale * |q_i + k_j|^2)`.

    Nothing looks at later keys. Queries drop the factors that are common to a row, which cancel in
    the division: their greatest feature is 1. The exponent of a key is at most `|w_f|^2 / 2`, which
    float32 holds up to about D = 128; for wider heads the keys drop a factor that depends on the
    projection alone. Long keys underflow, all features at once: rows whose sum is out of range are
    evaluated again in float64, each key in a scale of its own (`scaled_map`); a row that not even
    that can tell, whose products are below `exp(-600)`, is NaN.

    Nature: an estimate of softmax. Refuses: scale <= 0, for which `sqrt(scale) * x` is not defined
    or leaves nothing of x. Cost: O(N features (D + Dv)) time, a state of features (Dv + 1) numbers
    a head.

    Attributes:
        features: how many random features; the budget.
        seed: the same seed gives the same features, on every device.
        orthogonal: rows in orthogonal blocks of D, which lowers the variance.
    """

    name = "performer"
    nature = "softmax_estimate"
    source = (
        "Choromanski et al. 2021, Rethinking Attention with Performers, lemma 1 and equation 5, "
        "section 3.2 (arXiv:2009.14794)"
    )
    honours = frozenset({"scale"})

    features: int = 256
    seed: int = 0
    orthogonal: bool = True

    def __post_init__(self) -> None:
        _check_int(self, "features", 1, _MOST_FEATURES)
        _check_int(self, "seed", 0, 2**63 - 1)
        if not isinstance(self.orthogonal, bool):
            raise sa.InvalidInputError(
                f"performer: option orthogonal got {self.orthogonal!r:.80}, expected True or False"
            )

    def supports(self, call: sa.AttentionCall) -> list[str]:
        if call.scale > 0:
            return []
        return [
            f"its features are of x * sqrt(scale), which needs a scale greater than 0, got "
            f"{call.scale}"
        ]

    def _project(self, x: Tensor) -> tuple[Tensor, float]:
        rows, longest = projection(
            self.features, x.shape[-1], self.seed, self.orthogonal, x.dtype, x.device
        )
        return x @ rows.T, longest

    def _dropped(self, longest: float) -> float:
        """The factor that all keys drop, as a logarithm."""
        return min(max(longest / 2 - _CAP, 0.0), _MOST_DROPPED) + math.log(self.features) / 2

    def _exponents(self, x: Tensor, call: sa.AttentionCall) -> tuple[Tensor, float]:
        x = x * math.sqrt(call.scale)
        exponent, longest = self._project(x)
        dropped = self._dropped(longest)
        return exponent.sub_((x * x).sum(-1, keepdim=True).mul_(0.5).add_(dropped)), longest

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return self._exponents(x, call)[0].exp_()

    def query_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        exponent, _ = self._project(x * math.sqrt(call.scale))
        # No gradient through the maximum: it cancels in the division.
        return exponent.sub_(exponent.detach().amax(-1, keepdim=True)).exp_()

    def fused_maps(self, call: sa.AttentionCall) -> tuple[sa.FusedMap, sa.FusedMap]:
        wide = torch.float64 if call.dtype == torch.float64 else torch.float32
        rows, longest = projection(
            self.features, call.head_dim, self.seed, self.orthogonal, wide, call.device
        )
        scale, dropped = math.sqrt(call.scale), self._dropped(longest)
        return (
            sa.FusedMap("exp", scale, projection=rows, lowered="most"),
            sa.FusedMap("exp", scale, projection=rows, lowered="half_square", drop=dropped),
        )

    def scaled_map(
        self, x: Tensor, positions: Tensor, call: sa.AttentionCall
    ) -> tuple[Tensor, Tensor]:
        """`feature_map` as features of at most 1, and the logarithm of their factor a row.

        x `[B, H, n, D]` -> `[B, H, n, F]` and `[B, H, n, 1]`; the factor has no gradient, since it
        is not a factor of the product of the two.
        """
        exponent, _ = self._exponents(x, call)
        greatest = exponent.detach().amax(-1, keepdim=True)
        return exponent.sub_(greatest).exp_(), greatest

    def weights(self, q: Tensor, k: Tensor, call: sa.AttentionCall) -> Tensor:
        # As in the base class, but with each key's factor taken relative to the greatest of those
        # that the query sees: features of long keys underflow even in float64, quotients do not.
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        place = call.placement()
        phi_q = self.query_map(q.to(wide), place.q[:, None], call).to(q.dtype)
        phi_k, factor = self.scaled_map(k.to(wide), place.k[:, None], call)
        phi_k, factor = (
            x.repeat_interleave(call.groups, dim=1) for x in (phi_k.to(q.dtype), factor.mT)
        )
        products, allowed = phi_q @ phi_k.mT, call.allowed()
        if call.m == 0:
            return products
        factor = factor.masked_fill(~allowed, -torch.inf)
        greatest = factor.amax(-1, keepdim=True)
        factor = (factor - greatest.masked_fill(greatest == -torch.inf, 0.0)).exp()
        scores = (products * factor.to(q.dtype)).masked_fill(~allowed, 0.0)
        total = scores.sum(-1, keepdim=True)
        if q.dtype == torch.float64:
            # Whatever is lost is lost in words: NaN, not the 0 of a query that sees no key.
            least = self.features * call.m * _TINY / _EPS
            total = total.masked_fill((total < least) & allowed.any(-1, keepdim=True), torch.nan)
        return scores / total.masked_fill(total == 0, 1.0)


@dataclass(frozen=True)
class Taylor(sa.KernelizedLinear):
    """The second-order Taylor polynomial of exp in place of exp.

    `W[i, j] = p(x_ij) / sum_j p(x_ij)` with `p(x) = 1 + x + x * x / 2`, which is at least 1/2, and
    `x_ij = scale * q_i . k_j`. The features of q are 1, its entries and the distinct products of
    two of them: `1 + D + D (D + 1) / 2`. The scale, of any sign, stands on the side of the queries.

    Nature: a different function; close to softmax only while `|x_ij|` is small. Refuses: nothing.
    Cost: O(N D^2 Dv) time, a state of about D^2 Dv / 2 numbers a head.
    """

    name = "taylor"
    nature = "different_function"
    source = "Arora et al. 2024, Based, section 4.1 (arXiv:2402.18668)"
    honours = frozenset({"scale"})

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        dim = x.shape[-1]
        # (x . y)^2 / 2 is half the sum of squares, and each product of two entries once. Those are
        # taken by their distance modulo D, so that one strided product makes them all.
        turned = torch.cat([x, x], dim=-1).unfold(-1, dim, 1)  # [..., s, i] = x[(i + s) % D]
        pairs = turned[..., 1 : (dim + 1) // 2, :] * x[..., None, :]
        parts = [pairs.flatten(-2), x.square() * math.sqrt(0.5), x, torch.ones_like(x[..., :1])]
        if dim % 2 == 0:
            parts.insert(0, x[..., : dim // 2] * x[..., dim // 2 :])
        # The greatest terms come last: a product that starts with them rounds each later one to
        # their size, which at D = 64 made float32 outputs four times less exact.
        return torch.cat(parts, dim=-1)

    def query_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return self.feature_map(x * call.scale, positions, call)

    def dot_weight(self, dot: Tensor, call: sa.AttentionCall) -> Tensor:
        """The weight from `q . k`, elementwise: what the engine uses for runs of some thousands.

        `1 + x + x * x / 2 = ((x + 1) ** 2 + 1) / 2`, a sum of nothing that could cancel.
        """
        x = torch.add(dot.new_full((), math.sqrt(0.5)), dot, alpha=math.sqrt(0.5) * call.scale)
        return torch.addcmul(dot.new_full((), 0.5), x, x)


@dataclass(frozen=True)
class Cosformer(sa.KernelizedLinear):
    """Linear attention that weighs near keys more, by a cosine of the distance.

    `W[i, j] = w_ij / sum_j w_ij`, `w_ij = relu(q_i) . relu(k_j) * cos(pi (i - j) / (2 horizon))`.
    By Ptolemy's identity `phi(x) = [relu(x) cos(t), relu(x) sin(t)]`, with
    `t = pi * position / (2 horizon)`. The paper's M, the longest sequence, is `horizon`.

    Nature: a different function; pretrained softmax weights need training for it. Refuses: a scale,
    since the definition has none, and a call whose positions span more than `horizon`, where the
    cosine turns negative (positions given as a tensor `q_offset` are not read, so not checked).
    Cost: O(N D Dv) time, a state of 2 D (Dv + 1) numbers a head.

    Attributes:
        horizon: the most positions a sequence may have.
    """

    name = "cosformer"
    nature = "different_function"
    source = "Qin et al. 2022, cosFormer, equations 9 to 12 (arXiv:2202.08791)"
    honours = frozenset()

    horizon: int = 8192

    def __post_init__(self) -> None:
        _check_int(self, "horizon", 1, _MOST_POSITIONS)

    def supports(self, call: sa.AttentionCall) -> list[str]:
        first, stop = 0, max(call.m, call.n)
        if not isinstance(call.offset, Tensor) and call.q_segments is None:
            # A causal query before the first key sees nothing, wherever it is.
            first = 0 if call.causal else min(0, call.offset)
            stop = max(call.m, call.offset + call.n)
        if stop - first <= self.horizon:
            return []
        return [
            f"its positions span {stop - first}, more than horizon={self.horizon}, where its "
            "cosine turns negative: raise horizon"
        ]

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        angle = positions[..., None].to(x.dtype) * (math.pi / (2 * self.horizon))
        x = torch.relu(x)
        return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)

    def fused_maps(self, call: sa.AttentionCall) -> tuple[sa.FusedMap, sa.FusedMap]:
        turn = math.pi / (2 * self.horizon)
        return sa.FusedMap("relu", turn=turn), sa.FusedMap("relu", turn=turn)


@dataclass(frozen=True)
class Retention(sa.KernelizedLinear):
    """Retention: no softmax, no division, and an exponential decay that differs by head.

    `W[i, j] = scale * q_i . k_j * gamma_h ** (i - j)` for `j <= i`, not divided, with
    `gamma_h = 1 - 2 ** (-5 - h)` for query head h. The paper's rotation, group norm and gate belong
    to a module, not to W.

    Nature: a different function; pretrained softmax weights need training for it. Refuses: calls
    that are not causal, since the weights of later keys would grow without bound. Cost: O(N D Dv)
    time, a state of D Dv numbers a query head.
    """

    name = "retention"
    nature = "different_function"
    source = "Sun et al. 2023, Retentive Network, equations 5 to 8 (arXiv:2307.08621)"
    honours = frozenset({"scale"})
    normalize = False

    def supports(self, call: sa.AttentionCall) -> list[str]:
        if call.causal:
            return []
        return ["its decay gamma ** (i - j) is defined for earlier keys only: pass causal=True"]

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return x

    def query_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return x * call.scale

    def fused_maps(self, call: sa.AttentionCall) -> tuple[sa.FusedMap, sa.FusedMap]:
        return sa.FusedMap(scale=call.scale), sa.FusedMap()

    def decay(self, call: sa.AttentionCall) -> Tensor:
        # float64, whatever the call's dtype: float32 holds 1 - 2 ** -25 as 1.
        heads = torch.arange(call.q_heads, dtype=torch.float64, device="cpu")
        return 1 - 2.0 ** (-5 - heads)


class Plugin:
    """The entry point's object."""

    sparseattn_api = 1

    @sa.hookimpl
    def register_mechanisms(self, register):  # type: ignore[no-untyped-def]
        for mechanism in (Linear, Performer, Taylor, Cosformer, Retention):
            register(mechanism)
