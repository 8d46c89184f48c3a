"""Plugins as strangers ship them: real distributions, found in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

GOOD = """
from dataclasses import dataclass
import sparseattn as sa

@dataclass(frozen=True)
class {cls}(sa.MaskedSoftmax):
    name = "{name}"
    reach: int = 2
    def visible(self, i, j):
        return (i - j).abs() <= self.reach

class Plugin:
    @sa.hookimpl
    def register_mechanisms(self, register):
        register({cls})
"""
REPORT = """
import json, sparseattn as sa
from sparseattn import registry
print(json.dumps({
    "mechanisms": [r.name for r in sa.list_mechanisms()],
    "plugins": {r.name + "@" + r.distribution: [r.status, r.reason] for r in registry.diagnose()},
}))
"""


def ship(root: Path, name: str, source: str, value: str = "{module}:Plugin") -> None:
    module = f"shipped_{name}"
    (root / f"{module}.py").write_text(textwrap.dedent(source))
    info = root / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    target = value.format(module=module)
    (info / "entry_points.txt").write_text(f"[sparseattn]\n{name} = {target}\n")


def report(root: Path, **env: str) -> tuple[dict, subprocess.CompletedProcess]:
    run = subprocess.run(
        [sys.executable, "-c", REPORT],
        env={**os.environ, "PYTHONPATH": str(root), **env},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run


def test_hostile_plugins_cost_nobody_else_anything(tmp_path: Path) -> None:
    ship(tmp_path, "good", GOOD.format(cls="Good", name="good_one"))
    ship(tmp_path, "quits", "raise SystemExit(3)")
    ship(tmp_path, "prints", "print('noise')\n" + GOOD.format(cls="Noisy", name="noisy_one"))
    half = GOOD.format(cls="Half", name="half_one") + "        raise RuntimeError('half way')\n"
    ship(tmp_path, "half", half)
    ship(tmp_path, "old", "sparseattn_api = 7", "{module}")
    ship(tmp_path, "missing", "", "no_such_module:Plugin")
    ship(tmp_path, "garbage", "Plugin = 42")
    ship(tmp_path, "thief", GOOD.format(cls="Thief", name="windowed"))
    ship(tmp_path, "unfrozen", GOOD.format(cls="Soft", name="soft").replace("(frozen=True)", ""))
    keyword = GOOD.format(cls="Key", name="keyed").replace("reach", "scale")
    ship(tmp_path, "keyword", keyword)
    found, run = report(tmp_path)
    plugins = {key.split("@")[0]: value for key, value in found["plugins"].items()}
    assert plugins["good"] == ["loaded", ""]
    assert plugins["prints"][0] == "loaded" and "noise" in run.stderr
    for name, word in (
        ("quits", "SystemExit"),
        ("half", "half way"),
        ("old", "version 7"),
        ("missing", "no_such_module"),
        ("garbage", "no hook"),
        ("thief", "built-in"),
        ("unfrozen", "frozen"),
        ("keyword", "keyword of attention"),
    ):
        assert plugins[name][0] == "broken" and word in plugins[name][1], (name, plugins[name])
    assert {"good_one", "noisy_one", "windowed", "full"} <= set(found["mechanisms"])
    assert not {"half_one", "soft", "keyed"} & set(found["mechanisms"])


def test_two_strangers_with_one_name_lose_it_both(tmp_path: Path) -> None:
    ship(tmp_path, "one", GOOD.format(cls="One", name="shared"))
    ship(tmp_path, "two", GOOD.format(cls="Two", name="shared"))
    found, _ = report(tmp_path)
    assert "shared" not in found["mechanisms"]
    assert all(found["plugins"][f"{n}@shipped_{n}"][0] == "broken" for n in ("one", "two"))
    found, _ = report(tmp_path, SPARSEATTN_PLUGINS="-two")
    assert "shared" in found["mechanisms"]
    assert found["plugins"]["two@shipped_two"][0] == "blocked"


def test_the_environment_chooses_plugins(tmp_path: Path) -> None:
    ship(tmp_path, "good", GOOD.format(cls="Good", name="good_one"))
    assert report(tmp_path, SPARSEATTN_PLUGINS="good")[0]["mechanisms"] == ["good_one"]
    only_built_in = report(tmp_path, SPARSEATTN_PLUGINS="")[0]["mechanisms"]
    assert "good_one" not in only_built_in and "full" in only_built_in
    found, run = report(tmp_path, SPARSEATTN_PLUGINS="good,nobody")
    assert any(v[0] == "broken" and "nobody" in v[1] for v in found["plugins"].values())
