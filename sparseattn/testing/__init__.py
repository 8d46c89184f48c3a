"""The conformance checks: what every mechanism and implementation must satisfy, as laws."""

from __future__ import annotations

from .budgets import Budgets, Verdict, arithmetic, arithmetic_of_gradients
from .cases import Case
from .examples import default, examples, small
from .laws import LAWS, Law
from .runner import (
    Check,
    CheckResult,
    assert_mechanism,
    check_mechanism,
    checks_for,
    parametrize_with_checks,
    run_checks,
)

__all__ = [
    "LAWS",
    "Budgets",
    "Case",
    "Check",
    "CheckResult",
    "Law",
    "Verdict",
    "arithmetic",
    "arithmetic_of_gradients",
    "assert_mechanism",
    "check_mechanism",
    "checks_for",
    "default",
    "examples",
    "parametrize_with_checks",
    "run_checks",
    "small",
]
