"""The conditions of a measurement: versions, commit, machine, and the inputs' origin."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("sparseattn", "torch", "numpy", "triton", "transformers")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide results, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # with the build, such as +cpu
    return found


def commit() -> str | None:
    """The commit of the checkout that this package runs from, `-dirty` with changes; or None."""
    here = Path(__file__).resolve().parents[1]
    try:
        # Only where this very file is tracked: a package installed somewhere within a stranger's
        # checkout has not that commit.
        _git(here, "ls-files", "--error-unmatch", "errors.py")
        name = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}-dirty" if changed else name


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def cpu() -> str:
    """The processor's name, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    name = line.split(":", 1)[1].strip()
                    break
    except OSError:  # not Linux
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def gpu(device: torch.device) -> str | None:
    """The GPU's name, where the measurement uses one."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_name(device)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def conditions(device: torch.device, command: str | None) -> dict[str, Any]:
    """What does not depend on the comparison's arguments."""
    return {
        "versions": versions(),
        "commit": commit(),
        "cpu": cpu(),
        "gpu": gpu(device),
        "threads": torch.get_num_threads(),
        "command": command if command is not None else _command(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _command() -> str:
    import shlex

    return shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])
