"""Kernelised mechanisms on Triton's interpreter, each group in its own process; bugs are seen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from test_triton_selections import PATIENCE, SOURCES, broken
from triton_versions import TESTS, newest, run_python

SCRIPT = TESTS / "triton_linear.py"
LONG = pytest.mark.long


@pytest.mark.parametrize(
    "group", ["masked", *(pytest.param(x, marks=LONG) for x in ("mechanisms", "halves"))]
)
def test_outputs_and_gradients_are_the_definition(group: str) -> None:
    printed = run_python(newest().path, SCRIPT, group, interpret=True, timeout=PATIENCE)
    assert broken(printed) == []


def test_a_map_that_is_declared_wrong_is_seen(tmp_path: Path) -> None:
    """`x + 1.1` for `elu(x) + 1`: what is fused in the kernels is held to `feature_map`."""
    copy = tmp_path / "sparseattn"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "engines" / "linear" / "triton" / "features.py"
    text = path.read_text()
    sound = "tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))"
    assert text.count(sound) == 1
    path.write_text(text.replace(sound, sound.replace("x + 1.0", "x + 1.1")))
    version = newest()
    folders = [str(tmp_path), str(TESTS), *([str(version.path)] if version.path else [])]
    printed = run_python(
        *(version.path, SCRIPT, "small"),
        interpret=True,
        timeout=PATIENCE,
        PYTHONPATH=os.pathsep.join(folders),
    )
    assert any("linear" in line and "out" in line for line in broken(printed))
