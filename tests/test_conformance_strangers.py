"""The checks of what a stranger wrote: a class, an instance or a spec, however it misbehaves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from planted_arguments import Refusing
from planted_implementations import Everything, Near, Planted, right
from planted_mechanisms import LayoutOffByOne, LayoutWrongFarAway
from torch import Tensor

import sparseattn as sa
from sparseattn.testing import (
    LAWS,
    assert_mechanism,
    check_mechanism,
    checks_for,
    examples,
    parametrize_with_checks,
    run_checks,
)


@dataclass(frozen=True)
class Stranger(sa.MaskedSoftmax):
    """A window, as its author wrote it."""

    name = "stranger"
    window: int = 100

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() < self.window


QUICK = ["forward_is_the_definition", "the_spec_is_the_mechanism", "layout_is_what_is_visible"]


def test_a_class_an_instance_and_a_spec_are_checked() -> None:
    for given in (Stranger, Stranger(5), "windowed(window=3)", sa.mechanism("chunked", chunk=3)):
        results = check_mechanism(given, laws=QUICK)
        assert {r.status for r in results} == {"passed"}, [str(r) for r in results]
        assert {r.implementation for r in results} >= {"definition", "torch", "reference"}
    # Cases of 65 tokens would see nothing of a window of 100.
    assert check_mechanism(Stranger, laws=QUICK)[0].mechanism == "stranger(window=4)"
    assert_mechanism(Stranger, laws=QUICK)


def test_a_class_without_a_guess_for_an_option_says_so() -> None:
    @dataclass(frozen=True)
    class Needy(sa.MaskedSoftmax):
        name = "needy"
        path: str

        def visible(self, i: Tensor, j: Tensor) -> Tensor:
            return i >= j

    with pytest.raises(sa.UnknownOptionError, match="path"):
        check_mechanism(Needy)


@dataclass(frozen=True)
class Hostile(Stranger):
    name = "hostile"

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        raise SystemExit("good night")


@dataclass(frozen=True)
class HostileSupport(Stranger):
    name = "hostile_support"

    def supports(self, call: sa.AttentionCall) -> list[str]:
        raise KeyError("nothing here")


@dataclass(frozen=True)
class HostileOptions(Stranger):
    name = "hostile_options"

    @property
    def honours(self) -> frozenset[str]:  # type: ignore[override]
        raise SystemExit(1)


@pytest.mark.parametrize("hostile", [Hostile, HostileSupport, HostileOptions])
def test_one_who_raises_ends_no_check(hostile: type[sa.Mechanism]) -> None:
    laws = [*QUICK, "serves_the_basic_call", "bias_may_be_broadcast"]
    failed = [r for r in check_mechanism(hostile, laws=laws) if r.status == "failed"]
    assert any("SystemExit" in r.reason or "KeyError" in r.reason for r in failed)
    with pytest.raises(AssertionError, match="bias_may_be_broadcast"):
        assert_mechanism(hostile, laws=["bias_may_be_broadcast"])


def test_an_interrupt_is_no_result() -> None:
    def interrupted(m, q, k, v, call):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_mechanism(Everything(planted=Planted(interrupted)), "planted", laws=QUICK)


def test_what_is_printed_stays_out_of_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    def loud(m, q, k, v, call):
        print("hello from a plugin")
        return right(m, q, k, v, call)

    laws = ["forward_is_the_definition", "global_state_is_left_alone"]
    results = check_mechanism(Everything(planted=Planted(loud)), "planted", laws=laws)
    assert {r.law: r.status for r in results} == {laws[0]: "passed", laws[1]: "failed"}
    assert "hello from a plugin" in results[1].reason
    out, err = capfd.readouterr()
    assert out == "" and "hello from a plugin" in err


def test_the_smallest_pair_of_a_wrong_layout_is_shown() -> None:
    law = ["layout_is_what_is_visible"]
    (near,) = check_mechanism(LayoutOffByOne(window=4), laws=law)
    # The band reaches 4 back, visible() 3: the first to see the difference is a lone query.
    assert near.reason.startswith("n=1, m=5, causal, i=4, j=0"), near.reason
    assert "visible() says False, the layout says True; 1 pairs differ" in near.reason
    (far,) = check_mechanism(LayoutWrongFarAway(window=4), laws=law)
    assert far.reason.startswith("n=1, m=601, causal, i=600, j=0"), far.reason


def test_laws_that_do_not_bind_make_no_check() -> None:
    bound = {name: {c.law.name for c in checks_for(name)} for name in ("full", "retention")}
    assert "lse_is_refused_where_there_is_none" in bound["retention"] - bound["full"]
    assert "softmax_rows_sum_to_one" in bound["full"] - bound["retention"]
    mechanisms = [examples(record.name)[0] for record in sa.list_mechanisms()]
    checks = [check for mechanism in mechanisms for check in checks_for(mechanism, expensive=True)]
    assert not any(check.law.binds(check.mechanism) for check in checks)
    assert {check.law.name for check in checks} == set(LAWS)


def test_the_law_of_compilation_tries_the_reference_too() -> None:
    for name in ("performer", "full", "topk_blocks"):
        checks = checks_for(name, laws=["compiling_changes_nothing"], expensive=True)
        assert {c.implementation for c in checks} >= {"torch", "reference"}


class ElsewhereOnly(Planted):
    """An implementation for CUDA devices."""

    def supports(self, mechanism: sa.Mechanism, call: sa.AttentionCall) -> list[str]:
        return [] if call.device.type == "cuda" else ["it needs a CUDA device"]


@pytest.mark.parametrize(
    ("planted", "status"), [(Refusing, "failed"), (ElsewhereOnly, "skipped"), (Planted, "passed")]
)
def test_who_serves_nothing_is_red_and_who_lacks_a_device_is_skipped(
    planted: type[Planted], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    law = ["every_implementation_serves"]
    (result,) = check_mechanism(Near(planted=planted(right)), "planted", laws=law)
    assert result.status == status, str(result)
    if status == "skipped":
        assert "CUDA" in result.reason


def test_a_refusal_that_the_public_call_does_not_make_is_red() -> None:
    class Wavering(Planted):
        asked = 0

        def supports(self, mechanism: sa.Mechanism, call: sa.AttentionCall) -> list[str]:
            Wavering.asked += 1
            return ["not this time"] if Wavering.asked == 1 else []

    mechanism = Everything(planted=Wavering(right))
    (result,) = check_mechanism(mechanism, "planted", laws=["forward_is_the_definition"])
    assert result.status == "failed"
    assert result.reason == "a call is served although it is refused: not this time"


@dataclass(frozen=True)
class NoBias(Stranger):
    name = "no_bias"

    def supports(self, call: sa.AttentionCall) -> list[str]:
        return ["it takes no bias"] if call.bias is not None else []


@parametrize_with_checks([NoBias, "windowed(window=3)"], laws=["bias_may_be_broadcast"])
def test_what_is_refused_in_words_is_no_skip(check) -> None:
    result = check()
    # The native kernels take no bias of any mechanism.
    refuses = "no_bias" in result.mechanism or result.implementation == "native"
    assert result.status == ("refused" if refuses else "passed")


def test_threads_are_as_they_were() -> None:
    before = torch.get_num_threads()
    run_checks(["full"], laws=["the_output_is_fresh"])
    assert torch.get_num_threads() == before
