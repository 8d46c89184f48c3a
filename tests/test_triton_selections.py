"""Selections on Triton's interpreter, each group in a process of its own; planted bugs are seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from triton_versions import TESTS, newest, run_python, run_with_bug

SCRIPT = TESTS / "triton_selections.py"
# No group takes three minutes; a machine that is busy elsewhere is given six times as long.
PATIENCE = 1000
KERNELS, LISTS = "triton/selected.py", "selected_in_triton.py"


def broken(printed: str) -> list[str]:
    """What of a group of verdicts is over its budget."""
    found = json.loads(printed.splitlines()[-1])
    assert found
    return [
        f"{name}, {word}: error {error:.3g}, budget {budget:.3g}"
        for name, verdicts in found.items()
        for word, error, budget in verdicts
        if not error <= budget
    ]


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "group", ["small", *(pytest.param(x, marks=LONG) for x in ("budgets", "tables"))]
)
def test_outputs_and_gradients_are_the_definition(group: str) -> None:
    printed = run_python(newest().path, SCRIPT, group, interpret=True, timeout=PATIENCE)
    assert broken(printed) == []


@LONG
def test_conduct() -> None:
    printed = run_python(newest().path, SCRIPT, "conduct", interpret=True, timeout=PATIENCE)
    found = json.loads(printed.splitlines()[-1])
    assert len(found) == 14
    assert [name for name, holds in found.items() if not holds] == []


PLANTS = {
    "a repeat counts twice in a list": (
        LISTS,
        "once[:, 1:] &= codes[:, 1:] != codes[:, :-1]  # a set: a repeat counts once",
        "",
        {"out", "lse"},
    ),
    "a repeat counts twice in a transposed list": (
        LISTS,
        "once = codes < self.nothing\n        once[:, 1:] &= codes[:, 1:] != codes[:, :-1]",
        "once = codes < self.nothing",
        {"dk", "dv"},
    ),
    "the causal edge is one key late": (
        LISTS,
        "run.offset + 1 + np.arange(run.n)",
        "run.offset + 2 + np.arange(run.n)",
        {"out", "lse"},
    ),
    "another head's choice": (
        KERNELS,
        "chosen = ((bits[None, :] >> row[:, None]) & 1) != 0",
        "chosen = ((bits[None, :] >> (row[:, None] ^ 1)) & 1) != 0",
        {"out", "lse"},
    ),
    "a list lacks its last query": (
        KERNELS,
        "stop = tl.load(STARTS + own + 1)",
        "stop = tl.load(STARTS + own + 1) - 1",
        {"dk", "dv"},
    ),
    "delta without the slope of lse": (
        KERNELS,
        "delta -= tl.load(GRAD_LSE + lse_at, mask=real, other=0.0).to(NUMBER)",
        "delta -= 0.0",
        {"dq", "dk"},
    ),
}


SHORT = ("the causal edge is one key late",)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in SHORT else LONG) for x in PLANTS]
)
def test_a_planted_bug_is_seen(name: str, tmp_path: Path) -> None:
    where, sound, planted, words = PLANTS[name]
    module = f"softmax/{where}"
    printed = run_with_bug(tmp_path, module, sound, planted, SCRIPT, "small", PATIENCE)
    assert {line.split(":")[0].split(", ")[1] for line in broken(printed)} >= words
