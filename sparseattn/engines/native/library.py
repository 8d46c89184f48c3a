"""The loaded library of C++ kernels, and how it is called."""

from __future__ import annotations

import ctypes
import os
import threading
from functools import lru_cache

from . import build

ABI = 1
_guard = threading.Lock()
_loaded: dict[str, ctypes.CDLL | str] = {}


def _key() -> str:
    names = ("SPARSEATTN_NATIVE", "SPARSEATTN_NATIVE_ISA", "SPARSEATTN_NATIVE_CACHE", "CXX", "PATH")
    return "\0".join(os.environ.get(name, "") for name in names)


def _load() -> ctypes.CDLL | str:
    if os.environ.get("SPARSEATTN_NATIVE", "1") == "0":
        return "SPARSEATTN_NATIVE=0 is set"
    key = _key()
    found = _loaded.get(key)
    if found is None:
        with _guard:
            found = _loaded.get(key)
            if found is None:
                try:
                    found = ctypes.CDLL(str(build.built()))
                except (build.BuildError, OSError) as error:
                    found = f"the C++ kernels could not be built: {error}"
                _loaded[key] = found
    return found


def missing() -> list[str]:
    """Why no kernel can run on this machine; empty where they can. Builds at first use."""
    found = _load()
    return [found] if isinstance(found, str) else []


@lru_cache(maxsize=64)
def _entry(name: str) -> ctypes._NamedFuncPointer:
    library = _load()
    assert not isinstance(library, str)
    entry = getattr(library, name)
    entry.restype, entry.argtypes = ctypes.c_int64, [ctypes.c_char_p]
    return entry


def call(name: str, block: bytes) -> None:
    """Run one kernel on a packed block of numbers.

    Raises:
        MemoryError: its workspace could not be had.
    """
    if _entry(name)(block):
        raise MemoryError(f"{name}: not enough memory for its workspace")
