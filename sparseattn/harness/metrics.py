"""Approximation error and what explains it, in float64.

Everything here speaks of definitions: how far a mechanism's map is from exact softmax attention,
how much of the exact mass it keeps, and what the best keys could do with the same budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base import MaskedSoftmax, Mechanism
from ..call import AttentionCall
from ..implementation import Implementation
from ..layout import Grid, Layout
from ..reference import exact, grouped_apply, logits, masked_softmax
from ..testing.budgets import largest
from .inputs import HeadName

EPS64 = torch.finfo(torch.float64).eps
# A sum below this may have lost digits to underflow.
TINY = torch.finfo(torch.float64).tiny / EPS64
# Elements of one dense [B, Hq, slab, M] map while measuring, and of all cached ranks together.
SLAB = 8 * 2**20
RANK_CACHE = 256 * 2**20


class _PrefixMean(Implementation):
    """Running sums of the values, in float32 or wider."""

    name = "torch"

    def run(
        self, mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(v.dtype, torch.float32)
        if call.causal:
            position = call.placement().q[0]
            seen = (position + 1).clamp(0, call.m)
            # One more row, of zeros: the sum over no keys.
            sums = torch.nn.functional.pad(v.to(wide).cumsum(2), (0, 0, 1, 0))[:, :, seen]
            mean = sums / seen.clamp(min=1)[:, None]
        else:
            mean = v.to(wide).mean(2, keepdim=True).expand(-1, -1, call.n, -1)
        return mean.repeat_interleave(call.groups, dim=1).to(q.dtype), None


class MeanOfValues(Mechanism):
    """The control that knows nothing: every visible value weighs the same (the prefix mean under
    causal). It is no registered mechanism and serves calls without masks and segments only."""

    name = "mean_of_values"
    source = "the error of attention that ignores queries and keys"
    honours = frozenset({"scale"})

    def weights(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
        mask = call.allowed().to(q.dtype)
        # In q's dtype, but counted without rounding: float16 ends at 65504.
        count = call.allowed().sum(-1, keepdim=True).clamp(min=1)
        share = (mask.to(torch.float64) / count).to(q.dtype)
        return share.expand(call.batch, call.q_heads, -1, -1)

    def supports(self, call: AttentionCall) -> list[str]:
        if call.key_mask is not None or call.q_segments is not None:
            return ["the harness takes the mean of the values of plain calls only"]
        return []

    def implementations(self) -> tuple[Implementation, ...]:
        return (_PREFIX_MEAN,)


_PREFIX_MEAN = _PrefixMean()


@dataclass(frozen=True)
class Full(MaskedSoftmax):
    """The control that is exact, where no `full` is registered: SPARSEATTN_PLUGINS may leave it
    out."""

    name = "full"
    nature = "exact"
    source = "what every mechanism is compared with"

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(i.shape, j.shape)
        return torch.ones(shape, dtype=torch.bool, device=i.device)

    def layout(self, grid: Grid) -> Layout:
        return grid.everything()


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if math.isfinite(value) else None


def relative_l2(out: Tensor, ref: Tensor) -> float:
    """`|out - ref| / |ref|` over all elements; 0 for 0 / 0, infinite for x / 0."""
    off = float((out - ref).norm())
    size = float(ref.norm())
    if size == 0:
        return 0.0 if off == 0 else math.inf
    return off / size


def row_errors(out: Tensor, ref: Tensor) -> tuple[np.ndarray, int]:
    """`|o_i - ref_i| / |ref_i|` of every batch, head and row, and how many rows were left out.

    Args:
        out, ref: `[B, H, N, Dv]`. Rows with `ref_i = 0` have no relative error.
    """
    size = ref.norm(dim=-1)
    keep = size > 0
    errors = ((out - ref).norm(dim=-1)[keep] / size[keep]).cpu().numpy()
    return errors, int((~keep).sum())


def percentile(values: np.ndarray, percent: float) -> float:
    """By linear interpolation; NaN of nothing."""
    return float(np.percentile(values, percent)) if values.size else math.nan


def approximation(out: Tensor, ref: Tensor, mean_error: float | None) -> dict[str, Any]:
    """The `error` record of a row; `rows_left_out` counts those where exact attention is 0.

    Args:
        out, ref: the definition and exact attention in float64, `[B, Hq, N, Dv]`.
        mean_error: the rel_l2 of the mean of the values, or None where that has failed.
    """
    total = relative_l2(out, ref)
    errors, left_out = row_errors(out, ref)
    against = math.nan
    if mean_error is not None:
        if mean_error > 0:
            against = total / mean_error
        elif total == 0:
            against = 1.0
    return {
        "rel_l2": finite_or_none(total),
        "row_p50": finite_or_none(percentile(errors, 50)),
        "row_p95": finite_or_none(percentile(errors, 95)),
        "row_max": finite_or_none(float(errors.max()) if errors.size else math.nan),
        "vs_mean_of_values": finite_or_none(against),
        "rows_left_out": left_out,
    }


def by_head(out: Tensor, ref: Tensor, names: Sequence[HeadName]) -> list[dict[str, Any]]:
    """The `heads` record of a row: rel_l2 of each query head over all batches and rows.

    Args:
        out, ref: the definition and exact attention in float64, `[B, Hq, N, Dv]`.
        names: the layer (or None) and the number there of each head.
    """
    return [
        {
            "layer": layer,
            "head": head,
            "rel_l2": finite_or_none(relative_l2(out[:, at], ref[:, at])),
        }
        for at, (layer, head) in enumerate(names)
    ]


@dataclass(frozen=True)
class Inside:
    """What a mechanism's map keeps of the exact one.

    Attributes:
        mass: retained exact mass of each row that sees a key, flat.
        used, allowed: pairs of the mechanism, and of the call's own masks.
        residual: greatest violation of `O - O' = (1 - m)(mean outside - mean inside)`.
        tolerance: what float64 arithmetic may leave of it.
        oracle: output of the exact top-k with as many keys a row, `[B, Hq, N, Dv]`, if asked for.
    """

    mass: np.ndarray
    used: int
    allowed: int
    residual: float
    tolerance: float
    oracle: Tensor | None

    @property
    def consistent(self) -> bool:
        """Whether the definition's output and its mask tell one story."""
        return self.residual <= self.tolerance


class Exact:
    """Exact attention of one call in float64, and what the metrics need of its map.

    Args:
        q, k, v: `[B, Hq, N, D]`, `[B, Hkv, M, D]`, `[B, Hkv, M, Dv]`; `call` fits them: the rows
            that are measured, at their own positions.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> None:
        self.call = call.to_dtype(torch.float64)
        self.q, self.k, self.v = (x.to(torch.float64) for x in (q, k, v))
        self.out = exact(self.q, self.k, self.v, self.call)[0]
        self._ranks: dict[int, Tensor] = {}
        self._cached = 0

    def _slabs(self) -> Iterator[slice]:
        c = self.call
        step = max(1, SLAB // max(1, c.batch * c.q_heads * c.m))
        for start in range(0, c.n, step):
            yield slice(start, min(start + step, c.n))

    def _ranked(self, start: int, scores: Tensor, allowed: Tensor) -> Tensor:
        """Each key's place in the order of its row's logits, 0 the greatest; ties lowest index."""
        if start in self._ranks:
            return self._ranks[start]
        small = torch.int16 if self.call.m < 2**15 else torch.int32
        order = scores.masked_fill(~allowed, -torch.inf).argsort(
            dim=-1, descending=True, stable=True
        )
        places = torch.arange(self.call.m, dtype=small, device=scores.device)
        ranks = torch.empty(order.shape, dtype=small, device=scores.device)
        ranks.scatter_(-1, order, places.expand_as(order))
        size = ranks.numel() * ranks.element_size()
        if self._cached + size <= RANK_CACHE:
            self._ranks[start] = ranks
            self._cached += size
        return ranks

    def inside(
        self, mechanism: Mechanism, call: AttentionCall, out: Tensor, oracle: bool = True
    ) -> Inside:
        """Measure the map of a mechanism against the exact one.

        Args:
            call: the measured call with the mechanism's selection.
            out: the mechanism's definition in float64, `[B, Hq, N, Dv]`.
        """
        masses: list[np.ndarray] = []
        oracles: list[Tensor] = []
        used = seen_pairs = 0
        residual = 0.0
        for piece in self._slabs():
            part = call.take_rows(piece).to_dtype(torch.float64)
            scores = logits(self.q[:, :, piece], self.k, part)
            allowed = part.allowed().expand_as(scores)
            mask = (mechanism.mask(part) & part.allowed()).expand_as(scores)
            used += int(mask.sum())
            seen_pairs += int(allowed.sum())
            counts = mask.sum(-1, keepdim=True)
            powers = scores.masked_fill(~allowed, -torch.inf)
            powers = powers.sub_(powers.amax(-1, keepdim=True)).exp_().nan_to_num_(nan=0.0)
            if oracle:
                top = self._ranked(piece.start, scores, allowed) < counts
                oracles.append(self._mean(powers * top, scores, top)[0])
            inner, within = self._mean(powers * mask, scores, mask)
            outside = allowed & ~mask
            outer, lost = self._mean(powers * outside, scores, outside)
            total = within + lost
            total = total.masked_fill(total == 0, 1.0)  # a row that sees no key
            masses.append((within / total)[..., 0][allowed.any(-1)].cpu().numpy())
            # `1 - m` is summed from the outside weights, so that it does not cancel. O' comes from
            # the definition and the mask from `mask`: they must tell one story.
            gap = self.out[:, :, piece] - out[:, :, piece] - lost / total * (outer - inner)
            residual = _worst(residual, largest(gap))
        return Inside(
            np.concatenate(masses) if masses else np.zeros(0),
            used,
            seen_pairs,
            residual,
            # Exact attention, O' and two means: each has weights that sum to 1.
            64 * EPS64 * 4 * largest(self.v),
            torch.cat(oracles, dim=2) if oracles else None,
        )

    def _mean(self, powers: Tensor, scores: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The softmax average of the values over some keys `[B, Hq, n, Dv]`, 0 over none, and the
        sum of their `powers`, `exp(score - the row's greatest)`, which are 0 elsewhere."""
        total = powers.sum(-1, keepdim=True)
        if bool(((total < TINY) & keys.any(-1, keepdim=True)).any()):
            # Next to nothing of the row's mass is here: the powers have underflowed.
            return grouped_apply(masked_softmax(scores, keys)[0], self.v), total
        return grouped_apply(powers, self.v) / total.masked_fill(total == 0, 1.0), total


def _worst(a: float, b: float) -> float:
    """The greater of the two, NaN if either is."""
    return a if a > b or math.isnan(a) else b


def mark_pareto(rows: Iterable[dict[str, Any]]) -> None:
    """Set `pareto`: no other row of the same input, length and dtype has both less error and less
    time (or one of them less and the other equal). Rows without error or time are never marked."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        row["pareto"] = False
        point = _point(row)
        if point is not None:
            group = tuple(row[key] for key in ("input", "length", "dtype", "causal", "seed"))
            groups.setdefault(group, []).append(row)
    for group_rows in groups.values():
        points = [_point(row) for row in group_rows]
        for row, (error, time) in zip(group_rows, points, strict=True):  # type: ignore[misc]
            row["pareto"] = not any(
                e <= error and t <= time and (e < error or t < time)  # type: ignore[misc]
                for e, t in points  # type: ignore[misc]
            )


def _point(row: Mapping[str, Any]) -> tuple[float, float] | None:
    if row["status"] != "ok" or not row["error"] or not row["time"]:
        return None
    error, time = row["error"]["rel_l2"], row["time"]["median_s"]
    return None if error is None or time is None else (error, time)


def checked_rows(n: int, seed: int, limit: int = 4096, count: int = 128) -> Tensor | None:
    """The queries that are checked: None (all) up to `limit`, else `count` of them, in order.

    The first and the last, those at block edges of common sizes near the start, the middle and the
    end, and seeded random ones.
    """
    if n <= limit:
        return None
    wanted = [0, n - 1]
    for size in (16, 64, 128, 256, 512, 1024):
        for base in (size, n // 2 // size * size, (n - 1) // size * size):
            wanted += [base - 1, base, base + 1]
    chosen = {i for i in wanted if 0 <= i < n}
    shuffled = np.random.default_rng(seed).permutation(n)
    for i in shuffled.tolist():
        if len(chosen) >= min(count, n):
            break
        chosen.add(i)
    return torch.tensor(sorted(chosen))
