"""Trying the laws: on one mechanism, on every registered one, and from pytest."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .. import registry
from ..base import Mechanism
from ..choice import candidates
from ..errors import InvalidInputError, did_you_mean
from ..implementation import Implementation
from . import (
    laws_arguments,  # noqa: F401  (importing them registers their laws)
    laws_arithmetic,  # noqa: F401
    laws_conduct,  # noqa: F401
    laws_definition,  # noqa: F401
    laws_derivatives,  # noqa: F401
    laws_masks,  # noqa: F401
    laws_patterns,  # noqa: F401
    laws_selection,  # noqa: F401
    laws_structure,  # noqa: F401
)
from .examples import default_of, examples, small
from .laws import LAWS, RAISED, Broken, Law, Memo, Refused, Subject, Unavailable, poisoned

DEFINITION = "definition"
_NARROWER = {"float32": "float64", "float64": "float32"}
_HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class CheckResult:
    """What became of one law for one mechanism and one implementation.

    Attributes:
        law: its name. mechanism: the spec. implementation: its name, or `definition`.
        status: `passed`, `failed`, `refused` (every case is refused, in words) or `skipped` (what
            the law needs is not on this machine). A law that does not bind has no result.
        reason: what was wrong, or why it was refused or skipped. case: the smallest failing case.
    """

    law: str
    mechanism: str
    implementation: str
    status: str
    reason: str = ""
    case: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        text = f"{self.law}: {self.status}: {self.mechanism}, implementation {self.implementation}"
        if self.status == "failed":
            text += f"\n  law   {LAWS[self.law].statement}\n  case  {self.case}"
        return text + (f"\n  {self.reason}" if self.reason else "")


class Check(NamedTuple):
    """One law to be tried on one mechanism through one implementation (None: the definition)."""

    mechanism: Mechanism
    impl: Implementation | None
    law: Law

    @property
    def implementation(self) -> str:
        return DEFINITION if self.impl is None else self.impl.name

    def __str__(self) -> str:
        return f"{self.mechanism!r}-{self.implementation}-{self.law.name}"


def _chosen(laws: Iterable[str] | None, expensive: bool) -> list[Law]:
    if laws is None:
        return [law for law in LAWS.values() if expensive or not law.expensive]
    wanted = list(laws)
    for name in wanted:
        if name not in LAWS:
            raise InvalidInputError(
                f"no law is named {name!r:.80}; expected some of {', '.join(LAWS)}."
                f"{did_you_mean(str(name), LAWS)}"
            )
    return [LAWS[name] for name in wanted]


def _mechanism(given: str | Mechanism | type[Mechanism]) -> Mechanism:
    if isinstance(given, type) and issubclass(given, Mechanism):
        return small(default_of(given))
    return registry.mechanism(given)  # type: ignore[arg-type]


def _binds(law: Law, mechanism: Mechanism) -> bool:
    try:
        return not law.binds(mechanism)
    except RAISED:
        return True  # trying it shows what it raises


def checks_for(
    mechanism: str | Mechanism | type[Mechanism],
    impl: str | None = None,
    laws: Iterable[str] | None = None,
    expensive: bool = False,
) -> list[Check]:
    """Every check of a mechanism: laws of the definition once, the others for each implementation.

    A law that does not bind the mechanism is left out.

    Args:
        mechanism: a spec, an instance or a class. impl: only this implementation, by name.
        laws: only these, by name. expensive: also those that compile, and implementations that are
            `on_request`. Those for which this machine lacks something are tried by name alone.

    Raises:
        InvalidInputError: no implementation or law has that name.
    """
    mech = _mechanism(mechanism)
    try:
        found = candidates(mech)
    except RAISED:
        found = []  # "some call is served" fails with what it raised
    if impl is not None:
        known = [one.name for one in found]
        if impl not in known:
            raise InvalidInputError(
                f"impl={impl!r:.80} is no implementation of {mech.name!r}; expected one of "
                f"{', '.join(known)}.{did_you_mean(str(impl), known)}"
            )
        found = [one for one in found if one.name == impl]
    else:
        found = [one for one in found if not one.missing() and (expensive or not one.on_request)]
    bound = [law for law in _chosen(laws, expensive) if _binds(law, mech)]
    checks = [Check(mech, None, law) for law in bound if law.definition]
    return checks + [Check(mech, one, law) for one in found for law in bound if not law.definition]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """One thread, which small calls are faster on, and what a stranger prints on standard error."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        torch.set_num_threads(threads)


def try_check(check: Check, memo: Memo | None = None) -> CheckResult:
    """Try one law. Whatever the mechanism raises becomes a result; nothing is raised."""
    start = time.perf_counter()
    with _quiet():
        status, reason, case = _verdict(check, memo or Memo())
    seconds = time.perf_counter() - start
    names = (check.law.name, repr(check.mechanism), check.implementation)
    return CheckResult(*names, status, reason, case, seconds)


def _verdict(check: Check, memo: Memo) -> tuple[str, str, str]:
    subject = Subject(check.mechanism, check.impl, memo)
    refusals: list[str] = []
    served = 0
    cases = list(check.law.cases)
    try:
        if check.law.binds(check.mechanism):
            return "failed", "the law binds it at one time and not at another", str(cases[0])
    except RAISED as error:
        return "failed", f"asking what it is raised {type(error).__name__}: {error}", str(cases[0])
    while cases:
        case = cases.pop(0)
        try:
            with poisoned():
                check.law.check(subject, case)
            served += 1
        except Refused as refusal:
            refusals.append(str(refusal))
            # One that serves only some dtypes is still bound by the laws.
            if not cases and not served:
                tried = {c.dtype for c in check.law.cases}
                cases = _other_dtypes(check.law, tried, len(refusals))
        except Unavailable as reason:
            return "skipped", str(reason), ""
        except Broken as broken:
            return "failed", str(broken), str(case)
        except RAISED as error:
            return "failed", f"it raised {type(error).__name__}: {str(error)[:400]}", str(case)
    if not served:
        return "refused", refusals[0] if refusals else "no case", ""
    return "passed", f"{len(refusals)} of its cases are refused" if refusals else "", ""


def _other_dtypes(law: Law, tried: set[str], refused: int) -> list[Any]:
    if len(tried) != 1 or refused != len(law.cases):
        return []
    (dtype,) = tried
    other = _NARROWER.get(dtype)
    return [] if other is None else [case.but(dtype=other) for case in law.cases]


def check_mechanism(
    mechanism: str | Mechanism | type[Mechanism],
    impl: str | None = None,
    laws: Iterable[str] | None = None,
    expensive: bool = False,
    progress: Callable[[CheckResult], None] | None = None,
) -> list[CheckResult]:
    """Try the laws on a mechanism and all its implementations; a broken law raises nothing.

    Args:
        mechanism: a spec, an instance or a class, registered or not. A class is tried with small
            options, which small cases reach. impl: only this implementation.
        laws: only these, by name. expensive: also the laws that compile.
        progress: called with each result as it comes.

    Raises:
        InvalidInputError: no implementation or law has that name.
        UnknownMechanismError, UnknownOptionError: the spec names nothing.
    """
    memo = Memo()
    results = []
    for check in checks_for(mechanism, impl, laws, expensive):
        results.append(try_check(check, memo))
        if progress is not None:
            progress(results[-1])
    return results


def assert_mechanism(
    mechanism: str | Mechanism | type[Mechanism],
    impl: str | None = None,
    laws: Iterable[str] | None = None,
    expensive: bool = False,
) -> None:
    """`check_mechanism`, for a test: raises where a law is broken.

    Raises:
        AssertionError: it shows each broken law with its smallest failing case.
    """
    results = check_mechanism(mechanism, impl, laws, expensive)
    broken = [str(result) for result in results if result.status == "failed"]
    if broken:
        raise AssertionError(f"{len(broken)} laws are broken\n" + "\n".join(broken))


def run_checks(
    names: Iterable[str] | None = None,
    impl: str | None = None,
    expensive: bool = False,
    progress: Callable[[CheckResult], None] | None = None,
    laws: Iterable[str] | None = None,
) -> list[CheckResult]:
    """Try the laws on registered mechanisms: what `sparseattn check` shows.

    Args:
        names: names or specs; None is every registered mechanism. A bare name is tried with small
            options, which small cases reach, and the laws of arithmetic with its defaults too.
        impl, expensive, progress, laws: as in `check_mechanism`. A mechanism that has no
            implementation `impl` is left out, unless no mechanism has it.
    """
    wanted = [r.name for r in registry.list_mechanisms()] if names is None else list(names)
    picked = None if laws is None else list(laws)
    results: list[CheckResult] = []
    known: set[str] = set()
    for name in wanted:
        for mech, chosen in _tried(name, picked):
            own = {one.name for one in candidates(mech)}
            known |= own
            if impl is None or impl in own:
                results += check_mechanism(mech, impl, chosen, expensive, progress)
    if impl is not None and impl not in known:
        raise InvalidInputError(
            f"impl={impl!r:.80} is no implementation of these mechanisms; expected one of "
            f"{', '.join(sorted(known))}.{did_you_mean(str(impl), known)}"
        )
    return results


def _tried(name: str, laws: list[str] | None) -> list[tuple[Mechanism, list[str] | None]]:
    """The mechanisms that stand for a name, each with the laws to try (None: all)."""
    if "(" in name:
        return [(registry.mechanism(name), laws)]
    first, *usual = examples(name)
    allowed = [w for w in LAWS_OF_DEFAULTS if laws is None or w in laws]
    return [(first, laws), *((mech, allowed) for mech in usual)]


# What the defaults may still break when small options break nothing: lengths about their size.
LAWS_OF_DEFAULTS = (
    "forward_is_the_definition",
    "gradients_are_the_definition",
    "layout_is_what_is_visible",
    "the_spec_is_the_mechanism",
    "density_counts_the_pairs",
)


def parametrize_with_checks(
    specs: Iterable[str | Mechanism | type[Mechanism]],
    laws: Iterable[str] | None = None,
    expensive: bool = False,
) -> Callable[[Any], Any]:
    """A pytest decorator: one test for each (mechanism, implementation, law that binds it).

    The test takes one argument, `check`, and calls `check()`, which raises AssertionError where the
    law is broken and skips where this machine lacks what it needs. Calls that the mechanism refuses
    in words, by the public call too, are none of its failures; one that refuses all is:

        @parametrize_with_checks(["windowed(window=5)", MyMechanism()])
        def test_conforms(check):
            check()
    """
    import pytest

    wanted = None if laws is None else list(laws)
    params = []
    for spec in specs:
        memo = Memo()
        for check in checks_for(spec, laws=wanted, expensive=expensive):
            params.append(pytest.param(_AsTest(check, memo), id=str(check)))
    return pytest.mark.parametrize("check", params)


class _AsTest:
    def __init__(self, check: Check, memo: Memo) -> None:
        self.check = check
        self.memo = memo

    def __call__(self) -> CheckResult:
        import pytest

        result = try_check(self.check, self.memo)
        if result.status == "failed":
            raise AssertionError(str(result))
        if result.status == "skipped":
            pytest.skip(result.reason)
        return result
