"""How the C++ kernels are built: the compiler, the flags, and the name of the result.

Every flag leaves the values alone that the source asks for: no `-ffast-math`.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import BuildError, cache, cpu

SOURCE = Path(__file__).with_name("source")
_FLAGS = (
    *("-std=c++17", "-fPIC", "-pthread", "-Wno-psabi"),
    # Nobody reads errno, and a product and a sum are one rounding wherever the CPU has it so.
    *("-fno-math-errno", "-ffp-contract=fast"),
)
# Else what is static in a template is one for all libraries of a process, and none can be closed.
_GCC_FLAGS = ("-fno-gnu-unique",)
_FAST = ("-O3",)
_SANITIZED = (
    *("-O1", "-g", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
_COMPILERS = ("c++", "g++", "clang++")
_LIMIT = 600.0  # seconds that compiling may take


class Recipe(NamedTuple):
    """All that decides what is built."""

    compiler: tuple[str, ...]  # the program's path, and words that $CXX has behind it
    version: str  # the first line of what it says of itself
    flags: tuple[str, ...]
    source: Path  # the folder of its .cpp and .h files
    name: str  # of the entry in the cache


def sanitizing() -> bool:
    """Whether the kernels are built with sanitizers: `SPARSEATTN_NATIVE_SANITIZE=1`."""
    return os.environ.get("SPARSEATTN_NATIVE_SANITIZE", "") not in ("", "0")


def compiler() -> tuple[str, ...]:
    """The command of the C++ compiler: `$CXX`, or the first that is on PATH.

    Raises:
        BuildError: there is none.
    """
    given = os.environ.get("CXX", "").strip()
    if given:
        try:
            program, *words = shlex.split(given)
        except ValueError as error:
            raise BuildError(f"CXX={given!r:.80}: {error}") from None
        found = shutil.which(program)
        if found is None:
            raise BuildError(f"no C++ compiler: CXX={given!r:.80} is not found")
        return (found, *words)
    for program in _COMPILERS:
        found = shutil.which(program)
        if found is not None:
            return (found,)  # not what a link leads to: clang++ and ccache go by their names
    raise BuildError(f"no C++ compiler: none of {', '.join(_COMPILERS)} is on PATH")


def _run(words: tuple[str, ...], limit: float) -> subprocess.CompletedProcess[str]:
    # Messages in English, and no sanitizer in the compiler itself.
    hidden = ("LD_PRELOAD",) if sanitizing() else ()
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        return subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit,
            env={**clean, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{words[0]} took more than {limit:.0f} s") from None
    except OSError as error:
        raise BuildError(f"{words[0]} does not run: {error.strerror or error}") from None


def recipe(source: Path | None = None) -> Recipe:
    """What would be built now, by the environment and the machine.

    Args:
        source: a folder of .cpp and .h files; the engine's own by default.

    Raises:
        BuildError: nothing can be.
    """
    source = SOURCE if source is None else source
    target = cpu.flags()
    command = compiler()
    said = _run((*command, "--version"), 60)
    if said.returncode:
        raise BuildError(f"{command[0]} is no C++ compiler: --version exits {said.returncode}")
    version = said.stdout
    gcc = _GCC_FLAGS if "Free Software Foundation" in version else ()
    flags = (*_FLAGS, *gcc, *(_SANITIZED if sanitizing() else _FAST), *target)
    digest = hashlib.sha256()
    parts = [*command, os.path.realpath(command[0]), version, *flags, cpu.describe()]
    try:
        files = sorted(path for path in source.iterdir() if path.suffix in (".h", ".cpp"))
        for part in [*(part.encode() for part in parts), *(x for p in files for x in _file(p))]:
            digest.update(f"{len(part)}:".encode() + part)
    except OSError as error:
        raise BuildError(f"the C++ source cannot be read: {error}") from None
    line = (version.splitlines() or [""])[0]
    return Recipe(command, line, flags, source, f"native-{digest.hexdigest()[:32]}.so")


def _file(path: Path) -> tuple[bytes, bytes]:
    return path.name.encode(), path.read_bytes()


def _complaint(text: str) -> str:
    """The first error of what a compiler prints."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
    return found if len(found) <= 200 else found[:196] + " ..."


def _compile(made: Recipe, path: Path) -> None:
    """Compile, seal, and publish in one step: whoever looks sees a whole file or none.

    Each .cpp file is compiled by itself, as many at once as there are cores.
    """
    with cache.work(path.parent) as work:
        result = work / path.name
        files = sorted(made.source.glob("*.cpp"))
        objects = [str(work / f"{file.stem}.o") for file in files]
        parts = [("-c", str(file), "-o", to) for file, to in zip(files, objects, strict=True)]
        with ThreadPoolExecutor(max_workers=_cores()) as pool:
            for _ in pool.map(lambda part: _call(made, part), parts):
                pass
        _call(made, (*objects, "-shared", "-o", str(result)))
        try:
            cache.seal(result)
            os.replace(result, path)
        except OSError as error:
            raise BuildError(f"{path} cannot be written: {error.strerror or error}") from None


def _call(made: Recipe, words: tuple[str, ...]) -> None:
    """Run the compiler, which must succeed."""
    done = _run((*made.compiler, *made.flags, *words), _LIMIT)
    if done.returncode:
        raise BuildError(f"{made.compiler[0]} failed: {_complaint(done.stderr)}")


def _cores() -> int:
    """How many processes may run at once."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def built(made: Recipe, again: bool = False) -> Path:
    """The library of a recipe: the cache's, or where that has no whole one, built now.

    Args:
        again: build it even if the cache has one.

    Raises:
        BuildError: it cannot be built, or the cache is not safe.
    """
    path = cache.folder() / made.name
    if again or not cache.intact(path):
        with cache.turn(path.parent):
            if again or not cache.intact(path):  # another process may have built it meanwhile
                _compile(made, path)
    return path
