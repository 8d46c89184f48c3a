"""How the C++ kernels are built: the compiler, the flags, and the cache that holds the result."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("source")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-Wno-psabi")
_ISA = {"avx512": "-march=x86-64-v4", "avx2": "-march=x86-64-v3", "neon": "-march=armv8-a"}


class BuildError(Exception):
    """No library can be built or loaded on this machine; the message says why."""


def compiler() -> str | None:
    """The C++ compiler's path; None where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def flags() -> tuple[str, ...]:
    """What the compiler is told."""
    isa = os.environ.get("SPARSEATTN_NATIVE_ISA", "")
    if isa and isa not in _ISA:
        raise BuildError(f"SPARSEATTN_NATIVE_ISA={isa!r:.40}: expected one of {', '.join(_ISA)}")
    return (*_FLAGS, _ISA[isa] if isa else "-march=native")


def directory() -> Path:
    """Where built libraries are kept, which only this user may write."""
    given = os.environ.get("SPARSEATTN_NATIVE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(given) if given else Path(base) / "sparseattn"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = path.lstat()
    except OSError as error:
        raise BuildError(f"the cache directory {path} cannot be made: {error}") from error
    if held.st_uid != os.getuid() or held.st_mode & 0o022:
        raise BuildError(f"others can write to the cache directory {path}: chmod 700 it")
    return path


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    keep = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({x for x in lines if x.startswith(keep)}))


def built() -> Path:
    """The library, built now unless the cache has it."""
    program = compiler()
    if program is None:
        raise BuildError("no C++ compiler was found: install g++ or clang++, or set CXX")
    chosen = flags()
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    parts = [program, version, *chosen, _cpu()]
    for file in sorted(SOURCE.iterdir()):
        parts += [file.name, file.read_text()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    place = directory() / f"native-{name}.so"
    if place.exists():
        return place
    handle, made = tempfile.mkstemp(suffix=".so", dir=place.parent)
    os.close(handle)
    try:
        command = [program, *chosen, "-o", made, str(SOURCE / "native.cpp"), "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{program} failed: {done.stderr.strip()[:300]}")
        os.chmod(made, 0o500)
        os.replace(made, place)
    finally:
        if os.path.exists(made):
            os.unlink(made)
    return place
