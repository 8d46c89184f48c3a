"""The loaded library of C++ kernels, and how it is called."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .. import intern
from . import BuildError, build

ABI = 1  # of the entries: what `sparseattn_native_abi` of the source returns


class Library(NamedTuple):
    """A library that is loaded, and its entries that were called."""

    recipe: build.Recipe
    path: Path
    cdll: ctypes.CDLL
    entries: dict[str, Callable[[bytes], int]]


_OFF = "SPARSEATTN_NATIVE=0 turns it off"
# What the environment asked for -> the library, or why there is none: each is tried once.
_known: dict[tuple[str | None, ...], Library | str] = {}
_serving: Library | None = None
_guard = threading.Lock()


def _after_fork() -> None:
    # The thread that held it may not be in the child.
    global _guard
    _guard = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _settings() -> tuple[str | None, ...]:
    # Read at each call of attention, so only these two; the others are read when building.
    return os.environ.get("SPARSEATTN_NATIVE"), os.environ.get("SPARSEATTN_NATIVE_ISA")


def _open(path: Path) -> ctypes.CDLL:
    """Load a library of this version's entries.

    Raises:
        BuildError: it is none.
    """
    try:
        opened = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the built library does not load: {str(error)[:200]}") from None
    try:
        version = opened.sparseattn_native_abi
    except AttributeError:
        problem = "it lacks its entries"
    else:
        version.restype, version.argtypes = ctypes.c_int64, []
        found = version()
        if found == ABI:
            return opened
        problem = f"its version is {found}, not {ABI}"
    # Closed: else another of the same path would be taken for it.
    _ctypes.dlclose(opened._handle)
    raise BuildError(f"the built library does not load: {problem}")


def _check_sanitizer() -> None:
    """Loading a sanitized library into a process without the sanitizer would end the process."""
    if build.sanitizing() and not hasattr(ctypes.CDLL(None), "__asan_init"):
        raise BuildError(
            "SPARSEATTN_NATIVE_SANITIZE=1 needs the sanitizer in LD_PRELOAD: see `make sanitize`"
        )


def open_library(source: Path | None = None) -> Library:
    """Load the library that the environment asks for; built first where the cache has none.

    What the cache has, and is broken, is built once more.

    Raises:
        BuildError: there can be none.
    """
    recipe = build.recipe(source)
    _check_sanitizer()
    path = build.built(recipe)
    try:
        opened = _open(path)
    except BuildError:
        path = build.built(recipe, again=True)
        opened = _open(path)
    return Library(recipe, path, opened, {})


def _find(settings: tuple[str | None, ...]) -> Library | str:
    with _guard:
        if settings not in _known:
            try:
                _known[settings] = _OFF if settings[0] == "0" else open_library()
            except BuildError as error:
                _known[settings] = str(error)
        return _known[settings]


@intern.constant
def missing() -> list[str]:
    """Why no kernel can run on this machine, one reason; empty where they can.

    Builds the library where there is none yet, which takes seconds: ask only for a call that it
    would serve. The answer is kept for the process.
    """
    global _serving
    settings = _settings()
    found = _known.get(settings)
    if found is None:
        found = _find(settings)
    if isinstance(found, str):
        return [found]
    _serving = found
    return []


def load() -> Library:
    """The library that `missing` found last, or finds now.

    Raises:
        BuildError: there can be none.
    """
    if _serving is None:
        reasons = missing()
        if _serving is None:
            raise BuildError(reasons[0])
    return _serving


def call(name: str, block: bytes) -> None:
    """Run one kernel on a packed block of numbers; other Python threads go on meanwhile.

    Raises:
        MemoryError: its workspace could not be had.
        BuildError: there is no library.
    """
    library = _serving or load()
    entry = library.entries.get(name)
    if entry is None:
        found = getattr(library.cdll, name)
        found.restype, found.argtypes = ctypes.c_int64, [ctypes.c_char_p]
        entry = library.entries.setdefault(name, found)
    if entry(block):
        raise MemoryError(f"{name}: not enough memory for its workspace")
