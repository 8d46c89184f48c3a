"""The cache of built kernels: what is kept, what is built again, and which folders are refused."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from native_builds import (  # noqa: F401
    NO_COMPILER,
    TINY,
    entries,
    own_cache,
    refusal,
    source_of,
    tiny_source,
    wrapper,
)

from sparseattn.engines.native import build, cache, library


def planted(path: Path, source: Path) -> None:
    """Another library in the entry's place, with a seal that is good."""
    made = path.parent / "planted.so"
    words = [*build.compiler(), *build.recipe(source).flags]
    subprocess.run([*words, "-shared", str(source / "native.cpp"), "-o", str(made)], check=True)
    cache.seal(made)
    os.replace(made, path)


@pytest.mark.parametrize(
    "how", ["cut", "empty", "text", "changed", "link", "writable", "folderless", "abi", "symbol"]
)
def test_a_broken_entry_is_built_again(how: str, tiny: Path, tmp_path: Path) -> None:
    recipe = build.recipe(tiny)
    path = build.built(recipe)
    whole = path.read_bytes()
    if how == "folderless":
        shutil.rmtree(path.parent)
    elif how == "link":
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    elif how == "writable":
        path.chmod(0o770)
    elif how in ("abi", "symbol"):
        text = TINY.replace("return 1", "return 7") if how == "abi" else "int nothing;"
        planted(path, source_of(tmp_path / "other", text))
    else:
        path.unlink()
        middle = len(whole) // 2
        flipped = bytes([whole[middle] ^ 1])
        path.write_bytes(
            {
                "cut": whole[: middle // 2],
                "empty": b"",
                "text": b"no library",
                "changed": whole[:middle] + flipped + whole[middle + 1 :],
            }[how]
        )
        path.chmod(0o500)
    broken = path.lstat().st_ino if path.exists() else None
    opened = library.open_library(tiny)
    assert opened.path == path and cache.intact(path) and not path.is_symlink()
    assert path.stat().st_ino != broken
    assert opened.cdll.sparseattn_native_abi() == library.ABI
    assert opened.cdll.sparseattn_count(b"") == 0
    assert entries(path.parent) == [path.name]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int nothing;", "it lacks its entries"),
        (TINY.replace("return 1", "return 7"), "its version is 7, not 1"),
        (TINY + 'void away(); extern "C" void f() { away(); }', "does not load: .*undefined"),
    ],
)
def test_what_is_broken_when_built_is_refused(
    text: str, words: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path / "other", text)
    path, notes = wrapper(tmp_path)
    monkeypatch.setenv("CXX", f"{path} -Wl,-z,now")
    assert re.search(words, refusal(source))
    assert notes.read_text() == "compiled\n" * 2  # once more, and no more


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_is_refused(mode: int, tiny: Path, tmp_path: Path) -> None:
    path = library.open_library(tiny).path.parent
    path.chmod(mode)
    assert f"others can write to the cache directory {path} (mode {mode:o})" in refusal(tiny)
    path.chmod(0o755)  # that others read it is no harm
    library.open_library(tiny)


def test_a_folder_of_another_user_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = library.open_library(tiny).path.parent
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert f"the cache directory {path} belongs to another user" in refusal(tiny)
    assert not cache.intact(path / entries(path)[0])


def test_a_folder_that_others_can_replace_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    above = tmp_path / "above"
    above.mkdir()
    monkeypatch.setenv("SPARSEATTN_NATIVE_CACHE", str(above / "cache"))
    path = library.open_library(tiny).path.parent
    link = tmp_path / "link"
    link.symlink_to(path)
    for given in (path, link):  # a link is followed to the end, and the way there is judged
        monkeypatch.setenv("SPARSEATTN_NATIVE_CACHE", str(given))
        above.chmod(0o777)
        assert f"others can replace the cache directory {path}, by way of {above}" in refusal(tiny)
        above.chmod(0o1777)  # as /tmp: who does not own a name cannot move it
        library.open_library(tiny)
        above.chmod(0o755)
        library.open_library(tiny)


@pytest.mark.parametrize(
    ("user", "group", "mode", "harm"),
    [
        (7, 7, 0o755, False),
        (0, 0, 0o755, False),
        (8, 7, 0o755, True),  # its owner may do all
        (7, 7, 0o775, False),  # the user's own group
        (7, 8, 0o775, True),
        (0, 8, 0o775, True),
        (7, 7, 0o757, True),
        (0, 0, 0o1777, False),
        (8, 0, 0o1777, True),
    ],
)
def test_who_may_replace_a_folder(
    user: int, group: int, mode: int, harm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    monkeypatch.setattr(os, "getegid", lambda: 7)
    held = os.stat_result((mode, 0, 0, 1, user, group, 0, 0, 0, 0))
    assert cache._replaceable(held) == harm


@pytest.mark.parametrize("case", ["relative", "file", "unmakeable", "unwritable"])
def test_where_nothing_can_be_kept_is_said(
    case: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, words = "some/cache", "is no absolute path"
    if case == "file":
        (tmp_path / "file").write_text("")
        given, words = str(tmp_path / "file"), f"no cache directory at {tmp_path / 'file'} ("
    elif case == "unmakeable":
        given, words = "/proc/none", "no cache directory at /proc/none ("
    elif case == "unwritable":
        # Modes do not bind root, but nobody makes files in /proc.
        locked = Path("/proc") if os.geteuid() == 0 else tmp_path / "locked"
        if locked != Path("/proc"):
            locked.mkdir(mode=0o500)
        given, words = str(locked), f"the cache directory {locked} cannot be written ("
    monkeypatch.setenv("SPARSEATTN_NATIVE_CACHE", given)
    assert words in refusal(tiny)


def test_where_libraries_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.place() == tmp_path / "cache"
    monkeypatch.setenv("SPARSEATTN_NATIVE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.place() == Path("/somewhere/sparseattn")
    monkeypatch.setenv("HOME", "/a/home")
    for relative in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache.place() == Path("/a/home/.cache/sparseattn")


def test_nobody_else_may_write_an_entry_whatever_the_umask(tiny: Path) -> None:
    before = os.umask(0)
    try:
        path = library.open_library(tiny).path
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o500
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_what_a_killed_build_leaves_is_taken_away_in_time(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    for name, age in (("building-old", 7200), ("building-young", 60)):
        (folder / name).mkdir()
        (folder / name / "half.so").write_text("half")
        then = time.time() - age
        os.utime(folder / name, (then, then))
    path = library.open_library(tiny).path
    assert entries(folder) == sorted(["building-young", path.name])


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_build_at_once_make_one_good_file(
    locks: bool, tiny: Path, tmp_path: Path
) -> None:
    compiler, notes = wrapper(tmp_path, "sleep 0.5")
    script = f"""
import contextlib, pathlib, sys
from sparseattn.engines.native import cache, library
if not {locks}:
    cache.turn = lambda path: contextlib.nullcontext()
print(flush=True)
sys.stdin.read()
opened = library.open_library(pathlib.Path({str(tiny)!r}))
assert opened.cdll.sparseattn_native_abi() == 1
print(opened.path)
"""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "CXX": str(compiler)},
            text=True,
        )
        for _ in range(5)
    ]
    for process in running:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()  # all are ready
    for process in running:
        assert process.stdin is not None
        process.stdin.close()
    said = {process.stdout.read() for process in running if process.stdout is not None}
    assert [process.wait() for process in running] == [0] * 5
    (line,) = said
    path = Path(line.strip())
    assert entries(tmp_path / "cache") == [path.name] and cache.intact(path)
    compiled = notes.read_text().count("compiled")
    assert compiled == 1 if locks else compiled > 1


def test_a_build_that_is_cut_off_publishes_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = "while :; do case $1 in -o) echo half > $2; break; esac; shift; done; kill -9 $$"
    compiler, _ = wrapper(tmp_path, half)
    monkeypatch.setenv("CXX", str(compiler))
    assert "failed: no message" in refusal(tiny)
    assert entries(tmp_path / "cache") == []
