"""Imports go down only. Every import of the core and its plugins is read, none is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparseattn

ROOT = Path(__file__).parents[1]

# Design, section 3. A module that is not listed belongs to no floor, and fails.
FLOORS = (
    {"errors", "digits", "arguments", "call", "runs"},
    {"clauses", "block_layout", "lowering", "layout", "reference"},
    {"engines"},
    {"base", "implementation", "cache", "cache_ring", "cache_rows", "cache_state"},
    {"hookspecs", "specs", "admission", "discovery", "claims", "preference", "registry"},
    {"functional", "choice"},
    {"modules", "rotary", "torch_inputs", "integrations"},
    {"harness", "testing"},
    {"cli"},
)
FLOOR = {room: at for at, floor in enumerate(FLOORS) for room in floor}

Sources = dict[str, str]  # dotted module name to source; a package by its own name


def read(top: Path) -> Sources:
    sources = {}
    for path in sorted(top.rglob("*.py")):
        parts = list(path.relative_to(top.parent).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
    return sources


class _Imports(ast.NodeVisitor):
    """Every import, wherever it stands, but those for type checkers alone."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.package = module if is_package else module.rpartition(".")[0]
        self.found: list[tuple[str, str | None]] = []  # the module, and the name taken from it

    def visit_If(self, node: ast.If) -> None:
        test = node.test
        name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
        for child in node.orelse if name == "TYPE_CHECKING" else [*node.body, *node.orelse]:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(alias.name, None) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parts = self.package.split(".")
            parts = parts[: len(parts) - node.level + 1]
            base = ".".join([*parts, *filter(None, [node.module])])
        self.found += [(base, alias.name) for alias in node.names]


def imports(module: str, sources: Sources) -> Iterator[tuple[str, str | None]]:
    is_package = any(name.startswith(f"{module}.") for name in sources) or "." not in module
    visitor = _Imports(module, is_package)
    visitor.visit(ast.parse(sources[module]))
    for base, name in visitor.found:
        inner = f"{base}.{name}"
        yield (inner, None) if name is not None and inner in sources else (base, name)


def faults(sources: Sources) -> list[str]:
    """What breaks the floors in the sources of the core."""
    found: list[str] = []
    edges: dict[str, set[str]] = {module: set() for module in sources}
    for module in sources:
        if module == "sparseattn":
            for target, _ in imports(module, sources):
                if target.split(".")[0] == "sparseattn":
                    found.append(f"sparseattn imports {target} at once; public names are lazy")
            continue
        room = module.split(".")[1]
        if room not in FLOOR:
            found.append(f"{module} is on no floor")
            continue
        for target, name in imports(module, sources):
            top, _, rest = target.partition(".")
            if top.startswith("sparseattn_"):
                found.append(f"{module} imports the plugin {target}")
            if top != "sparseattn":
                continue
            if not rest:
                # The public face reaches up to the functions, so only those above may use it.
                if FLOOR[room] < FLOOR["harness"] and name != "__version__":
                    found.append(f"{module} imports the public face ({name or 'sparseattn'})")
                continue
            other = rest.split(".")[0]
            if FLOOR.get(other, -1) > FLOOR[room]:
                found.append(f"{module} (floor {FLOOR[room]}) imports {target} above it")
            if target in edges:
                edges[module].add(target)
    return found + [f"a cycle: {' -> '.join(cycle)}" for cycle in cycles(edges)]


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One cycle for each edge that closes one."""
    found, done = [], set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
            return
        if module in done:
            return
        for target in sorted(edges[module]):
            walk(target, [*path, module])
        done.add(module)

    for module in sorted(edges):
        walk(module, [])
    return found


def plugin_faults(plugin: str, sources: Sources, public: set[str]) -> list[str]:
    """What a plugin imports, or reads from `import sparseattn as sa`, that is not public."""
    found = []
    for module in sources:
        aliases = {"sparseattn"}
        for node in ast.walk(ast.parse(sources[module])):
            if isinstance(node, ast.Import):
                aliases |= {a.asname for a in node.names if a.name == "sparseattn" and a.asname}
        for target, name in imports(module, sources):
            top, _, rest = target.partition(".")
            if top.startswith("sparseattn_") and top != plugin:
                found.append(f"{module} imports another plugin, {target}")
            elif top == "sparseattn" and (rest or (name is not None and name not in public)):
                found.append(f"{module} imports {target}{f'.{name}' if name else ''}, not public")
        for node in ast.walk(ast.parse(sources[module])):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in aliases
                and node.attr not in public
            ):
                found.append(f"{module} uses sparseattn.{node.attr}, not public")
    return found


CORE = read(ROOT / "sparseattn")
PLUGINS = sorted(p.name for p in (ROOT / "plugins").iterdir() if (p / "__init__.py").exists())
PUBLIC = set(sparseattn.__all__)


def test_the_core_keeps_its_floors():
    assert {"sparseattn.registry", "sparseattn.engines.op"} <= set(CORE)
    assert faults(CORE) == []


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_uses_public_names_only(plugin):
    assert plugin_faults(plugin, read(ROOT / "plugins" / plugin), PUBLIC) == []


def test_there_are_four_plugins_of_mechanisms_and_three_adapters():
    assert [p.removeprefix("sparseattn_") for p in PLUGINS] == [
        *("block_sparse", "fla", "flash_attn", "flex", "full", "linear", "windowed")
    ]


def test_public_names_are_where_the_face_says():
    assert sorted(sparseattn.__all__) == sparseattn.__all__
    assert {*sparseattn._HOMES, "__version__"} == PUBLIC
    for name in PUBLIC:
        assert getattr(sparseattn, name) is not None
    assert set(dir(sparseattn)) >= PUBLIC
    # What type checkers are told is the same list.
    told = set()
    for node in ast.walk(ast.parse(CORE["sparseattn"])):
        if isinstance(node, ast.ImportFrom) and node.level:
            told |= {alias.name for alias in node.names}
            assert all(sparseattn._HOMES[a.name] == node.module for a in node.names)
    assert told == set(sparseattn._HOMES)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sparseattn.no_such_name


def test_no_module_bears_the_name_of_a_public_function():
    assert PUBLIC & {module.rpartition(".")[2] for module in CORE} == set()


PLANTED = {
    "up": ({"errors": "from .registry import lookup", "registry": ""}, "imports sparseattn.regis"),
    "up, by name": ({"base": "import sparseattn.registry", "registry": ""}, "above it"),
    "up, as a module": ({"base": "from . import registry", "registry": ""}, "above it"),
    "up, deep inside": (
        {"engines": "", "engines.op": "def f():\n    from ..base import X", "base": ""},
        "sparseattn.engines.op (floor 2) imports sparseattn.base",
    ),
    "cycle": ({"call": "from . import runs", "runs": "from .call import X"}, "a cycle"),
    "long cycle": (
        {
            "engines": "",
            "engines.a": "from . import b",
            "engines.b": "from .c import x",
            "engines.c": "def f():\n    from sparseattn.engines import a",
        },
        "sparseattn.engines.a -> sparseattn.engines.b -> sparseattn.engines.c",
    ),
    "the face": ({"base": "import sparseattn as sa"}, "public face"),
    "a name of the face": ({"base": "from . import attention"}, "public face"),
    "a plugin": ({"cli": "import sparseattn_full"}, "the plugin sparseattn_full"),
    "no floor": ({"helpers": ""}, "sparseattn.helpers is on no floor"),
    "eager": ({"": "from .base import X", "base": ""}, "public names are lazy"),
    "else": (
        {
            "errors": "if TYPE_CHECKING:\n    pass\nelse:\n    from . import registry",
            "registry": "",
        },
        "above it",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_found(case):
    sources, words = PLANTED[case]
    sources = {f"sparseattn.{k}".rstrip("."): v for k, v in {"": "", **sources}.items()}
    found = faults(sources)
    assert len(found) == 1 and words in found[0], found


def test_what_is_allowed_is_not_called_a_fault():
    sources = {
        "sparseattn": "if TYPE_CHECKING:\n    from .base import X",
        "sparseattn.errors": "import os\nif typing.TYPE_CHECKING:\n    from .registry import X",
        "sparseattn.base": "from .errors import X\nfrom . import engines\nimport sparseattn.call",
        "sparseattn.call": "from .errors import X",
        "sparseattn.engines": "",
        "sparseattn.registry": "from .base import X\nimport pluggy",
        "sparseattn.harness": "",
        "sparseattn.harness.run": "from .. import __version__\nfrom .store import X",
        "sparseattn.harness.store": "import sparseattn as sa",
    }
    assert faults(sources) == []


@pytest.mark.parametrize(
    "source",
    [
        "from sparseattn.base import Mechanism",
        "import sparseattn.registry",
        "from sparseattn import registry",
        "import sparseattn as sa\nsa.registry.lookup",
        "import sparseattn as core\ncore.engines",
        "import sparseattn_full",
        "def f():\n    from sparseattn_full import Full",
    ],
)
def test_a_planted_fault_in_a_plugin_is_found(source):
    assert len(plugin_faults("sparseattn_mine", {"sparseattn_mine": source}, PUBLIC)) == 1


def test_a_plugin_may_use_itself_and_the_public_face():
    source = (
        "import sparseattn as sa\nfrom sparseattn import hookimpl\nfrom .part import x\nsa.Grid"
    )
    sources = {"sparseattn_mine": source, "sparseattn_mine.part": "import torch\nx = 1"}
    assert plugin_faults("sparseattn_mine", sources, PUBLIC) == []
