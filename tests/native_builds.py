"""A source of a few lines that compiles in a moment, and what its tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseattn.engines import native
from sparseattn.engines.native import build, library

TINY = """
extern "C" long long sparseattn_native_abi() { return 1; }
template <class T> struct Counter { static inline long long count = 0; };
extern "C" long long sparseattn_count(const char*) { return Counter<int>::count++; }
"""
NO_COMPILER = "no C++ kernels can be built on this machine"


@pytest.fixture(autouse=True, name="own")
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of the test's own, and a process that has tried nothing yet."""
    for name in ("SPARSEATTN_NATIVE", "SPARSEATTN_NATIVE_ISA", "SPARSEATTN_NATIVE_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPARSEATTN_NATIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_known", {})
    monkeypatch.setattr(library, "_serving", None)


@pytest.fixture(name="tiny")
def tiny_source(tmp_path: Path) -> Path:
    """The folder of a source that compiles in a moment."""
    try:
        build.compiler()
    except native.BuildError:
        pytest.skip(NO_COMPILER)
    return source_of(tmp_path / "tiny", TINY)


def source_of(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "native.cpp").write_text(text)
    return folder


def refusal(source: Path) -> str:
    with pytest.raises(native.BuildError) as caught:
        library.open_library(source)
    said = str(caught.value)
    assert len(said) < 500
    return said


def wrapper(folder: Path, before: str = "", program: str = "") -> tuple[Path, Path]:
    """A compiler that writes down each compilation, and does `before` it; and its notes."""
    path, notes = folder / "wrapped", folder / "notes"
    notes.write_text("")
    program = program or " ".join(build.compiler())
    path.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *" -c "*) echo compiled >> {notes}\n{before}\nesac\n'
        f'exec {program} "$@"\n'
    )
    path.chmod(0o755)
    return path, notes


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
