"""Finding plugins: one entry point at a time, each on its own, whatever it raises."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pluggy

from . import admission, hookspecs
from .errors import PluginError, did_you_mean

GROUP = "sparseattn"
BUILT_IN = "sparseattn"
# Its plugins with mechanisms; the others are adapters of libraries.
FOUR = frozenset({"full", "windowed", "block_sparse", "linear"})
API = 1
ENVIRONMENT = "SPARSEATTN_PLUGINS"
_UNKNOWN = "unknown"
_HOOKS = (
    "register_mechanisms",
    "register_implementations",
    "register_inputs",
    "register_metrics",
)


@dataclass
class PluginRecord:
    """What became of one entry point.

    Attributes:
        name: the entry point's. distribution, version: of the package that provides it.
        status: `loaded`, `blocked` (by SPARSEATTN_PLUGINS) or `broken`.
        reason: why it is blocked or broken; a remark on a loaded one; empty when all is well.
        mechanisms, inputs, metrics: the names it holds. implementations: `mechanism:name`.
    """

    name: str
    distribution: str
    version: str
    status: str = "loaded"
    reason: str = ""
    mechanisms: list[str] = field(default_factory=list)
    implementations: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)

    @property
    def built_in(self) -> bool:
        """Whether sparseattn itself provides it."""
        return _normal(self.distribution) == BUILT_IN

    def remark(self, text: str) -> None:
        """Add to the reason."""
        self.reason = f"{self.reason}; {text}" if self.reason else text

    def fault(self, text: str) -> None:
        """Call it broken, for one more reason."""
        self.status = "broken"
        self.remark(text)


class Staged:
    """What one plugin registers: checked at once, published only if the whole plugin loads."""

    def __init__(self, record: PluginRecord) -> None:
        self.record = record
        self.closed = False
        self.clear()

    def clear(self) -> None:
        """Forget what was registered."""
        self.mechanisms: dict[str, Any] = {}
        self.implementations: dict[tuple[str, str], Any] = {}  # by mechanism and own name
        self.inputs: dict[str, Callable[..., Any]] = {}
        self.metrics: dict[str, Callable[..., Any]] = {}
        self.problem: PluginError | None = None

    def count(self) -> int:
        """How many things were registered."""
        found = (self.mechanisms, self.implementations, self.inputs, self.metrics)
        return sum(len(table) for table in found)

    def _add(self, word: str, into: dict[Any, Any], key: Any, value: Any) -> Any:
        if self.closed:
            raise PluginError("register was called after its hook had returned; call it within")
        try:
            key = key()
            if key in into:
                name = ":".join(key) if isinstance(key, tuple) else key
                raise PluginError(
                    f"it registers the {word} {name!r} twice; each needs a name of its own"
                )
        except PluginError as error:
            # Kept, because a plugin that swallows a refusal is broken all the same.
            self.problem = self.problem or error
            raise
        into[key] = value
        return value

    def mechanism(self, cls: Any) -> Any:
        """`register` of `register_mechanisms`."""

        def key() -> str:
            admission.admit_mechanism(cls)
            return cls.name

        return self._add("mechanism", self.mechanisms, key, cls)

    def implementation(self, name: Any, implementation: Any) -> Any:
        """`register` of `register_implementations`."""

        def key() -> tuple[str, str]:
            return name, admission.admit_implementation(name, implementation)

        return self._add("implementation", self.implementations, key, implementation)

    def input(self, name: Any, function: Any) -> Any:
        """`register` of `register_inputs`."""
        return self._function("input", self.inputs, name, function)

    def metric(self, name: Any, function: Any) -> Any:
        """`register` of `register_metrics`."""
        return self._function("metric", self.metrics, name, function)

    def _function(self, word: str, into: dict[str, Any], name: Any, function: Any) -> Any:
        def key() -> str:
            admission.admit_function(word, name, function)
            return name

        return self._add(word, into, key, function)


@dataclass(frozen=True)
class Found:
    """An entry point, and the distribution that has it."""

    point: metadata.EntryPoint
    distribution: str
    version: str


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def find() -> list[Found]:
    """The entry points of the group, the built-in ones first."""
    # A package whose list of entry points is damaged makes this raise; it stops `import torch` too.
    found = [Found(p, *_identity(p.dist)) for p in metadata.entry_points(group=GROUP)]
    return sorted(
        found, key=lambda f: (_normal(f.distribution) != BUILT_IN, f.distribution, f.point.name)
    )


def _identity(dist: metadata.Distribution | None) -> tuple[str, str]:
    if dist is None:
        return _UNKNOWN, _UNKNOWN
    try:
        return str(dist.metadata["Name"] or _UNKNOWN), str(dist.version or _UNKNOWN)
    except Exception:  # damaged metadata
        return _UNKNOWN, _UNKNOWN


class Setting:
    """SPARSEATTN_PLUGINS: unset, all; `a,b`, only these; `-a`, all but it; empty, `FOUR` only."""

    def __init__(self) -> None:
        text = os.environ.get(ENVIRONMENT)
        words = [word.strip() for word in (text or "").split(",")]
        self.words = [word for word in words if word]
        self.empty = text is not None and not self.words
        self.only = [word for word in self.words if not word.startswith("-")]

    def blocks(self, found: Found) -> str:
        """Why an entry point is kept out; empty when it is not."""
        name = found.point.name
        if self.empty and (name not in FOUR or _normal(found.distribution) != BUILT_IN):
            return f"{ENVIRONMENT} is empty: only {', '.join(sorted(FOUR))} of sparseattn"
        if f"-{name}" in self.words:
            return f"{ENVIRONMENT} says -{name}"
        if self.only and name not in self.only:
            return f"{ENVIRONMENT} allows only {', '.join(self.only)}"
        return ""

    def unknown(self, names: set[str]) -> list[PluginRecord]:
        """A record for each word that names no entry point."""
        records = []
        for word in self.words:
            name = word[1:] if word.startswith("-") else word
            if name not in names:
                reason = f"{ENVIRONMENT} says {word}, but no plugin of that name is installed"
                # To keep out what is not there is harmless; to ask for it is not.
                status = "blocked" if word.startswith("-") else "broken"
                reason += f".{did_you_mean(name, names)}" if did_you_mean(name, names) else ""
                records.append(PluginRecord(name, _UNKNOWN, _UNKNOWN, status, reason))
        return records


def describe(error: BaseException) -> str:
    """An error in one line of bounded length, whatever its `__str__` does."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = "its message cannot be read"
    return f"{type(error).__name__}: {text}"[:500]


def quiet() -> contextlib.AbstractContextManager[Any]:
    """What a plugin prints must not end up in a table or in JSON on standard output."""
    return contextlib.redirect_stdout(sys.stderr)


def load(found: Found, staged: Staged) -> None:
    """Load one plugin and call its hooks; on failure `staged` is empty and its record broken."""
    try:
        with quiet():
            _load(found.point, staged)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit at import included: it is the plugin's failure
        staged.clear()
        staged.record.fault(describe(error))
    finally:
        staged.closed = True


def _check_api(plugin: Any) -> None:
    api = getattr(plugin, "sparseattn_api", API)
    if type(api) is not int or api != API:
        raise PluginError(
            f"it is written for version {api!r:.80} of the plugin contract (sparseattn_api); this "
            f"sparseattn has version {API}: install versions that fit"
        )


def _load(point: metadata.EntryPoint, staged: Staged) -> None:
    plugin = point.load()
    _check_api(plugin)
    if inspect.isclass(plugin):
        plugin = plugin()
        _check_api(plugin)
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name=point.name)
    _check_hooks(manager, plugin)
    for hook, register in zip(
        _HOOKS, (staged.mechanism, staged.implementation, staged.input, staged.metric), strict=True
    ):
        before = staged.count()
        results = getattr(manager.hook, hook)(register=register)
        if results and staged.count() == before:
            raise PluginError(
                f"{hook} returned a {type(results[0]).__name__} and registered nothing; a hook is "
                "a plain function that calls register(...)"
            )
    if staged.problem is not None:
        raise staged.problem


def _check_hooks(manager: pluggy.PluginManager, plugin: Any) -> None:
    callers = manager.get_hookcallers(plugin) or []
    marked = {caller.name for caller in callers}
    for caller in callers:
        if not caller.has_spec() and not all(x.optionalhook for x in caller.get_hookimpls()):
            raise PluginError(
                f"it implements the hook {caller.name!r}, which does not exist."
                f"{did_you_mean(caller.name, _HOOKS)} The hooks: {', '.join(_HOOKS)}"
            )
    absent = object()
    unmarked = [
        hook
        for hook in _HOOKS
        if hook not in marked and inspect.getattr_static(plugin, hook, absent) is not absent
    ]
    if unmarked or not marked:
        what = f"{unmarked[0]} is not marked" if unmarked else f"{plugin!r:.80} has no hook"
        raise PluginError(
            f"{what}; a plugin is a module, class or instance with a function such as "
            "register_mechanisms(self, register), decorated with @sparseattn.hookimpl"
        )
