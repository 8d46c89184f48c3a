"""A session fails on skips that are not allowed, and unwritten memory holds NaN."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
PASSES = "def test_passes():\n    pass\n"
SKIPS = "import pytest\ndef test_skips():\n    pytest.skip('no CUDA device')\n"
MARKED = "import pytest\n@pytest.mark.skip(reason='not today')\ndef test_marked():\n    pass\n"
FAILS_EXPECTEDLY = (
    "import pytest\n@pytest.mark.xfail(reason='later')\ndef test_later():\n    assert 0\n"
)
WHOLE_FILE = "import pytest\npytest.skip('no luck', allow_module_level=True)\n"
IMPORTS = "import pytest\npytest.importorskip('no_module', reason='no_module lacks')\n"


def session(
    path: Path, files: dict[str, str], allowed: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Run pytest, with this directory's conftest.py, on some test files."""
    shutil.copy(HERE / "conftest.py", path)
    (path / "allowed_skips.txt").write_text(allowed)
    (path / "pytest.ini").write_text("[pytest]\n")
    for name, text in files.items():
        (path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    return subprocess.run(
        command, cwd=path, env=env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_a_skip_needs_a_line_on_the_list(workers: tuple[str, ...], tmp_path: Path) -> None:
    files = {
        "test_a.py": PASSES,
        "test_b.py": SKIPS,
        "test_c.py": MARKED,
        "test_d.py": FAILS_EXPECTEDLY,
        "test_e.py": WHOLE_FILE,
        "test_f.py": IMPORTS,
    }
    rules = [
        "test_b.py::* | *CUDA*",
        "test_c.py::* | not today",
        "test_d.py::* | xfail: later",
        "test_e.py | no luck",
        "test_f.py | no_* lacks",
    ]
    good = session(tmp_path, files, "\n".join(["# all", "", *rules]), *workers)
    assert good.returncode == 0, good.stdout
    assert "1 passed" in good.stdout
    bad = session(tmp_path, files, "", *workers)
    assert bad.returncode == pytest.ExitCode.TESTS_FAILED, bad.stdout
    assert [line for line in bad.stdout.splitlines() if " | " in line] == [
        "test_b.py::test_skips | no CUDA device",
        "test_c.py::test_marked | not today",
        "test_d.py::test_later | xfail: later",
        "test_e.py | no luck",
        "test_f.py | no_module lacks",
    ]


def test_the_reason_counts_and_not_the_test_alone(tmp_path: Path) -> None:
    done = session(tmp_path, {"test_a.py": PASSES + MARKED}, "* | *CUDA*")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "test_a.py::test_marked | not today" in done.stdout


def test_a_session_in_which_no_test_ran_fails(tmp_path: Path) -> None:
    done = session(tmp_path, {"test_b.py": SKIPS}, "* | *")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "no test ran" in done.stdout
    listed = session(tmp_path, {"test_b.py": PASSES}, "", "--collect-only")
    assert listed.returncode == 0


def test_a_line_without_a_reason_is_refused(tmp_path: Path) -> None:
    done = session(tmp_path, {"test_a.py": PASSES}, "test_a.py::*\n")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "allowed_skips.txt:1" in done.stdout + done.stderr


def test_the_list_stays_short() -> None:
    lines = (HERE / "allowed_skips.txt").read_text().splitlines()
    rules = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(rules) <= 12 and all("|" in rule for rule in rules)


def test_memory_that_nothing_has_written_holds_nan() -> None:
    like = torch.ones(3, 2)
    made = [
        torch.empty(4),
        torch.empty_like(like),
        like.new_empty(5),
        torch.empty_strided((2,), (1,)),
    ]
    assert all(bool(t.isnan().all()) for t in made)
    assert int(torch.empty(3, dtype=torch.int64).min()) == torch.iinfo(torch.int64).max
