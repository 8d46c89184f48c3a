"""The versions of Triton that tests use, each in processes of its own and never in this one.

They lie in folders beside the environment, one a version (`make test` installs them there), so
that torch's own compiler meets none of them. `SPARSEATTN_TRITON` names the folders, separated as in
`PATH`; without it, a triton that the environment has serves; with neither its tests are skipped.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import sparseattn

VARIABLE = "SPARSEATTN_TRITON"
TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"
NONE = "no triton is installed"


class Version(NamedTuple):
    """A version of Triton and its folder; no folder where the environment itself has it."""

    version: str
    path: Path | None


def _found(name: str, folder: Path | None) -> str | None:
    """The version of a package in a folder, or in the environment; None where it is not there."""
    paths = sys.path if folder is None else [str(folder)]
    found = importlib.metadata.distributions(name=name, path=paths)
    return next((one.version for one in found), None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in version.split(".")[:3] if x.isdigit())


def versions(named: str | None = None) -> list[Version]:
    """The versions to test with, the oldest first; empty where there is none.

    Args:
        named: folders, as in the variable; by default, what the variable says.

    Raises:
        FileNotFoundError: a folder without triton is named.
    """
    named = os.environ.get(VARIABLE) if named is None else named
    if not named:
        version = _found("triton", None)
        return [] if version is None else [Version(version, None)]
    made = []
    for folder in (Path(x) for x in named.split(os.pathsep)):
        version = _found("triton", folder)
        if version is None:
            raise FileNotFoundError(
                f"{VARIABLE} names {folder}, which holds no triton: run `make test`, or "
                f"pip install --no-deps --target {folder} triton"
            )
        made.append(Version(version, folder.resolve()))
    return sorted(made, key=lambda one: _numbers(one.version))


def newest() -> Version:
    """The newest version; skips the test that asks where there is none."""
    found = versions()
    if not found:
        pytest.skip(NONE)
    return found[-1]


def each() -> list[Any]:
    """Every version as a pytest parameter; one that is skipped where there is none."""
    made = [pytest.param(one, id=one.version) for one in versions()]
    return made or [pytest.param(None, id="none", marks=pytest.mark.skip(reason=NONE))]


def interpreters() -> list[Version]:
    """The versions whose interpreter runs beside the numpy that it would meet: 3.6 needs one before
    2.4, which may lie in its folder."""

    def fits(one: Version) -> bool:
        numpy = (one.path and _found("numpy", one.path)) or _found("numpy", None) or "0"
        return _numbers(one.version) >= (3, 7) or _numbers(numpy) < (2, 4)

    return [one for one in versions() if fits(one)]


def run_python(
    path: Path | None,
    code_or_file: str | Path,
    *args: str,
    interpret: bool = False,
    timeout: float = 300,
    check: bool = True,
    **variables: str,
) -> str:
    """Run Python in a new process that meets the triton of a folder; returns what it printed.

    Args:
        path: a version's folder, or None for the environment's own triton.
        code_or_file: source text, or the path of a file; it can import what stands in `tests` and
            `benchmarks`.
        args: its command line.
        interpret: run kernels in Triton's interpreter, on CPU tensors.
        timeout: in seconds.
        check: raise unless it ends with status 0.
        variables: more of its environment.

    Raises:
        AssertionError: it failed; with the end of what it printed.
        subprocess.TimeoutExpired: it took longer than `timeout`.
    """
    folders = [*([str(path)] if path else []), str(TESTS), str(BENCHMARKS)]
    start = ["-c", code_or_file] if isinstance(code_or_file, str) else [str(code_or_file)]
    with tempfile.TemporaryDirectory() as cache:  # what an earlier run compiled is not looked at
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(folders),
            "TRITON_CACHE_DIR": cache,
            "TRITON_INTERPRET": "1" if interpret else "0",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        done = subprocess.run(
            [sys.executable, *start, *args],
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    if check:
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def run_with_bug(
    folder: Path, module: str, sound: str, planted: str, script: Path, group: str, timeout: float
) -> str:
    """Run a script on the interpreter with a copy of the engines in which one line is another.

    Args:
        folder: an empty one. module: the file below `engines`, which has `sound` once.
    """
    copy = folder / "sparseattn"
    sources = Path(sparseattn.__file__).parent
    shutil.copytree(sources, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "engines" / module
    text = path.read_text()
    assert text.count(sound) == 1
    path.write_text(text.replace(sound, planted))
    version = newest()
    folders = [str(folder), str(TESTS), *([str(version.path)] if version.path else [])]
    found = os.pathsep.join(folders)
    return run_python(
        version.path, script, group, interpret=True, timeout=timeout, PYTHONPATH=found
    )
