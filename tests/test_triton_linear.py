"""Kernelised mechanisms on Triton's interpreter, each group in its own process; bugs are seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_triton_selections import PATIENCE, broken
from triton_versions import TESTS, newest, run_python, run_with_bug

SCRIPT = TESTS / "triton_linear.py"
LONG = pytest.mark.long


@pytest.mark.parametrize(
    "group",
    [
        *("masked", "carried", "steps"),
        *(pytest.param(x, marks=LONG) for x in ("mechanisms", "halves", "carried_too")),
    ],
)
def test_outputs_and_gradients_are_the_definition(group: str) -> None:
    printed = run_python(newest().path, SCRIPT, group, interpret=True, timeout=PATIENCE)
    assert broken(printed) == []


def test_a_map_that_is_declared_wrong_is_seen(tmp_path: Path) -> None:
    """`x + 1.1` for `elu(x) + 1`: what is fused in the kernels is held to `feature_map`."""
    sound = "tl.exp(tl.minimum(x, 0.0)) + "
    planted = "tl.exp(tl.minimum(x, 0.1)) + "
    module = "linear/triton/features.py"
    printed = run_with_bug(tmp_path, module, sound, planted, SCRIPT, "small", PATIENCE)
    assert any("linear" in line and "out" in line for line in broken(printed))
