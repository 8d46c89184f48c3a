"""Without a GPU: what the kernels compile to, how often they compile, and what a launch reads."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import triton_versions
from triton_versions import BENCHMARKS, TESTS, newest, run_python

import sparseattn as sa

LAUNCHES = TESTS / "triton_launches.py"
# No compilation here takes a minute; a machine that is busy elsewhere is given ten times as long.
PATIENCE = 1000


def benchmark(name: str) -> Any:
    """A module of `benchmarks`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(BENCHMARKS))
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


gpu_compile = benchmark("gpu_compile")


def kernels() -> set[str]:
    """The kernels of the package, by its sources: what is jitted and asks which program it is."""
    found = set()
    for path in Path(sa.__file__).parent.glob("engines/*/triton/*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                body = "\n".join(ast.unparse(line) for line in node.body)
                asks = "tl.program_id" in body or "jit(" in ast.unparse(node.decorator_list[0])
                found |= {node.name} if asks else set()
    return found


def spills(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], int]:
    """The most bytes that any row of a kernel, dtype, target and version spills."""
    most: dict[tuple[str, ...], int] = {}
    for row in rows:
        key = tuple(row[word] for word in ("triton", "target", "kernel", "dtype"))
        most[key] = max(most.get(key, 0), row["spilled_bytes"])
    return most


@pytest.mark.parametrize("which", [-1, pytest.param(0, marks=pytest.mark.long)])
def test_kernels_compile_within_memory_and_on_tensor_cores(which: int, tmp_path: Path) -> None:
    """With the newest version, and the oldest; no kernel spills more than what is stored."""
    path = tmp_path / "compiled.json"
    script = BENCHMARKS / "gpu_compile.py"
    given = ("--brief", "--processes", "1", "--json", str(path))
    newest()  # skips where there is none
    stored = spills(benchmark("gpu_page").read("compile")["rows"])
    one = triton_versions.versions()[which]
    printed = run_python(one.path, script, *given, timeout=PATIENCE, check=False)
    assert path.exists(), printed
    rows = json.loads(path.read_text())["rows"]
    assert {row["triton"] for row in rows} == {one.version}
    wrong = {gpu_compile.label(row): gpu_compile.problems(row) for row in rows}
    assert {name: found for name, found in wrong.items() if found} == {}
    assert {row["target"] for row in rows} == set(map(gpu_compile.name_of, gpu_compile.TARGETS))
    found = spills(rows)
    more = {
        key: (most, stored.get(key, 0)) for key, most in found.items() if most > stored.get(key, 0)
    }
    assert more == {}
    assert {"forward", "grad_queries", "grad_keys", "part_of_keys", "merge_parts"} <= {
        row["kernel"] for row in rows
    }


@pytest.mark.long
def test_kernels_that_are_wrong_are_seen() -> None:
    found = json.loads(run_python(newest().path, LAUNCHES, "plants", timeout=PATIENCE))
    assert found.pop("none") == []
    seen = {name: "; ".join(problems) for name, problems in found.items()}
    assert "bytes of shared memory, and there are 232448" in seen["shared memory"]
    assert "matrix products are not on tensor cores" in seen["no tensor cores"]
    assert "no tensor-core instruction" in seen["no tensor cores"]
    assert "input_precision must be one of" in seen["no program"]


def test_new_lengths_batches_and_windows_compile_nothing() -> None:
    found = json.loads(run_python(newest().path, LAUNCHES, "keys"))
    assert found == {
        "band": 1,
        "lists": 1,
        "backward": 3,  # forward, and a kernel for queries and one for keys
        "width 24": 2,  # whether a head begins at a multiple of 16 elements
        "two dtypes": 2,  # what does differ is told apart
    }


@pytest.mark.long
def test_a_launch_reads_no_tensor_on_the_host() -> None:
    """After the first call of its kind, whose tables are kept: as CUDA graphs need it."""
    found = json.loads(run_python(newest().path, LAUNCHES, "reads"))
    # A key mask decides which keys a call has, and is looked at.
    holes = [name for name in found if "holes" in name]
    assert [found.pop(name) for name in holes] == ["read: "]
    assert found == dict.fromkeys(found, "")


# The helper that finds versions.


def planted(folder: Path, version: str) -> str:
    """A folder that says it has a version of triton."""
    where = folder / version / f"triton-{version}.dist-info"
    where.mkdir(parents=True)
    (where / "METADATA").write_text(f"Metadata-Version: 2.1\nName: triton\nVersion: {version}\n")
    return str(where.parent)


def test_versions_are_found_in_the_folders_that_are_named(tmp_path: Path) -> None:
    folders = [planted(tmp_path, version) for version in ("3.10.0", "3.6.0", "3.9.0")]
    found = triton_versions.versions(os.pathsep.join(folders))
    assert [one.version for one in found] == ["3.6.0", "3.9.0", "3.10.0"]
    assert found[0].path == tmp_path / "3.6.0"


def test_a_folder_without_triton_is_an_error_and_no_skip(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no triton"):
        triton_versions.versions(f"{planted(tmp_path, '3.6.0')}{os.pathsep}{tmp_path / 'none'}")


def test_a_process_meets_its_version_and_says_why_it_failed(tmp_path: Path) -> None:
    planted(tmp_path, "3.99.0")
    code = "import importlib.metadata as m, os; print(m.version('triton'), os.environ[{!r}])"
    shown = run_python(tmp_path / "3.99.0", code.format("TRITON_INTERPRET"), interpret=True)
    assert shown.split() == ["3.99.0", "1"]
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_python(None, "1 / 0")
    assert run_python(None, "import sys; print(5); sys.exit(3)", check=False) == "5\n"


# The page.


def test_the_page_is_what_is_stored() -> None:
    page = benchmark("gpu_page")
    documents = {part: page.read(part) for part in page.PARTS}
    text = page.PAGE.read_text()
    assert page.rendered(text, documents) == text


def test_a_page_that_says_something_else_is_seen() -> None:
    page = benchmark("gpu_page")
    stored = page.read("compile")
    changed = copy.deepcopy(stored)
    changed["rows"][0]["spilled_bytes"] = 12345
    text = page.PAGE.read_text()
    assert page.rendered(text, {"compile": changed}) != text
    with pytest.raises(ValueError, match="marks"):
        page.rendered("# On a GPU\n", {"compile": stored})


def test_what_is_stored_has_no_problem() -> None:
    """Of every call, with both versions; the tests above compile some of it."""
    rows = benchmark("gpu_page").read("compile")["rows"]
    assert len({row["triton"] for row in rows}) == 2
    assert {row["kernel"] for row in rows} <= kernels()
    wrong = {gpu_compile.label(row): gpu_compile.problems(row) for row in rows}
    assert {name: found for name, found in wrong.items() if found} == {}
