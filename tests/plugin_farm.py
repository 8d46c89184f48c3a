"""Real distributions on a path, written by hand: a package, its metadata and its entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

# What every plugin's module begins with.
PRELUDE = """\
from dataclasses import dataclass
import sparseattn as sa

def make(name_, **body):
    body = {"name": name_, "visible": lambda self, i, j: i - j < 3, "__module__": __name__, **body}
    return dataclass(frozen=True)(type(name_.title(), (sa.MaskedSoftmax,), body))
"""


def install(
    where: Path, name: str, source: str, value: str | None = None, metadata: bool = True
) -> None:
    """A distribution `name-dist` 1.2 with one module and one entry point, both called `name`."""
    module = f"farm_{name}"
    (where / f"{module}.py").write_text(PRELUDE + textwrap.dedent(source))
    info = where / f"{name}_dist-1.2.dist-info"
    info.mkdir()
    if metadata:
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.2\n")
    points = f"[sparseattn]\n{name} = {value or f'{module}:Plugin'}\n"
    (info / "entry_points.txt").write_text(points)


def python(
    where: Path, code: str, *, limit: float = 300, **env: str
) -> subprocess.CompletedProcess:
    """Run code in a new interpreter that finds the distributions in `where`."""
    path = os.pathsep.join([str(where), *filter(None, [os.environ.get("PYTHONPATH")])])
    clean = {k: v for k, v in os.environ.items() if k != "SPARSEATTN_PLUGINS"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=where,
        env={**clean, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=limit,
    )


def answers(where: Path, code: str, **env: str) -> Any:
    """What the code printed, which must be one JSON document and nothing else."""
    done = python(where, code, **env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)
