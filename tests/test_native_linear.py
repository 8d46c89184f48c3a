"""The C++ kernels of the linear engine, for the CPU that runs the tests, and for others in part.

What an AVX-512 or a NEON CPU would run is built here with the same lanes, made of this CPU's own
vectors. Calls in `native_linear.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseattn as sa
from sparseattn.engines.linear import in_native
from sparseattn.engines.linear.maps import in_words
from sparseattn.engines.native import library

TESTS = Path(__file__).parent
SCRIPT = TESTS / "native_linear.py"
BUILDS = {
    "own": {},
    "16 lanes": {"SPARSEATTN_NATIVE_FLAGS": "-DSPARSEATTN_LANES=16"},
    "4 lanes": {"SPARSEATTN_NATIVE_FLAGS": "-DSPARSEATTN_LANES=4"},
}
pytestmark = pytest.mark.skipif(
    bool(library.missing()), reason="no C++ kernels can be built on this machine"
)
LONG = pytest.mark.long


def run(group: str, build: dict[str, str], path: Path | None = None) -> dict[str, object]:
    """What the script prints; `path` goes before all else on the module path."""
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
    "build", [pytest.param(x, marks=[] if x == "own" else LONG) for x in BUILDS]
)
@pytest.mark.parametrize("group", ["wide", "half", "few"])
def test_the_definition(group: str, build: str) -> None:
    found = run(group, BUILDS[build])
    assert len(found) > 10
    assert broken(found) == []


@pytest.mark.parametrize(
    "build", [pytest.param(x, marks=[] if x == "own" else LONG) for x in BUILDS]
)
def test_conduct(build: str) -> None:
    found = run("conduct", BUILDS[build])
    assert len(found) == 73
    assert [name for name, holds in found.items() if not holds] == []


PLANTS = {
    "a chunk's sum is not carried on": (
        "linear_chunk.h",
        "put(room + i, V(pick(met + i) * by + pick(own + i)));",
        "put(room + i, V(pick(met + i) * by));",
        {"out", "dq", "dk", "dv"},
    ),
    "a span does not decay": (
        "linear_sweep.h",
        "to[i] = (to[i] * over + double(from[i])) * beyond;",
        "to[i] = (to[i] + double(from[i])) * beyond;",
        {"out", "dq", "dk", "dv"},
    ),
    "the next key is seen": (
        "linear_chunk.h",
        "if (order == late) std::fill(row, row + i, Real(0));",
        "if (order == late) std::fill(row, row + std::max<int64_t>(0, i - 1), Real(0));",
        {"out", "dq"},
    ),
    "no slope of elu": (
        "linear_maps.h",
        "put(dphi + i, V(one > Real(1) ? grad : V(grad * one)));",
        "put(dphi + i, grad);",
        {"dq", "dk"},
    ),
    "the length of a key is not differentiated": (
        "linear_maps.h",
        "if (!side.most)\n            for",
        "if (false)\n            for",
        {"dk"},
    ),
    "keys in holes add to the state": (
        "linear_chunk.h",
        "return i >= count || (holes && !holes[i]); }, count == CHUNK && !holes",
        "return i >= count; }, count == CHUNK && !holes",
        {"out", "dq"},
    ),
    "the mean is not taken off": (
        "linear_backward.h",
        "put(at, V((pick(at) - mean * total[g]) / sum));",
        "put(at, V(pick(at) / sum));",
        {"dq"},
    ),
    "the sum of the weights is not differentiated": (
        "linear_backward.h",
        "part_dphi_[g * CHUNK + i] += state[ff * e + g];",
        "part_dphi_[g * CHUNK + i] += 0;",
        {"dk"},
    ),
}
SHORT = ("a span does not decay",)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in SHORT else LONG) for x in PLANTS]
)
def test_a_planted_bug_is_seen(name: str, tmp_path: Path) -> None:
    where, sound, planted, words = PLANTS[name]
    copy = tmp_path / "sparseattn"
    sources = Path(sa.__file__).parent
    shutil.copytree(sources, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "engines" / "native" / "source" / where
    text = path.read_text()
    assert text.count(sound) == 1
    path.write_text(text.replace(sound, planted))
    found = run("small", {}, tmp_path)
    assert {line.split(":")[0].split(", ")[-1] for line in broken(found)} >= words


def test_the_block_is_as_long_as_the_kernels_read() -> None:
    entry = library.load().cdll.sparseattn_linear_size
    assert entry() == in_native._BLOCK.size


class Bent(sa.KernelizedLinear):
    """A map that it does not declare."""

    name = "bent"

    def feature_map(self, x: torch.Tensor, positions: torch.Tensor, call: sa.AttentionCall):  # type: ignore[no-untyped-def]
        return x.square() + 1


def test_what_it_does_not_serve_is_said() -> None:
    q = torch.randn(1, 2, 9, 8)
    for x, mechanism, word in (
        (q, Bent(), "no implementation"),
        (q, sa.mechanism("taylor"), "no implementation"),
        (q.half(), sa.mechanism("linear"), "float16"),
        (torch.randn(1, 1, 2, 300), sa.mechanism("linear"), "300"),
    ):
        with pytest.raises(sa.SparseAttnError, match=word):
            sa.attention(x, x, x, mechanism, causal=True, impl="native")
        sa.attention(x, x, x, mechanism, causal=True)  # torch serves
    assert in_words(Bent(), sa.AttentionCall.make(q, q, q)) is None
