"""Every law of the conformance checks is able to fail: planted bugs, each named by its law."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import planted_arguments
import planted_conduct
import planted_derivatives
import planted_implementations
import planted_mechanisms
import pytest
import torch
from planted_implementations import PLANTED, Everything, Near, Planted, right
from torch import Tensor

import sparseattn as sa
from sparseattn.testing import (
    LAWS,
    CheckResult,
    assert_mechanism,
    check_mechanism,
    checks_for,
    parametrize_with_checks,
    run_checks,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small calls are slower on many threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Importing them plants their bugs.
assert planted_arguments and planted_conduct and planted_derivatives
assert planted_implementations and planted_mechanisms


CRASHES = [
    m
    for name, _, m in PLANTED
    if name
    in (
        "fails_on_long_rows",
        "empty_sizes_crash",
        "reads_values_on_the_host",
        "ends_the_process",
        "reference_reads_the_host",
    )
]


@pytest.mark.parametrize(
    ("law", "mechanism"), [(law, m) for _, law, m in PLANTED], ids=[name for name, _, _ in PLANTED]
)
def test_a_planted_bug_is_caught_by_its_law(law: str, mechanism: sa.Mechanism) -> None:
    impl = "planted" if isinstance(mechanism, Everything) else None
    results = check_mechanism(mechanism, impl, laws=[law], expensive=True)
    failed = [r for r in results if r.status == "failed"]
    assert failed, [str(r) for r in results]
    assert all(r.law == law and r.reason for r in failed)
    # Caught for what it does wrong, not because the bug itself is badly written.
    assert mechanism in CRASHES or not any(r.reason.startswith("it raised") for r in failed), failed
    assert LAWS[law].statement in str(failed[0])


MALFORMED = "malformed_calls_are_refused_in_words"


Made = Callable[..., sa.AttentionCall]


def _lenient(make: Made, word: str, mend: Callable[[Any], Any]) -> Made:
    """A request maker that mends an argument in silence instead of refusing it."""

    def lenient(q: Any, k: Any, v: Any, **kw: Any) -> sa.AttentionCall:
        given = {"q": q, "k": k, "v": v} | kw
        if given.get(word) is not None:
            given[word] = mend(given[word])
        return make(given.pop("q"), given.pop("k"), given.pop("v"), **given)

    return lenient


def _runs_named_anew(ids: Tensor) -> Tensor:
    return torch.nn.functional.pad((ids.diff(dim=1) != 0).cumsum(1), (1, 0))


MENDED = {
    "k_cast_to_float32": ("k", lambda k: k.to(torch.float32)),
    "mask_of_numbers": ("key_mask", lambda mask: mask.bool()),
    "mask_broadcast": ("key_mask", lambda mask: mask.expand(2, -1)),
    "segments_of_numbers": ("q_segments", lambda ids: ids.to(torch.int64)),
    "segments_in_two_runs": ("kv_segments", _runs_named_anew),
    "offset_rounded": ("q_offset", lambda x: x if isinstance(x, Tensor) else int(x)),
    "scale_of_nan_is_none": ("scale", lambda x: x if x == x else 1.0),
    "softcap_made_positive": ("softcap", lambda x: abs(x) or 1.0),
    "sink_of_ints": ("sink_logits", lambda x: x.to(torch.float32)),
    "bias_of_two_axes": ("bias", lambda x: x[None, None] if x.ndim == 2 else x),
    "bias_of_truths": ("bias", lambda x: x.to(torch.float32)),
    "causal_of_anything": ("causal", bool),
}


def _check_with(make: Made, monkeypatch: pytest.MonkeyPatch) -> CheckResult:
    monkeypatch.setattr(sa.AttentionCall, "make", staticmethod(make))
    (result,) = check_mechanism("windowed(window=3)", "reference", laws=[MALFORMED])
    assert result.status == "failed" and LAWS[MALFORMED].statement in str(result), result
    return result


@pytest.mark.parametrize("name", MENDED)
def test_a_malformed_argument_that_is_mended_in_silence_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = _check_with(_lenient(sa.AttentionCall.make, *MENDED[name]), monkeypatch)
    assert "was accepted" in result.reason or "instead of InvalidInputError" in result.reason


class _NoValueError(sa.SparseAttnError):
    pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (_NoValueError("q"), "raised _NoValueError instead of InvalidInputError"),
        (RuntimeError("q k v"), "raised RuntimeError instead of InvalidInputError"),
        (sa.InvalidInputError("bad input"), "the error does not name q: bad input"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_malformed_call_that_is_refused_wrongly_is_caught(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = sa.AttentionCall.make

    def wrong(*args: Any, **kw: Any) -> sa.AttentionCall:
        try:
            return make(*args, **kw)
        except sa.InvalidInputError:
            raise error from None

    assert reason in _check_with(wrong, monkeypatch).reason


def test_every_law_is_caught_at_least_once() -> None:
    assert {law for _, law, _ in PLANTED} | {MALFORMED} == set(LAWS)


def test_every_law_says_in_its_docstring_whom_it_binds() -> None:
    undocumented = [law.name for law in LAWS.values() if "Binds" not in (law.check.__doc__ or "")]
    assert undocumented == []


def test_a_planted_bug_turns_the_whole_check_red() -> None:
    found = {
        r.law
        for r in check_mechanism(Everything(planted=Planted(_leaky)), "planted")
        if r.status == "failed"
    }
    assert "the_future_changes_nothing" in found
    assert "forward_is_the_definition" in found


def _leaky(
    m: sa.Mechanism, q: Tensor, k: Tensor, v: Tensor, call: sa.AttentionCall
) -> tuple[Tensor, Tensor | None]:
    return right(m, q, k, v, call.replace(q_offset=call.offset + 1))


RIGHT = [
    Everything(planted=Planted(right)),
    Near(planted=Planted(right)),
    planted_mechanisms.Blocks(),
]


@pytest.mark.parametrize("mechanism", RIGHT, ids=lambda m: m.name)
def test_what_the_bugs_are_planted_in_is_green(mechanism: sa.Mechanism) -> None:
    impl = "planted" if isinstance(mechanism, Everything) else None
    results = check_mechanism(mechanism, impl)
    assert [str(r) for r in results if r.status == "failed"] == []
    assert {r.status for r in results} <= {"passed", "refused"}


def test_the_smallest_failing_case_is_shown() -> None:
    def wrong_from_17(m, q, k, v, call):
        out, lse = right(m, q, k, v, call)
        return out * (2 if call.n >= 17 else 1), lse

    mechanism = Everything(planted=Planted(wrong_from_17))
    (result,) = check_mechanism(mechanism, "planted", laws=["forward_is_the_definition"])
    assert result.status == "failed"
    assert result.case.startswith("q [2, 2, 17, 4], k [2, 2, 17, 4], v [2, 2, 17, 4], float32")
    assert "seed=16" in result.case
    assert "error" in result.reason and "budget" in result.reason
    with pytest.raises(AssertionError, match="forward_is_the_definition") as caught:
        assert_mechanism(mechanism, "planted", laws=["forward_is_the_definition"])
    assert result.case in str(caught.value)


def test_a_refusal_is_no_failure_and_no_pass() -> None:
    @dataclass(frozen=True)
    class NoMasks(Near):
        name = "planted_without_masks"

        def supports(self, call: sa.AttentionCall) -> list[str]:
            return ["no key_mask"] if call.key_mask is not None else []

    mechanism = NoMasks(planted=Planted(right))
    laws = ["padding_is_invisible", "forward_is_the_definition", "vmap_is_the_batch"]
    results = {r.law: r for r in check_mechanism(mechanism, "planted", laws=laws)}
    assert results["padding_is_invisible"].status == "refused"
    assert "no key_mask" in results["padding_is_invisible"].reason
    assert results["forward_is_the_definition"].status == "passed"
    assert "refused" in results["forward_is_the_definition"].reason


def test_an_implementation_of_one_dtype_is_still_bound() -> None:
    class Wide(Planted):
        def supports(self, mechanism: sa.Mechanism, call: sa.AttentionCall) -> list[str]:
            return [] if call.dtype == torch.float64 else ["float64 only"]

    def batch_mixed(m, q, k, v, call):
        out, lse = right(m, q, k, v, call)
        return out + 1e-9 * out.mean(0, keepdim=True), lse

    law = ["batches_are_independent"]
    (bad,) = check_mechanism(Everything(planted=Wide(batch_mixed)), "planted", laws=law)
    (good,) = check_mechanism(Everything(planted=Wide(right)), "planted", laws=law)
    assert (bad.status, good.status) == ("failed", "passed")
    assert "float64" in bad.case


def test_settings_are_restored() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    check_mechanism("full", "torch", laws=["forward_is_the_definition"])
    check_mechanism(PLANTED[0][2], laws=[PLANTED[0][1]])
    assert torch.are_deterministic_algorithms_enabled() == before


def test_names_are_checked() -> None:
    with pytest.raises(sa.InvalidInputError, match="forward_is_the_definition"):
        check_mechanism("full", laws=["forward_is_the_defnition"])
    with pytest.raises(sa.InvalidInputError, match="torch"):
        check_mechanism("full", impl="torhc")
    with pytest.raises(sa.InvalidInputError, match="torhc"):
        run_checks(["full"], impl="torhc")
    with pytest.raises(sa.UnknownMechanismError):
        run_checks(["fulll"])


def test_every_implementation_is_checked() -> None:
    checks = checks_for("windowed(window=5)")
    assert {c.implementation for c in checks} >= {"definition", "torch", "reference"}
    ids = [str(c) for c in checks]
    assert len(set(ids)) == len(ids)


def test_results_come_as_they_are_found() -> None:
    seen: list[str] = []
    laws = ["the_output_is_fresh", "vmap_is_the_batch"]
    results = run_checks(
        ["full", "windowed(window=3)"], progress=lambda r: seen.append(r.law), laws=laws
    )
    # Two laws of two mechanisms, for each implementation there is, and the definition once.
    implementations = {r.implementation for r in results}
    assert len(seen) == len(results) == 4 * len(implementations)
    assert {r.mechanism for r in results} == {"full", "windowed(window=3, sinks=0)"}


@parametrize_with_checks(
    ["windowed(window=3)"], laws=["the_output_is_fresh", "softmax_rows_sum_to_one"]
)
def test_the_decorator_makes_one_test_a_check(check) -> None:
    assert check().status == "passed"
