"""The build of the C++ kernels: what is built, what serves where nothing is, what is shipped."""

from __future__ import annotations

import json
import os
import platform
import re
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

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

from sparseattn.engines import native
from sparseattn.engines.native import __main__ as command
from sparseattn.engines.native import build, cpu, library

ROOT = Path(__file__).parent.parent


# --- what is built, and under which name ----------------------------------------------------------


def test_a_library_is_built_once_and_kept(tiny: Path, tmp_path: Path) -> None:
    first = library.open_library(tiny)
    held = first.path.stat()
    second = library.open_library(tiny)
    assert second.path == first.path and second.path.stat() == held
    assert entries(tmp_path / "cache") == [first.path.name]
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_the_name_follows_from_source_flags_compiler_and_cpu(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [build.recipe(tiny).name]
    (tiny / "more.h").write_text("// a header")
    names.append(build.recipe(tiny).name)
    (tiny / "more.h").rename(tiny / "other.h")
    names.append(build.recipe(tiny).name)
    (tiny / "notes.txt").write_text("no part of it")
    assert build.recipe(tiny).name == names[-1]
    monkeypatch.setenv("SPARSEATTN_NATIVE_SANITIZE", "1")
    names.append(build.recipe(tiny).name)
    monkeypatch.delenv("SPARSEATTN_NATIVE_SANITIZE")
    path, _ = wrapper(tmp_path)
    monkeypatch.setenv("CXX", str(path))
    names.append(build.recipe(tiny).name)
    monkeypatch.setenv("CXX", f"{path} -DSOMETHING")
    names.append(build.recipe(tiny).name)
    script = path.read_text()
    path.write_text(script.replace("#!/bin/sh\n", "#!/bin/sh\necho version 99\n"))
    names.append(build.recipe(tiny).name)
    monkeypatch.setattr(cpu, "describe", lambda: "another")
    names.append(build.recipe(tiny).name)
    assert len(set(names)) == len(names)


def test_no_flag_changes_values() -> None:
    words = {*build._FLAGS, *build._FAST, *build._GCC_FLAGS}
    assert not words & {"-ffast-math", "-Ofast", "-funsafe-math-optimizations"}
    assert not {word for word in words if "associative" in word or "finite" in word}


def test_libraries_of_one_process_share_nothing(tiny: Path, tmp_path: Path) -> None:
    other = source_of(tmp_path / "other", TINY + "// another\n")
    counts = []
    for opened in (library.open_library(tiny), library.open_library(other)):
        counts += [opened.cdll.sparseattn_count(b"") for _ in range(2)]
    assert counts == [0, 1, 0, 1]


def test_files_are_compiled_side_by_side_and_linked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny / "shared.h").write_text("int shared();\n")
    (tiny / "other.cpp").write_text('#include "shared.h"\nint shared() { return 5; }\n')
    with (tiny / "native.cpp").open("a") as file:
        file.write('#include "shared.h"\nextern "C" int sparseattn_five() { return shared(); }\n')
    # Each waits for the other to begin, as none would where one came after the other.
    wait = f"while [ $(wc -l < {tmp_path / 'notes'}) -lt 2 ]; do sleep 0.01; done"
    path, notes = wrapper(tmp_path, wait)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setattr(build, "_cores", lambda: 2)
    monkeypatch.setattr(build, "_LIMIT", 30.0)
    assert library.open_library(tiny).cdll.sparseattn_five() == 5
    assert notes.read_text() == "compiled\n" * 2
    (tiny / "other.cpp").write_text("int shared() { return other_nonsense; }\n")
    assert "other_nonsense" in refusal(tiny)


def test_what_does_not_compile_is_said_in_few_words(tmp_path: Path, tiny: Path) -> None:
    said = refusal(source_of(tmp_path / "bad", 'extern "C" int f() { return nonsense; }\n' * 50))
    assert "failed: " in said and "nonsense" in said and "error" in said
    assert entries(tmp_path / "cache") == []


def test_a_failure_is_remembered(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, notes = wrapper(tmp_path, "echo 'error: no space' >&2; exit 1")
    monkeypatch.setenv("CXX", str(path))
    said = library.missing()
    assert said == [f"{path} failed: error: no space"]
    calls = notes.read_text()  # one a file, as far as it came
    assert library.missing() == said and notes.read_text() == calls
    with pytest.raises(native.BuildError, match="no space"):
        library.call("sparseattn_softmax_forward", b"")


def test_threads_that_ask_at_once_build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def slow() -> Any:
        calls.append(1)
        time.sleep(0.2)
        raise native.BuildError("none")

    monkeypatch.setattr(library, "open_library", slow)
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(library.missing())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["none"]] * 8 and len(calls) == 1


def test_a_child_of_a_fork_does_not_wait_for_a_thread_that_it_has_not() -> None:
    script = """
import os, signal
from sparseattn.engines.native import library
library._guard.acquire()
child = os.fork()
if not child:
    signal.alarm(20)
    library._find(("0", None))
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


# --- the instruction set --------------------------------------------------------------------------

V3 = "fpu avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("machine", "features", "isa", "expected"),
    [
        ("x86_64", V3, "", "-march=native"),
        ("x86_64", V3, "native", "-march=native"),
        ("aarch64", "", "", "-mcpu=native"),
        ("arm64", "", "", "-mcpu=native"),
        ("x86_64", V3, "avx2", "-march=x86-64-v3"),
        ("x86_64", V4, "avx2", "-march=x86-64-v3"),
        ("x86_64", V4, "avx512", "-march=x86-64-v4"),
        ("x86_64", "fpu", "generic", "-march=x86-64"),
        ("aarch64", "", "neon", "-march=armv8-a"),
        ("x86_64", V3, "avx512", "lacks avx512bw, avx512cd, avx512dq, avx512f, avx512vl"),
        ("x86_64", V4.replace("fma ", ""), "avx512", "lacks fma"),
        ("x86_64", "fpu", "avx2", "lacks abm, avx, avx2"),
        ("x86_64", V3, "neon", "not of x86_64 CPUs"),
        ("aarch64", "", "avx2", "not of aarch64 CPUs"),
        ("x86_64", V3, "avx3", "expected one of native, avx512, avx2, neon, generic"),
        ("riscv64", "", "", "this is riscv64"),
        ("i686", "", "", "this is i686"),
    ],
)
def test_instruction_sets(
    machine: str, features: str, isa: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu, "_facts", lambda: {"flags": features})
    monkeypatch.setenv("SPARSEATTN_NATIVE_ISA", isa)
    if expected.startswith("-m"):
        assert cpu.flags() == (expected,)
    else:
        with pytest.raises(native.BuildError, match=expected):
            cpu.flags()


def test_the_cpu_is_told_by_what_stays() -> None:
    assert cpu.describe() == cpu.describe()
    assert platform.machine() in cpu.describe()
    assert "MHz" not in cpu.describe()


# --- what serves where there is none --------------------------------------------------------------

SERVES = """
import json, sys
import torch
import sparseattn as sa
from typer.testing import CliRunner
from sparseattn.cli import app

q = torch.randn(1, 2, 300, 32, requires_grad=True)
out = sa.attention(q, q, q, "windowed", window=8, causal=True)
out.sum().backward()
chosen = sa.explain(q, q, q, "windowed(window=8)", causal=True)
rows = json.loads(CliRunner().invoke(app, ["doctor", "--json", "-"]).stdout)
try:
    sa.attention(q, q, q, "full", impl="native")
    raised = ""
except sa.UnsupportedCallError as error:
    raised = str(error)
json.dump({
    "explained": str(chosen),
    "doctor": [row for row in rows if row["kind"] == "native"],
    "raised": raised,
}, sys.stdout)
"""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"PATH": "", "CXX": ""}, "no C++ compiler: none of c++, g++, clang++ is on PATH"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler: CXX='no-such-compiler' is not found"),
        ({"SPARSEATTN_NATIVE": "0"}, "SPARSEATTN_NATIVE=0 turns it off"),
        ({"SPARSEATTN_NATIVE_CACHE": "/proc/none"}, "no cache directory at /proc/none ("),
        ({"SPARSEATTN_NATIVE_ISA": "mmx"}, "SPARSEATTN_NATIVE_ISA='mmx': expected one of"),
        ({"SPARSEATTN_NATIVE_SANITIZE": "1"}, "SPARSEATTN_NATIVE_SANITIZE=1 needs"),
    ],
)
def test_torch_serves_and_explain_and_doctor_say_why(given: dict[str, str], words: str) -> None:
    if {"SPARSEATTN_NATIVE_SANITIZE", "SPARSEATTN_NATIVE_CACHE"} & set(given):
        try:  # these are looked at where there is a compiler
            build.compiler()
        except native.BuildError:
            pytest.skip(NO_COMPILER)
    done = subprocess.run(
        [sys.executable, "-c", SERVES],
        env={**os.environ, "OMP_NUM_THREADS": "1", **given},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert re.search(r"^implementation +torch$", found["explained"], re.MULTILINE)
    assert f"not native: {words}" in found["explained"]
    (row,) = found["doctor"]
    assert row["status"] == "absent" and words in row["reason"]
    assert words in found["raised"]


def test_a_call_that_it_would_not_serve_builds_nothing(tmp_path: Path) -> None:
    import torch

    import sparseattn as sa

    q = torch.randn(1, 2, 20, 8, dtype=torch.float64)
    sa.attention(q, q, q, "full")
    assert library._known == {} and not (tmp_path / "cache").exists()


# --- building ahead, and what is shipped ----------------------------------------------------------


def test_building_ahead_says_what_it_did(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(build, "SOURCE", tiny)
    assert command.main([]) == 0
    (name,) = entries(tmp_path / "cache")
    said = capsys.readouterr().out
    assert str(tmp_path / "cache" / name) in said and re.search(r"build +\d+\.\d s", said)
    assert command.main([]) == 0
    assert re.search(r"build +it was there", capsys.readouterr().out)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert command.main([]) == 1
    assert "no-such-compiler" in capsys.readouterr().err


def test_building_ahead_with_sanitizers_is_another_library(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(build, "SOURCE", tiny)
    monkeypatch.setenv("SPARSEATTN_NATIVE_SANITIZE", "")  # put back afterwards
    assert command.main([]) == 0
    assert command.main(["--sanitize"]) == 0
    assert "-fsanitize=address,undefined" in capsys.readouterr().out
    assert len(entries(tmp_path / "cache")) == 2
    # Loading it here would end the process.
    assert "LD_PRELOAD" in refusal(tiny)


PLANTED = """
extern "C" long long sparseattn_native_abi() { return 1; }
extern "C" long long sparseattn_sound(const int* x) { return x[0] + 1; }
__attribute__((noipa)) int* made(int count) { return new int[count]; }
extern "C" long long sparseattn_beyond(const int* x) {
    int* room = made(4);
    room[x[0]] = 1;
    int found = room[0];
    delete[] room;
    return found > 9;
}
extern "C" long long sparseattn_overflow(const int* x) { return x[0] + 2147483647 == 7; }
"""


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("sparseattn_sound", ""),
        ("sparseattn_beyond", "heap-buffer-overflow"),
        ("sparseattn_overflow", "signed integer overflow"),
    ],
)
def test_sanitizers_see_what_is_planted(entry: str, words: str, tiny: Path, tmp_path: Path) -> None:
    source = source_of(tmp_path / "planted", PLANTED)
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        asked = [*build.compiler(), f"-print-file-name={name}"]
        found.append(subprocess.run(asked, capture_output=True, text=True).stdout.strip())
    if not all(map(os.path.isabs, found)):
        pytest.skip("no address sanitizer is installed")
    script = f"""
import pathlib, struct
from sparseattn.engines.native import library
opened = library.open_library(pathlib.Path({str(source)!r}))
opened.cdll.{entry}(struct.pack("i", 4))
print("unseen")
"""
    given = {
        "SPARSEATTN_NATIVE_SANITIZE": "1",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **given}, capture_output=True, text=True
    )
    assert words in done.stderr
    assert (done.returncode == 0) == ("unseen" in done.stdout) == (words == "")


def test_the_source_builds_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparseattn.engines.native"],
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "no-such-compiler" in done.stderr


def test_a_wheel_carries_the_source(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    words = ["build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        at = "sparseattn/engines/native/source/"
        found = {name: held.read(name) for name in held.namelist() if name.startswith(at)}
    assert found == {f"{at}{path.name}": path.read_bytes() for path in build.SOURCE.iterdir()}
    assert f"{at}native.cpp" in found
