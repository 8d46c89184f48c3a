"""Imports go down only: the floors of the architecture, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sparseattn"
FLOORS = [
    {"errors", "call", "runs"},
    {"layout", "lowering", "reference"},
    {"engines"},
    {"base", "cache"},
    {"hookspecs", "specs", "admission", "claims", "discovery", "preference", "registry"},
    {"functional"},
    {"modules", "integrations"},
    {"harness", "testing"},
    {"cli"},
]
FLOOR = {room: at for at, rooms in enumerate(FLOORS) for room in rooms}


def imported(source: str, module: tuple[str, ...]) -> set[str]:
    """Rooms (top-level names below sparseattn) that a module imports, type checking apart."""
    tree = ast.parse(source)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped |= {id(inner) for inner in ast.walk(node)}
    rooms: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(module[: len(module) - node.level]) if node.level else []
            path = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*path, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "sparseattn" and len(parts) > 1:
                rooms.add(parts[1])
    return {room for room in rooms if room in FLOOR}


def upward(source: str, module: tuple[str, ...]) -> set[str]:
    own = FLOOR[module[1]]
    return {room for room in imported(source, module) if FLOOR[room] > own}


FILES = [p for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    parts = ("sparseattn", *path.relative_to(ROOT).with_suffix("").parts)
    assert parts[1] in FLOOR, f"{path} is on no floor"
    assert not upward(path.read_text(), parts)


@pytest.mark.parametrize(
    "planted",
    [
        "from .registry import mechanism",
        "def late():\n    from sparseattn import functional",
        "import sparseattn.cli",
        "from . import harness",
    ],
)
def test_an_import_upwards_is_seen(planted: str) -> None:
    assert upward(planted, ("sparseattn", "base"))


def test_no_cycle_within_a_floor() -> None:
    graph: dict[str, set[str]] = {room: set() for room in FLOOR}
    for path in FILES:
        parts = ("sparseattn", *path.relative_to(ROOT).with_suffix("").parts)
        graph[parts[1]] |= imported(path.read_text(), parts) - {parts[1]}

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        return any(
            nxt == goal or (nxt not in seen and reaches(nxt, goal, seen | {nxt}))
            for nxt in graph[start]
            if FLOOR[nxt] == FLOOR[start]
        )

    assert not [room for room in graph if reaches(room, room, {room})]


def test_plugins_import_only_the_public_package() -> None:
    for path in (ROOT.parent / "plugins").rglob("*.py"):
        own = path.relative_to(ROOT.parent / "plugins").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                assert not name.startswith("sparseattn.")
                assert not name.startswith("sparseattn_") or name.split(".")[0] == own


def test_the_bare_import_is_light() -> None:
    code = (
        "import sys, sparseattn; "
        "heavy = {'torch', 'triton', 'transformers', 'altair', 'sparseattn_full'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
