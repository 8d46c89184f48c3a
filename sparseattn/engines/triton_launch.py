"""The door to Triton: whether it serves a device, for which target, and how a kernel is launched.

Nothing here imports triton before a kernel is launched, so that a machine without it, or without a
GPU, pays nothing. Kernels stand in the engines' `triton` folders; everything that launches one goes
through `launch`, so that the same launchers also serve machines without a GPU: under Triton's
interpreter, and in a `recording`, which takes down what would have been launched on a target.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch

LEAST_VERSION = (3, 6)
_LEAST_CAPABILITY = 80
MOST_WIDTH = 256  # of a head, for keys and for values
MOST_TOKENS = 2**29  # sums of positions stay within int32


class Target(NamedTuple):
    """What kernels are compiled for: `cuda` with a capability such as 90, `hip` with a name such as
    gfx942, or `interpreter`."""

    backend: str
    arch: int | str


class Launch(NamedTuple):
    """One launch as a `recording` saw it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_recording: tuple[Target, Callable[[Launch], None]] | None = None


def interpreting() -> bool:
    """Whether Triton's interpreter runs kernels, on CPU tensors: `TRITON_INTERPRET=1`, to be set
    before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@lru_cache(maxsize=1)
def _lacking() -> str | None:
    """Why no kernel can be compiled on this machine, whatever the device; None where one can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'sparseattn[triton]'"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None  # a build of the user's own
    found = tuple(int(x) for x in version.split(".")[:2] if x.isdigit())
    if found < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        return f"triton is {version}, and {least} or newer is needed: pip install -U triton"
    return None


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> Target:
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return Target("hip", name.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", 10 * major + minor)


def target(device: torch.device) -> Target:
    """What kernels on a device are compiled for."""
    if _recording is not None:
        return _recording[0]
    return Target("interpreter", 0) if device.type == "cpu" else _capability(device)


def missing() -> list[str]:
    """What this machine lacks for any call; empty where it can run kernels."""
    if not interpreting() and not torch.cuda.is_available():
        return ["its kernels run on a GPU, and this machine has none"]
    lacking = _lacking()
    return [] if lacking is None else [lacking]


def reasons_against(device: torch.device) -> list[str]:
    """Why Triton does not serve a device; empty where it does."""
    if _recording is not None:
        return []
    if device.type == "cpu" and not interpreting():
        return ["its kernels run on a GPU, and this call is on the CPU (or set TRITON_INTERPRET=1)"]
    if device.type not in ("cpu", "cuda"):
        return [f"its kernels run on NVIDIA and AMD GPUs, and this call is on {device.type}"]
    if device.type == "cuda" and interpreting():
        return ["TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors only"]
    lacking = _lacking()
    if lacking is not None:
        return [lacking]
    if device.type == "cuda":
        backend, arch = _capability(device)
        if backend == "cuda" and int(arch) < _LEAST_CAPABILITY:
            return [f"it needs compute capability 8.0 or newer, and this GPU has {int(arch) / 10}"]
    return []


@contextlib.contextmanager
def recording(on: Target, heard: Callable[[Launch], None]) -> Iterator[None]:
    """Within it, launchers choose what they would on the target, and `heard` takes each launch
    down instead of running it: results hold no numbers. For one thread."""
    global _recording
    before, _recording = _recording, (on, heard)
    try:
        yield
    finally:
        _recording = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument, on its current stream; nothing for no
    program.

    Args:
        kernel: a `triton.jit` function. grid: programs along each axis.
        args, options: its arguments by position, and constants and launch options by name.
    """
    if 0 in grid:
        return
    if _recording is not None:
        _recording[1](Launch(kernel, grid, args, options))
        return
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def padded(width: int) -> int:
    """The width of a tile that holds rows of `width`: a power of two from 16 on."""
    return max(16, 1 << (width - 1).bit_length())


@lru_cache(maxsize=1024)
def halves(value: float) -> tuple[float, float]:
    """A float64 number as a sum of two that float32 holds to 48 bits: Triton passes no float64."""
    first = float(torch.tensor(value, dtype=torch.float32))
    if first in (float("inf"), -float("inf")) or first != first:
        return first, 0.0
    return first, value - first
