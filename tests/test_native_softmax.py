"""The C++ kernels of the softmax engine, for the CPU that runs the tests, and for others in part.

What an AVX-512 or a NEON CPU would run is built here with the same lanes, made of this CPU's own
vectors, and products of pairs put together from plain ones: everything but a few instructions.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparseattn
from sparseattn.engines.native import library

LONG = pytest.mark.long
TESTS = Path(__file__).parent
SCRIPT = TESTS / "native_softmax.py"
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
BUILDS = {
    "own": {},
    "avx2": {"SPARSEATTN_NATIVE_ISA": "avx2"},
    "16 lanes, pairs": {"CXX": f"{CXX} -DSPARSEATTN_LANES=16 -DSPARSEATTN_PAIRS"},
    "4 lanes": {"CXX": f"{CXX} -DSPARSEATTN_LANES=4"},
}
pytestmark = pytest.mark.skipif(
    bool(library.missing()), reason="no C++ kernels can be built on this machine"
)


def run(group: str, build: dict[str, str], path: Path | None = None) -> dict[str, object]:
    """What the script prints; `path` goes before all else on the module path."""
    if "SPARSEATTN_NATIVE_ISA" in build and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("this CPU has no AVX2")
    paths = [str(x) for x in (path, TESTS) if x is not None]
    env = {**os.environ, **build, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), group], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def broken(found: dict[str, object]) -> list[str]:
    """The verdicts over their budget, as `call, word: error, budget`."""
    return [
        f"{call}, {word}: {error}, {budget}"
        for call, verdicts in found.items()
        for word, error, budget in verdicts  # type: ignore[attr-defined]
        if not error <= budget
    ]


@pytest.mark.parametrize(
    "build", [pytest.param(x, marks=LONG if x in ("avx2", "4 lanes") else []) for x in BUILDS]
)
def test_the_definition(build: str) -> None:
    found = run("all", BUILDS[build])
    assert len(found) == 51
    assert broken(found) == []


@pytest.mark.parametrize("build", ["own", "16 lanes, pairs"])
def test_conduct(build: str) -> None:
    found = run("conduct", BUILDS[build])
    assert len(found) == 46
    assert [name for name, holds in found.items() if not holds] == []


PLANTS = {
    "the right edge is one key late": (
        "call.h",
        "int64_t stop = std::min<int64_t>(run.keys, run.high + last + 1);",
        "int64_t stop = std::min<int64_t>(run.keys, run.high + last);",
        {"out", "lse"},
    ),
    "an edge is taken for interior": (
        "call.h",
        "at < open || at + count > close",
        "at < open || at + count > close + 1",
        {"out", "lse"},
    ),
    "another head of the group": (
        "softmax_forward.h",
        "kv = head / call_.groups(), first",
        "kv = head % call_.kv_heads, first",
        {"out"},
    ),
    "sums are not scaled when the maximum moves": (
        "softmax_tile.h",
        "total *= shrink;",
        "total *= 1.0f;",
        {"out"},
    ),
    "no slope of the softcap": (
        "softmax_backward.h",
        "if (units_.before) s *= 1.0f - x * x;",
        "if (units_.before) s *= 1.0f;",
        {"dq", "dk"},
    ),
    "one piece of a run is left out": (
        "softmax_backward.h",
        "if (piece.run != run || j < piece.low || j >= piece.high) continue;",
        "if (piece.run != run || j < piece.low || j >= piece.high || piece.first > 0) continue;",
        {"dk", "dv"},
    ),
    "a row forgets a block": (
        "softmax_rows.h",
        "total += added;",
        "total = added;",
        {"out", "lse"},
    ),
}

SHORT = ("an edge is taken for interior", "one piece of a run is left out")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in SHORT else LONG) for x in PLANTS]
)
def test_a_planted_bug_is_seen(name: str, tmp_path: Path) -> None:
    where, sound, planted, words = PLANTS[name]
    copy = tmp_path / "sparseattn"
    sources = Path(sparseattn.__file__).parent
    shutil.copytree(sources, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "engines" / "native" / "source" / where
    text = path.read_text()
    assert text.count(sound) == 1
    path.write_text(text.replace(sound, planted))
    found = run("small", {}, tmp_path)
    assert {line.split(":")[0].split(", ")[-1] for line in broken(found)} >= words
