"""Static patterns on Triton's interpreter, each group in its own process; planted bugs are seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_triton_selections import PATIENCE, broken
from triton_versions import TESTS, newest, run_python, run_with_bug

SCRIPT = TESTS / "triton_softmax.py"


LONG = pytest.mark.long


@pytest.mark.parametrize("group", ["bands", "lists", "few"])
def test_outputs_and_gradients_are_the_definition(group: str) -> None:
    printed = run_python(newest().path, SCRIPT, group, interpret=True, timeout=PATIENCE)
    assert broken(printed) == []


def test_conduct() -> None:
    printed = run_python(newest().path, SCRIPT, "conduct", interpret=True, timeout=PATIENCE)
    found = json.loads(printed.splitlines()[-1])
    assert len(found) == 21
    assert [name for name, holds in found.items() if not holds] == []


PLANTS = {
    "the right edge is one key late": (
        "plan.py",
        "high = far if found[1] is None else min(max(run.offset + found[1], -far), far)",
        "high = far if found[1] is None else min(max(run.offset + found[1] + 1, -far), far)",
        {"out", "lse"},
    ),
    "the interior starts a block early": (
        "triton/weights.py",
        "inner = tl.maximum((tl.maximum(low + last, 0) + SIZE - 1) // SIZE * SIZE, begin)",
        "inner = tl.maximum(tl.maximum(low + last, 0) // SIZE * SIZE, begin)",
        {"out", "lse"},
    ),
    "another head of the group": (
        "triton/forward.py",
        "kv_head = (tl.program_id(1) * PACK // groups).to(tl.int64)",
        "kv_head = (tl.program_id(1) * PACK % (groups // PACK)).to(tl.int64)",
        {"out"},
    ),
    "delta without the slope of lse": (
        "triton/backward.py",
        "delta -= tl.load(GRAD_LSE + lse_at, mask=real, other=0.0).to(NUMBER)",
        "delta -= 0.0",
        {"dq", "dk"},
    ),
    "one head of a group is left out": (
        "triton/backward.py",
        "for group in range(0, groups):",
        "for group in range(0, tl.maximum(groups - 1, 1)):",
        {"dk", "dv"},
    ),
    "a list lacks its last entry": (
        "plan.py",
        "(found.indptr[:-1], found.partial, found.indptr[1:])",
        "(found.indptr[:-1], found.partial, found.indptr[1:] - 1)",
        {"out"},
    ),
    "parts are merged as if alike": (
        "triton/decode.py",
        "weight = tl.exp2((lse - anchor) * LOG2E)",
        "weight = tl.where(there, 1.0, 0.0).to(NUMBER)",
        {"out"},
    ),
}


SHORT = ("the right edge is one key late", "one head of a group is left out")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in SHORT else LONG) for x in PLANTS]
)
def test_a_planted_bug_is_seen(name: str, tmp_path: Path) -> None:
    where, sound, planted, words = PLANTS[name]
    module = f"softmax/{where}"
    printed = run_with_bug(tmp_path, module, sound, planted, SCRIPT, "small", PATIENCE)
    assert {line.split(":")[0].split(", ")[1] for line in broken(printed)} >= words
