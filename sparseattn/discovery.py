"""Finding plugins: one entry point at a time, each on its own, whatever it raises."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pluggy

from . import admission, hookspecs
from .errors import PluginError

GROUP = "sparseattn"
BUILT_IN = "sparseattn"
API = 1
ENVIRONMENT = "SPARSEATTN_PLUGINS"


@dataclass
class PluginRecord:
    """What became of one entry point.

    Attributes:
        name: the entry point's. distribution, version: of the package that provides it.
        status: `loaded`, `blocked` (by SPARSEATTN_PLUGINS) or `broken`.
        reason: why it is blocked or broken; empty when all is well.
        mechanisms, implementations, inputs, metrics: what it registered, by name.
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
        return _normal(self.distribution) == BUILT_IN


@dataclass
class Staged:
    """What one plugin registered, before any of it is published."""

    record: PluginRecord
    mechanisms: list[type] = field(default_factory=list)
    implementations: list[tuple[str, Any]] = field(default_factory=list)
    inputs: list[tuple[str, Any]] = field(default_factory=list)
    metrics: list[tuple[str, Any]] = field(default_factory=list)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _provider(point: metadata.EntryPoint) -> tuple[str, str]:
    dist = point.dist
    if dist is None:
        return "unknown", "unknown"
    return dist.metadata["Name"] or "unknown", dist.version or "unknown"


def entry_points() -> list[metadata.EntryPoint]:
    """The entry points of the group, each once, the built-in ones first, then by name."""
    seen: dict[tuple[str, str, str], metadata.EntryPoint] = {}
    for point in metadata.entry_points(group=GROUP):
        # One distribution may be found twice, by an install and on the path.
        seen.setdefault((point.name, point.value, _normal(_provider(point)[0])), point)
    return [seen[key] for key in sorted(seen, key=lambda key: (key[2] != BUILT_IN, key[2], key[0]))]


def _blocked(name: str, built_in: bool) -> str:
    """Why SPARSEATTN_PLUGINS keeps an entry point out; empty when it does not."""
    setting = os.environ.get(ENVIRONMENT)
    if setting is None:
        return ""
    words = _words(setting)
    if not words:
        return "" if built_in else f"{ENVIRONMENT} is empty: built-in plugins only"
    if f"-{name}" in words:
        return f"{ENVIRONMENT} says -{name}"
    only = [word for word in words if not word.startswith("-")]
    if only and name not in only:
        return f"{ENVIRONMENT} allows only {', '.join(only)}"
    return ""


def _words(setting: str) -> list[str]:
    return [word.strip() for word in setting.split(",") if word.strip()]


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # an error whose own __str__ raises must not take discovery down
        text = "(no message)"
    return f"{type(error).__name__}: {text}"[:500]


def discover() -> Iterator[Staged]:
    """Load every entry point in turn; a broken one is recorded and costs the others nothing."""
    found = entry_points()
    for point in found:
        distribution, version = _provider(point)
        record = PluginRecord(point.name, distribution, version)
        staged = Staged(record)
        reason = _blocked(point.name, record.built_in)
        if reason:
            record.status, record.reason = "blocked", reason
            yield staged
            continue
        try:
            # A plugin's prints must not end up in a table or in JSON on standard output.
            with contextlib.redirect_stdout(sys.stderr):
                _load(point, staged)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit at import included: it is the plugin's failure
            record.status, record.reason = "broken", _describe(error)
            staged = Staged(record)
        yield staged
    known = {point.name for point in found}
    for word in _words(os.environ.get(ENVIRONMENT, "")):
        if word.lstrip("-") not in known:
            reason = f"{ENVIRONMENT} names {word!r}, but no such entry point is installed"
            warnings.warn(reason, stacklevel=2)
            yield Staged(PluginRecord(word, "unknown", "unknown", "broken", reason))


def _load(point: metadata.EntryPoint, staged: Staged) -> None:
    plugin = point.load()
    if inspect.isclass(plugin):
        plugin = plugin()
    api = getattr(plugin, "sparseattn_api", API)
    if type(api) is not int or api != API:
        raise PluginError(
            f"it is written for version {api!r:.80} of the plugin contract; this is version {API}"
        )
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name=point.name)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        raise PluginError(
            "it implements no hook; decorate register_mechanisms(self, register) with "
            "@sparseattn.hookimpl"
        )
    register = _Register(staged)
    manager.hook.register_mechanisms(register=register.mechanism)
    manager.hook.register_implementations(register=register.implementation)
    manager.hook.register_inputs(register=register.input)
    manager.hook.register_metrics(register=register.metric)
    if register.problem is not None:  # a plugin may have swallowed the refusal
        raise register.problem


class _Register:
    def __init__(self, staged: Staged) -> None:
        self.staged = staged
        self.problem: PluginError | None = None

    def _keep(self, problem: PluginError) -> PluginError:
        self.problem = self.problem or problem
        return problem

    def mechanism(self, cls: Any) -> Any:
        try:
            admission.admit_mechanism(cls)
        except PluginError as error:
            raise self._keep(error) from None
        if any(cls.name == other.name for other in self.staged.mechanisms):  # type: ignore[attr-defined]
            raise self._keep(PluginError(f"it registers the mechanism {cls.name!r} twice"))
        self.staged.mechanisms.append(cls)
        self.staged.record.mechanisms.append(cls.name)
        return cls

    def implementation(self, name: Any, implementation: Any) -> None:
        try:
            admission.admit_implementation(name, implementation)
        except PluginError as error:
            raise self._keep(error) from None
        pair = f"{name}:{implementation.name}"
        if pair in self.staged.record.implementations:
            raise self._keep(PluginError(f"it registers the implementation {pair} twice"))
        self.staged.implementations.append((name, implementation))
        self.staged.record.implementations.append(pair)

    def input(self, name: Any, function: Any) -> None:
        self._function("input", name, function, self.staged.inputs, self.staged.record.inputs)

    def metric(self, name: Any, function: Any) -> None:
        self._function("metric", name, function, self.staged.metrics, self.staged.record.metrics)

    def _function(
        self, kind: str, name: Any, function: Any, into: list[tuple[str, Any]], names: list[str]
    ) -> None:
        try:
            admission.admit_function(kind, name, function)
        except PluginError as error:
            raise self._keep(error) from None
        into.append((name, function))
        names.append(name)
