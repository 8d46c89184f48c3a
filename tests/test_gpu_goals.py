"""The goals of a GPU run: what is met, what is short, and what is not judged without its rows."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from triton_versions import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))
import gpu_bench
import gpu_goals

WINDOW = "window 1024, N=65536, D=128, kv heads 32"


def row(name: str, **given: Any) -> dict[str, Any]:
    plain = {"call": name, "ms": 2.0, "peers_ms": {}, "binds": "arithmetic", "share": 0.5}
    return plain | given


def judged(*rows: dict[str, Any], **facts: Any) -> dict[tuple[str, str], tuple[str, bool]]:
    document = {"rows": list(rows), "facts": facts}
    return {(goal, asked): (found, met) for goal, asked, found, met in gpu_goals.goals(document)}


def test_shares_and_ratios() -> None:
    found = judged(row(WINDOW, share=0.55, peers_ms={"flex": 3.1, "sdpa, dense": 9.0}))
    assert found == {
        (WINDOW, ">= 55% of arithmetic"): ("55%", True),
        (WINDOW, ">= 1.6x flex"): ("1.55x", False),
    }


@pytest.mark.parametrize(("ms", "met"), [(0.55, True), (0.56, False)])
def test_blocks_are_laid_by_own_dense(ms: float, met: bool) -> None:
    blocks, dense = "128-blocks at 25%, N=16384, D=128", "dense, N=16384, D=128"
    found = judged(row(blocks, ms=ms, density=0.25), row(dense, ms=2.0))
    asked = "<= 1.1 x density x own dense"
    assert found == {(blocks, asked): (f"{ms / 0.5:.2f}", met)}


def test_facts() -> None:
    given = {
        "error over torch's, full": 1.3,
        "the same bits": True,
        "first call, cold, s": 2.0,
        "compilations over 50 lengths": 1,
        "host us of a small call": 300.0,
        "in a graph": gpu_goals.found(lambda: 1 / 0),
    }
    found = {goal: met for (goal, _), (_, met) in judged(**given).items()}
    assert found == {
        "error over torch's, full": False,
        "the same bits": True,
        "first call, cold, s": True,
        "compilations over 50 lengths": False,
        "in a graph": False,
    }


def test_every_goal_has_its_shape() -> None:
    """A goal whose shape is renamed would be silent."""
    shapes = {shape.name for shape in gpu_bench.shapes()}
    peers = {name: 1.0 for name in ("flex", "fla, features given")}
    rows = [row(name, peers_ms=peers, density=0.25) for name in shapes]
    assert len(judged(*rows)) == 16
