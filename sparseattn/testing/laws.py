"""What a law is, and the subject it is tried on: one mechanism through one implementation."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import specs
from ..base import Mechanism
from ..call import AttentionCall
from ..errors import SparseAttnError, UnsupportedCallError
from ..functional import attention
from ..implementation import Implementation
from .budgets import Budgets, Verdict, distance
from .cases import Case, Inputs

LONGEST_MESSAGE = 600


class Broken(Exception):
    """A law does not hold; the text says how."""


class Refused(Exception):
    """The mechanism or implementation says, in words, that it does not serve a call."""


class Unavailable(Exception):
    """What the law needs is not on this machine, such as a device."""


# A stranger's code may end the process as well as fail; neither may end the checks.
RAISED = (Exception, SystemExit)


@dataclass(frozen=True)
class Law:
    """One statement about mechanisms that a function tries on a case.

    Attributes:
        name: its name. statement: what holds, in one sentence.
        check: raises `Broken` where it does not hold.
        binds: why it does not bind a mechanism; empty where it does.
        cases: from the smallest to the largest, so that the first that fails is the smallest.
        definition: it speaks of the definition alone, not of an implementation.
        expensive: it takes seconds (compilation), so it is only tried when asked for.
    """

    name: str
    statement: str
    check: Callable[[Subject, Case], None]
    binds: Callable[[Mechanism], str]
    cases: tuple[Case, ...]
    definition: bool = False
    expensive: bool = False


LAWS: dict[str, Law] = {}


def _always(mechanism: Mechanism) -> str:
    return ""


def law(
    statement: str,
    cases: Sequence[Case],
    binds: Callable[[Mechanism], str] = _always,
    **kinds: bool,
) -> Callable[[Callable[[Subject, Case], None]], Callable[[Subject, Case], None]]:
    """Register a function as the law of its name."""

    def register(check: Callable[[Subject, Case], None]) -> Callable[[Subject, Case], None]:
        name = check.__name__
        LAWS[name] = Law(name, statement, check, binds, tuple(cases), **kinds)
        return check

    return register


@dataclass
class Memo:
    """What all implementations of one mechanism share: definitions in float64, known refusals."""

    budgets: dict[tuple[Any, ...], Budgets] = dataclasses.field(default_factory=dict)
    confirmed: set[tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=set)


class Subject:
    """One mechanism through one implementation.

    Attributes:
        mechanism: what is checked. impl: the implementation, None for the definition alone.
    """

    def __init__(
        self, mechanism: Mechanism, impl: Implementation | None, memo: Memo | None = None
    ) -> None:
        self.mechanism = mechanism
        self.impl = impl
        self.memo = memo or Memo()

    def call(self, x: Inputs, needs_lse: bool = False) -> AttentionCall:
        """The validated request of some inputs."""
        return AttentionCall.make(x.q, x.k, x.v, needs_lse=needs_lse, **x.kw)

    def require(self, x: Inputs, needs_lse: bool = False) -> AttentionCall:
        """The request, or `Refused` with the reasons why it is not served."""
        call = self.call(x, needs_lse)
        reasons = list(self.mechanism.refusals(call))
        if not reasons and self.impl is not None:
            reasons = list(self.impl.supports(self.mechanism, call))
        if reasons:
            if not all(isinstance(reason, str) and reason for reason in reasons):
                raise Broken(f"a refusal must give its reasons in words, got {reasons!r:.200}")
            self._confirm(x, needs_lse, tuple(reasons))
            raise Refused("; ".join(reasons))
        return call

    def _confirm(self, x: Inputs, needs_lse: bool, reasons: tuple[str, ...]) -> None:
        """That the public call refuses, too, as `UnsupportedCallError` with every reason."""
        key = (self.name, reasons)
        if key in self.memo.confirmed:
            return
        kw = x.kw | ({"return_lse": True} if needs_lse else {})
        try:
            attention(x.q, x.k, x.v, self.mechanism, impl=self.name, **kw)
        except UnsupportedCallError as error:
            if len(str(error)) >= LONGEST_MESSAGE or list(error.reasons) != list(reasons):
                raise Broken(
                    f"a refusal of {len(str(error))} characters gives the reasons {error.reasons}, "
                    f"expected {list(reasons)!r:.200} in less than {LONGEST_MESSAGE}"
                ) from error
        else:
            raise Broken(f"a call is served although it is refused: {'; '.join(reasons):.200}")
        self.memo.confirmed.add(key)

    @property
    def name(self) -> str:
        """The name of the implementation; the definition's is `reference`."""
        return "reference" if self.impl is None else self.impl.name

    def both(self, x: Inputs) -> tuple[Tensor, Tensor | None]:
        """The output, and lse where the mechanism has one."""
        if "lse" not in self.mechanism.honours:
            return self.out(x), None
        self.require(x, needs_lse=True)
        return self._run(x, return_lse=True)

    def out(self, x: Inputs) -> Tensor:
        """The output `[B, Hq, N, Dv]`."""
        self.require(x)
        return self._run(x)

    def _run(self, x: Inputs, **kw: Any) -> Any:
        try:
            return attention(x.q, x.k, x.v, self.mechanism, impl=self.name, **x.kw, **kw)
        except UnsupportedCallError as error:
            raise Broken(f"supports() found no reason against the call, but: {error}") from error

    def with_grads(
        self, x: Inputs, seeds: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The output, lse, and the gradients of every float input, each by its name.

        Args:
            seeds: the gradients of out and of lse (None where there is none).
        """
        leaves = {w: t.detach().requires_grad_() for w, t in x.leaves().items()}
        fresh = x.but(**leaves)
        out, lse = self.both(fresh)
        outputs, cotangents = [out], [seeds[0]]
        if lse is not None and seeds[1] is not None and lse.requires_grad:
            outputs.append(lse)
            cotangents.append(seeds[1].masked_fill(~lse.isfinite(), 0.0).to(lse.dtype))
        if not out.requires_grad:
            raise Broken("the output has no gradient although q, k and v require one")
        found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
        grads = {
            word: torch.zeros_like(leaves[word]) if grad is None else grad
            for word, grad in zip(leaves, found, strict=True)
        }
        return out.detach(), None if lse is None else lse.detach(), grads

    def seeds(self, case: Case, x: Inputs) -> tuple[Tensor, Tensor | None]:
        """Random gradients of out and lse for a case, in the dtype of its inputs."""
        g = torch.Generator().manual_seed(500 + case.seed)
        shape = (*x.q.shape[:3], x.v.shape[3])
        grad = torch.randn(shape, generator=g, dtype=torch.float64).to(x.q.dtype)
        if "lse" not in self.mechanism.honours:
            return grad, None
        return grad, torch.randn(shape[:3], generator=g, dtype=torch.float64).to(x.q.dtype)

    def budgets(self, case: Case, x: Inputs, grads: bool = False, tag: str = "") -> Budgets:
        """The definition and budgets of a case; `tag` tells inputs apart that a law has changed."""
        key = (case, grads, tag)
        if key not in self.memo.budgets:
            seeds = self.seeds(case, x) if grads else None
            found = Budgets(self.mechanism, x.q, x.k, x.v, self.call(x), seeds)
            self.memo.budgets[key] = found
        return self.memo.budgets[key]


def hold(verdict: Verdict, what: str) -> None:
    """Raise `Broken` unless an error is within its budget."""
    if not verdict.holds:
        raise Broken(f"{what}: {verdict}")


def near(a: Tensor, b: Tensor, budget: float, what: str) -> None:
    """Raise `Broken` unless two results that each may miss the truth by `budget` agree."""
    if a.shape != b.shape:
        raise Broken(f"{what}: shapes {list(a.shape)} and {list(b.shape)}")
    hold(Verdict(distance(a, b), 2 * budget), what)


def same(a: Tensor, b: Tensor, what: str) -> None:
    """Raise `Broken` unless two tensors agree bit for bit (NaN equals NaN)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise Broken(f"{what}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}")
    differ = (a != b) & ~(a.isnan() & b.isnan())
    if bool(differ.any()):
        at = tuple(differ.nonzero()[0].tolist())
        raise Broken(
            f"{what}: {int(differ.sum())} of {a.numel()} numbers differ, the first at {list(at)}: "
            f"{float(a[at]):.9g} and {float(b[at]):.9g}"
        )


@contextmanager
def poisoned() -> Iterator[None]:
    """While it lasts, `torch.empty` holds NaN: what is never written shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def with_options(mechanism: Mechanism, changes: dict[str, Any]) -> Mechanism | None:
    """The mechanism with some options changed; None where it takes no such value."""
    own = {f.name: getattr(mechanism, f.name) for f in dataclasses.fields(mechanism)}  # type: ignore[arg-type]
    try:
        return specs.build(type(mechanism), own | changes)
    except SparseAttnError:
        return None


# Which mechanisms a law binds: each answers why not, or nothing.


def softmax_nature(mechanism: Mechanism) -> str:
    """Softmax over some of the keys."""
    fits = mechanism.nature in ("exact", "masked_softmax")
    return "" if fits else f"its nature is {mechanism.nature}"


def honours(word: str) -> Callable[[Mechanism], str]:
    """The definition uses an argument: a function for `binds`."""

    def binds(mechanism: Mechanism) -> str:
        return "" if word in mechanism.honours else f"its definition has no {word}"

    return binds


def takes(word: str) -> Callable[[Mechanism], str]:
    """Gradients exist, and the definition uses an argument."""
    return lambda mechanism: takes_gradients(mechanism) or honours(word)(mechanism)


def has_lse(mechanism: Mechanism) -> str:
    """A log normaliser is part of the definition."""
    return "" if "lse" in mechanism.honours else "its definition has no lse"


def sees_no_future(mechanism: Mechanism) -> str:
    """A later token reaches no earlier output."""
    return "it looks ahead, as it says" if mechanism.looks_ahead else ""


def takes_gradients(mechanism: Mechanism) -> str:
    """Gradients exist."""
    return "it looks ahead, so it has no gradients" if mechanism.looks_ahead else ""
