"""What a stranger writes: the whole distribution in docs/examples, and the shortest mechanisms."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from doc_pages import DOCS, fences, sections

import sparseattn as sa
from sparseattn.testing import check_mechanism

PROJECT = DOCS / "examples" / "sparseattn-logsparse"
PLUGINS_PAGE = (DOCS / "plugins.md").read_text()
HOOKS = {
    "mechanisms": ["logsparse", "mirrored_softmax"],
    "implementations": ["chunked:by_chunk"],
    "inputs": ["delayed"],
    "metrics": ["cosine"],
}


class Installed:
    """The distribution, built from a copy and installed into a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source"
        # A copy: building and testing leave nothing in the checkout.
        shutil.copytree(PROJECT, self.source, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        wheels, site = folder / "wheels", folder / "site"
        self.run(
            *pip, *("wheel", "--no-build-isolation", "--no-deps", "-w"), wheels, self.source, env={}
        )
        (self.wheel,) = wheels.glob("*.whl")
        self.run(*pip, "install", "--no-deps", "--no-index", "--target", site, self.wheel, env={})
        path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        # One thread: small calls are slower on many, and other tests run beside this one.
        self.env = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(self, *words: Any, env: dict[str, str] | None = None, codes: tuple = (0,)) -> str:
        """Run a command; returns its standard output."""
        clean = {k: v for k, v in os.environ.items() if k != "SPARSEATTN_PLUGINS"}
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.source,
            env={**clean, **(self.env if env is None else env)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode in codes, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def sparseattn(self, *words: Any) -> Any:
        """The JSON that a command of `sparseattn` writes to standard output."""
        words = ("-c", "from sparseattn.cli import main; main()", *words, "--json", "-")
        # 1 says that something failed: the rows say what.
        return json.loads(self.run(sys.executable, *words, codes=(0, 1)))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    pytest.importorskip("hatchling")
    return Installed(tmp_path_factory.mktemp("example"))


def test_the_wheel_holds_the_package_and_nothing_else(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    modules = {name for name in names if not name.startswith("sparseattn_logsparse-0.1.0.dist")}
    package = PROJECT / "src" / "sparseattn_logsparse"
    expected = {f"sparseattn_logsparse/{p.name}" for p in package.iterdir() if p.is_file()}
    assert modules == expected >= {"sparseattn_logsparse/__init__.py"}


def test_doctor_finds_one_thing_or_more_from_every_hook(installed: Installed) -> None:
    rows = installed.sparseattn("doctor")
    (record,) = [row for row in rows if row["distribution"] == "sparseattn-logsparse"]
    assert (record["kind"], record["name"], record["status"]) == ("plugin", "logsparse", "loaded")
    assert {hook: record[hook] for hook in HOOKS} == HOOKS


def broken(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['name']}: {row['case']} {row['reason']}" for row in rows if row["status"] == "failed"
    ]


def test_check_passes_the_mechanisms_and_the_implementation(installed: Installed) -> None:
    rows = installed.sparseattn("check", "logsparse(near=4)", "--impl", "torch")
    assert broken(rows) == []
    assert {row["implementation"] for row in rows} == {"definition", "torch"}
    rows = installed.sparseattn("check", "chunked(chunk=5)", "--impl", "by_chunk")
    assert broken(rows) == []
    own = [r for r in rows if r["implementation"] == "by_chunk" and r["status"] == "passed"]
    laws = {row["law"] for row in own}
    assert laws >= {"forward_is_the_definition", "gradients_are_the_definition"}


def test_compare_measures_on_its_input_with_its_metric(installed: Installed) -> None:
    words = ("windowed(window=32)", "logsparse", "--input", "delayed", "--length", "256")
    rows = {
        r["mechanism"]: r for r in installed.sparseattn("compare", *words, "--runs", "3")["rows"]
    }
    assert {row["status"] for row in rows.values()} == {"ok"}
    near, far = rows["windowed(window=32, sinks=0)"], rows["logsparse(near=16)"]
    # What the input is for: its keys lie 64 positions back, which only one of the two sees.
    assert far["error"]["rel_l2"] < near["error"]["rel_l2"] / 4
    assert near["metrics"]["cosine"] < far["metrics"]["cosine"] <= rows["full"]["metrics"]["cosine"]
    assert all(row["arithmetic"]["error"] <= row["arithmetic"]["budget"] for row in rows.values())


def test_its_own_tests_pass(installed: Installed) -> None:
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    report = installed.run(sys.executable, *words)
    assert " passed" in report and "failed" not in report and "error" not in report


def test_this_process_is_left_as_it_was(installed: Installed) -> None:
    assert "logsparse" not in {record.name for record in sa.list_mechanisms()}
    assert not list(PROJECT.rglob("*.egg-info")) and not (PROJECT / "dist").exists()


# What a stranger has to write, imports and blank lines counted.
SHORT = {"A static pattern": 14, "A feature map": 10}


def first_snippet(heading: str) -> str:
    (part,) = [t for h, t in sections(PLUGINS_PAGE).items() if h == heading]
    return fences(part, "python")[0]


@pytest.mark.parametrize("heading", SHORT)
def test_a_mechanism_is_as_short_as_promised(heading: str) -> None:
    source = first_snippet(heading)
    assert source.count("\n") <= SHORT[heading]
    assert "import sparseattn" in source
    if importlib.util.find_spec("ruff") is None:  # of the extra `lint`
        return
    words = ("-m", "ruff", "format", "--isolated", "--line-length", "100", "--check", "-")
    done = subprocess.run([sys.executable, *words], input=source, capture_output=True, text=True)
    assert done.returncode == 0, f"not as ruff formats it: {done.stderr}"


@pytest.mark.parametrize("heading", SHORT)
def test_a_short_mechanism_conforms(heading: str, tmp_path: Path) -> None:
    # As in a plugin's module: nothing is registered, and no name of this file is in reach.
    (tmp_path / "short.py").write_text(first_snippet(heading))
    space = runpy.run_path(str(tmp_path / "short.py"))
    (cls,) = (x for x in space.values() if isinstance(x, type) and issubclass(x, sa.Mechanism))
    mech = cls(step=2) if heading == "A static pattern" else cls()  # a step that short cases reach
    results = check_mechanism(mech)
    # The native kernels refuse some dtypes and a bias, in words.
    refused = [r for r in results if r.status == "refused" and r.implementation != "native"]
    assert [str(r) for r in results if r.status == "failed"] + [str(r) for r in refused] == []
    assert sum(r.status == "passed" for r in results) > 40
