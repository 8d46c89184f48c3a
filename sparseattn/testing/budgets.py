"""How far a result may be from its mechanism's definition: derived from the dtype, never picked.

The rule of the whole package. With `ref` the definition in float64, `naive` the same definition in
the tested dtype (in float32, rounded at the end, where that is not finite) and `rounding` what
adding 0.3 and taking it away again costs in that dtype:

    max|out - ref|  <=  2 * max|naive - ref| + 2 * rounding              for float32 and narrower
    max|out - ref|  <=  64 * eps * max_i sum_j |W_ij| |v_j|              for float64

Every comparison is written `error <= budget`, so that NaN fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..base import Mechanism
from ..call import AttentionCall

_EPS = torch.finfo(torch.float64).eps
_NEARBY_CALLS = 8
_EPS32 = torch.finfo(torch.float32).eps


class Verdict(NamedTuple):
    """A measured error and what it may be."""

    error: float
    budget: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the budget; a NaN is not."""
        return self.error <= self.budget

    def __str__(self) -> str:
        return f"error {self.error:.3g}, budget {self.budget:.3g}"


class Result(NamedTuple):
    """A definition's output and lse, and the gradients of its inputs where asked for."""

    out: Tensor
    lse: Tensor | None
    grads: tuple[Tensor, ...]


def largest(x: Tensor) -> float:
    """The greatest absolute value, NaN where there is one, 0 for an empty tensor."""
    return float(x.abs().max()) if x.numel() else 0.0


def distance(a: Tensor, b: Tensor) -> float:
    """`max|a - b|` in float64, where equal infinities are at distance 0; NaN is never equal."""
    a, b = a.detach().to(torch.float64), b.detach().to(torch.float64)
    return largest((a - b).masked_fill(a.isinf() & (a == b), 0.0))


def rounding(ref: Tensor, dtype: torch.dtype) -> float:
    """What adding 0.3 and taking it away costs in `dtype`: the size of its last digit here."""
    ref = ref[ref.isfinite()]
    low = ref.to(dtype)
    return distance(low + 0.3 - 0.3, ref)


def rule(naive: Tensor, ref: Tensor, dtype: torch.dtype) -> float:
    """`2 * max|naive - ref| + 2 * rounding`."""
    return 2 * distance(naive, ref) + 2 * rounding(ref, dtype)


def _finite(results: Sequence[Tensor], refs: Sequence[Tensor]) -> bool:
    return all(
        bool((x.isfinite() | ~r.isfinite()).all()) for x, r in zip(results, refs, strict=True)
    )


def define(
    mechanism: Mechanism,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    dtype: torch.dtype = torch.float64,
    seeds: tuple[Tensor, Tensor | None] | None = None,
) -> Result:
    """The definition in `dtype`, with gradients where `seeds` (of out and of lse) are given.

    Gradients are those of q, k, v, and of `sink_logits` and `bias` where the call has them.
    """
    if seeds is None:
        with torch.no_grad():
            out, lse = reference.evaluate(mechanism, q, k, v, call, dtype)
        return Result(out, lse, ())
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    sink, bias = (
        None if x is None else x.detach().clone().requires_grad_()
        for x in (call.sink_logits, call.bias)
    )
    given = [x for x in (q, k, v, sink, bias) if x is not None]
    call = call.replace(sink_logits=sink, bias=bias)
    with torch.enable_grad():
        out, lse = reference.evaluate(mechanism, q, k, v, call, dtype)
        outputs, cotangents = _seeded(out, lse, seeds)
        grads = torch.autograd.grad(outputs, given, cotangents, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, given, strict=True)]
    return Result(out.detach(), None if lse is None else lse.detach(), tuple(filled))


def _seeded(
    out: Tensor, lse: Tensor | None, seeds: tuple[Tensor, Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    outputs, cotangents = [out], [seeds[0].to(out.dtype)]
    if lse is not None and seeds[1] is not None and lse.requires_grad:
        outputs.append(lse)
        # An lse of -inf belongs to a row that sees no key: it has no slope.
        cotangents.append(seeds[1].to(lse.dtype).masked_fill(~lse.isfinite(), 0.0))
    return outputs, cotangents


class Budgets:
    """The definition of one call in float64, and what each result of that call may miss it by.

    Args:
        q, k, v, call: the call as given, in the tested dtype.
        seeds: the gradients of out, and of lse or None; without them no gradient is judged.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: AttentionCall,
        seeds: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        self.dtype = q.dtype
        self.narrow = torch.float32 if self.dtype == torch.float64 else self.dtype
        call = mechanism.with_selection(q, k, call)
        self._problem = (mechanism, q, k, v, call, seeds)
        self._nearby: list[list[float]] = []
        self.ref, self.naive = _both(mechanism, q, k, v, call, self.narrow, seeds)
        self.mass = _mass(mechanism, q, k, v, call) if self.dtype == torch.float64 else 0.0

    def _rule(self, naive: Tensor, ref: Tensor) -> float:
        if self.dtype != torch.float64:
            return rule(naive, ref, self.dtype)
        # Where no sum of magnitudes is stated (gradients, lse): the float32 budget in the digits
        # of float64, with its constant of 64 for 2.
        return 32 * rule(naive, ref, torch.float32) * (_EPS / _EPS32)

    @property
    def out_budget(self) -> float:
        """What an output of this call may miss the definition by."""
        if self.dtype == torch.float64:
            return 64 * _EPS * self.mass
        return self._rule(self.naive.out, self.ref.out)

    def out(self, out: Tensor) -> Verdict:
        """The error of an output `[B, Hq, N, Dv]`, and its budget."""
        return Verdict(distance(out, self.ref.out), self.out_budget)

    def lse(self, lse: Tensor) -> Verdict:
        """The error of a log normaliser `[B, Hq, N]`, and its budget."""
        assert self.ref.lse is not None and self.naive.lse is not None
        return Verdict(distance(lse, self.ref.lse), self._rule(self.naive.lse, self.ref.lse))

    def grads(self, grads: Sequence[Tensor], nearby: bool = False) -> list[Verdict]:
        """The errors of the gradients of q, k, v (sink logits, bias), and their budgets.

        Args:
            nearby: where a gradient is over its budget, take the greatest budget of a few calls
                with nearby numbers too. A gradient is a difference of sums, and in a case of a few
                numbers the naive one may come out ten times luckier than another right one. For
                laws, which ask of small cases whether a formula is right.
        """
        found = [
            Verdict(distance(g, r), self._rule(n, r))
            for g, n, r in zip(grads, self.naive.grads, self.ref.grads, strict=True)
        ]
        if not nearby or all(verdict.holds for verdict in found):
            return found
        budgets = [[v.budget for v in found], *self._nearby_budgets()]
        return [
            Verdict(v.error, max(each))
            for v, each in zip(found, zip(*budgets, strict=True), strict=True)
        ]

    def _nearby_budgets(self) -> list[list[float]]:
        """The budgets of the gradients of calls whose numbers differ by about a hundredth."""
        if not self._nearby:
            mechanism, q, k, v, call, seeds = self._problem
            g = torch.Generator().manual_seed(0)
            for _ in range(_NEARBY_CALLS):
                q1, k1, v1 = (
                    (x * (1 + 0.01 * torch.randn(x.shape, generator=g).to(x))).to(x.dtype)
                    for x in (q, k, v)
                )
                ref, naive = _both(mechanism, q1, k1, v1, call, self.narrow, seeds)
                self._nearby.append(
                    [self._rule(n, r) for n, r in zip(naive.grads, ref.grads, strict=True)]
                )
        return self._nearby


def _both(
    mechanism: Mechanism,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    narrow: torch.dtype,
    seeds: tuple[Tensor, Tensor | None] | None,
) -> tuple[Result, Result]:
    """The definition in float64 and in a narrower dtype; gradients in the dtype of each."""

    def in_dtype(dtype: torch.dtype) -> Result:
        cast = call.to_dtype(dtype)
        return define(mechanism, q.to(dtype), k.to(dtype), v.to(dtype), cast, dtype, seeds)

    ref, naive = in_dtype(torch.float64), in_dtype(narrow)
    if not _finite(_tensors(naive), _tensors(ref)):
        found = in_dtype(torch.float32)
        lse = None if found.lse is None else found.lse.to(narrow)
        naive = Result(found.out.to(narrow), lse, tuple(g.to(narrow) for g in found.grads))
    return ref, naive


def _tensors(result: Result) -> list[Tensor]:
    return [result.out, *([] if result.lse is None else [result.lse]), *result.grads]


def _mass(mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> float:
    """`max_i sum_j |W_ij| |v_j|`."""
    with torch.no_grad():
        q, k, v = reference.make_inert(q, k, v, mechanism.mask(call), call.groups)
        return largest(reference.grouped_apply(mechanism.weights(q, k, call).abs(), v.abs()))


def arithmetic(
    mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor
) -> tuple[float, float]:
    """The arithmetic error of an output, and its budget.

    Args:
        q, k, v: `[B, Hq, N, D]`, `[B, Hkv, M, D]`, `[B, Hkv, M, Dv]`, in the tested dtype.
        out: `[B, Hq, N, Dv]`, what an implementation made of them.

    Returns:
        `(error, budget)`; right means `error <= budget`.
    """
    verdict = Budgets(mechanism, q, k, v, call).out(out)
    return verdict.error, verdict.budget


def arithmetic_of_gradients(
    mechanism: Mechanism,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    grad_out: Tensor,
    grads: Sequence[Tensor],
    grad_lse: Tensor | None = None,
) -> list[tuple[float, float]]:
    """The arithmetic errors of gradients, and their budgets.

    Args:
        grad_out: `[B, Hq, N, Dv]`, grad_lse: `[B, Hq, N]` or None: what was propagated back.
        grads: of q, k and v, then of `sink_logits` and `bias` where the call has them.

    Returns:
        `(error, budget)` for each of `grads`.
    """
    budgets = Budgets(mechanism, q, k, v, call, (grad_out, grad_lse))
    return [(found.error, found.budget) for found in budgets.grads(grads)]
