"""`sparseattn new`: what it writes installs, is found, and passes its own tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparseattn.cli import app


def new(*words: str) -> Any:
    return CliRunner().invoke(app, ["new", *words])


@pytest.mark.parametrize(
    "name",
    [
        "Upper",
        "9lives",
        "has-hyphen",
        "has space",
        "dots.in",
        "..",
        "../up",
        "a/b",
        "",
        "_private",
        "a" * 65,
        "newline\n",
        'quote"]\nevil = "x',
        "$name",
        "é",
        "class",
        "lambda",
        "windowed",
        "full",
        "linear",
    ],
)
def test_names_that_will_not_do(name, tmp_path):
    result = new("--path", str(tmp_path), "--", name)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    target = tmp_path / "sparseattn-my-own"
    target.mkdir()
    (target / "README.md").write_text("mine")
    result = new("my_own", "--path", str(tmp_path))
    assert result.exit_code == 2
    assert "exists" in result.stderr
    assert [p.name for p in target.iterdir()] == ["README.md"]
    assert (target / "README.md").read_text() == "mine"
    # A file, a link that leads nowhere, and an empty folder are somebody's too.
    (tmp_path / "sparseattn-a-file").write_text("mine")
    (tmp_path / "sparseattn-a-link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "sparseattn-a-folder").mkdir()
    for name in ("a_file", "a_link", "a_folder"):
        assert new(name, "--path", str(tmp_path)).exit_code == 2
    assert not (tmp_path / "nowhere").exists()
    assert list((tmp_path / "sparseattn-a-folder").iterdir()) == []


def test_a_path_that_is_a_file_is_bad_usage(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert new("my_own", "--path", str(tmp_path / "file")).exit_code == 2
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["a", "none", "plugin", "match", "a__b_", "x9_", "a" * 64])
def test_files_of_any_good_name_are_valid(name, tmp_path):
    result = new(name, "--path", str(tmp_path / "deep" / "down"), "--json", "-")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    target = Path(record["path"])
    assert record["status"] == "ok" and target.parent == tmp_path / "deep" / "down"
    found = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert set(record["files"]) == found >= {"pyproject.toml", "README.md"}
    for path in target.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "$" not in text, path
            if path.suffix == ".py":
                compile(text, str(path), "exec")
    assert f'{name} = "sparseattn_{name}:Plugin"' in (target / "pyproject.toml").read_text()


def test_the_plugin_installs_and_passes_its_tests(tmp_path):
    pytest.importorskip("hatchling")
    assert new("every_other", "--path", str(tmp_path)).exit_code == 0
    project, site = tmp_path / "sparseattn-every-other", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _done([*pip, "--no-deps", "--no-build-isolation", "--target", str(site), str(project)])
    older = os.environ.get("PYTHONPATH")
    env = {k: v for k, v in os.environ.items() if k != "SPARSEATTN_PLUGINS"}
    env["PYTHONPATH"] = os.pathsep.join([str(site), *([older] if older else [])])

    command = [sys.executable, "-c", "from sparseattn.cli import main; main()"]
    listed = json.loads(_done([*command, "list", "--json", "-"], env=env))
    record = next(r for r in listed if r["name"] == "every_other")
    assert record["provider"] == "sparseattn-every-other"
    assert record["nature"] == "masked_softmax"
    assert set(record["options"]) == {"window", "step"}
    # The name is taken now.
    assert _code([*command, "new", "every_other", "--path", str(tmp_path / "x")], env) == 2

    report = _done(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        env=env,
        cwd=project,
    )
    assert " passed" in report and "failed" not in report
    assert metadata.version("sparseattn")  # this process is left as it was
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("sparseattn-every-other")


def _done(command: list[str], **kwargs: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, **kwargs)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def _code(command: list[str], env: dict[str, str]) -> int:
    return subprocess.run(command, capture_output=True, env=env, timeout=120).returncode
