"""The registry: names to mechanisms, discovered once, at first use, under a lock."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import admission, specs
from .base import Implementation, Mechanism
from .discovery import PluginRecord, Staged, discover
from .engines import intern
from .errors import InvalidInputError, PluginError, UnknownMechanismError, did_you_mean
from .errors import UnknownOptionError as _UnknownOptionError


@dataclass(frozen=True)
class Option:
    """An option of a mechanism: its type in words, its default, and whether it must be given."""

    type: str
    default: Any
    required: bool


@dataclass(frozen=True)
class MechanismRecord:
    """A registered mechanism, as `list_mechanisms` reports it."""

    name: str
    nature: str
    provider: str
    summary: str
    options: dict[str, Option]
    looks_ahead: bool
    source: str


@dataclass
class _Entry:
    cls: type[Mechanism]
    provider: str
    record: PluginRecord | None  # None: registered by a script


@dataclass
class _State:
    entries: dict[str, _Entry] = field(default_factory=dict)
    contested: dict[str, list[PluginRecord]] = field(default_factory=dict)
    implementations: dict[str, list[tuple[Implementation, str]]] = field(default_factory=dict)
    inputs: dict[str, Callable[..., Any]] = field(default_factory=dict)
    metrics: dict[str, Callable[..., Any]] = field(default_factory=dict)
    records: list[PluginRecord] = field(default_factory=list)
    discovered: bool = False


_lock = threading.RLock()
_state = _State()
_preferred: tuple[str, ...] = ()


def _ready() -> _State:
    """The registry, with every plugin discovered."""
    if _state.discovered:
        return _state
    with _lock:
        # A plugin that uses the registry while it is imported comes back here on the same thread,
        # and sees what was published before it.
        if not _state.discovered and not getattr(_loading, "now", False):
            _loading.now = True
            try:
                for staged in discover():
                    _publish(staged)
                _check_implementations()
                _state.discovered = True
            finally:
                _loading.now = False
    return _state


_loading = threading.local()


def _complain(record: PluginRecord, problem: str) -> None:
    record.status = "broken"
    record.reason = f"{record.reason}; {problem}" if record.reason else problem


def _publish(staged: Staged) -> None:
    record = staged.record
    _state.records.append(record)
    for cls in staged.mechanisms:
        name = cls.name  # type: ignore[attr-defined]
        holder = _state.entries.get(name)
        if name in _state.contested:
            _state.contested[name].append(record)
            _complain(record, f"the name {name!r} is contested by another plugin")
        elif holder is None:
            _state.entries[name] = _Entry(cls, record.distribution, record)
        elif holder.record is None:
            _complain(record, f"the name {name!r} was registered by a script first")
        elif holder.record.built_in:
            _complain(record, f"the name {name!r} belongs to a built-in mechanism")
        else:
            # Two strangers with one name: to favour either would silently change what it means.
            del _state.entries[name]
            _state.contested[name] = [holder.record, record]
            for loser, other in ((holder.record, record), (record, holder.record)):
                _complain(
                    loser,
                    f"the name {name!r} is also registered by {other.name!r} of "
                    f"{other.distribution}: neither has it",
                )
                if name in loser.mechanisms:
                    loser.mechanisms.remove(name)
    for name, implementation in staged.implementations:
        _state.implementations.setdefault(name, []).append((implementation, record.name))
    for kind, found, held in (
        ("input", staged.inputs, _state.inputs),
        ("metric", staged.metrics, _state.metrics),
    ):
        for name, function in found:
            if name in held:
                _complain(record, f"the {kind} name {name!r} is taken")
            else:
                held[name] = function


def _check_implementations() -> None:
    """Drop implementations that bear a name their mechanism has already."""
    by_name = {record.name: record for record in _state.records}
    for name, found in _state.implementations.items():
        entry = _state.entries.get(name)
        taken: set[str] = set()
        if entry is not None:
            try:
                instance = specs.build(entry.cls, {})
                taken = {impl.name for impl in instance.implementations()}
            except Exception:  # it needs options, or fails without them: checked when it is used
                taken = set()
        kept = []
        for implementation, plugin in found:
            if implementation.name in taken:
                problem = f"{name!r} has an implementation {implementation.name!r} already"
                _complain(by_name[plugin], problem)
            else:
                taken.add(implementation.name)
                kept.append((implementation, plugin))
        _state.implementations[name] = kept


def lookup(name: str) -> type[Mechanism]:
    """The class registered under a name.

    Raises:
        UnknownMechanismError: none is; it suggests the nearest names, and says which plugins are
            broken, blocked or contest the name.
    """
    state = _ready()
    entry = state.entries.get(name)
    if entry is not None:
        return entry.cls
    if name in state.contested:
        rivals = " and ".join(f"{r.name!r} of {r.distribution}" for r in state.contested[name])
        raise UnknownMechanismError(
            f"the mechanism name {name!r} is registered by {rivals}, so neither has it; block one "
            "with SPARSEATTN_PLUGINS=-name"
        )
    known = sorted(state.entries)
    absent = [f"{r.name!r} ({r.status})" for r in state.records if r.status != "loaded"]
    hint = f" Not loaded: {', '.join(absent)}; see `sparseattn doctor`." if absent else ""
    raise UnknownMechanismError(
        f"no mechanism is named {name!r:.80}.{did_you_mean(name, known)} Registered: "
        f"{', '.join(known)}.{hint}"
    )


def mechanism(mechanism: str | Mechanism, /, **options: Any) -> Mechanism:
    """A mechanism by name and options, or by spec: `mechanism("windowed", window=256)`.

    An instance comes back as it is. Its `repr` is its spec.

    Raises:
        UnknownMechanismError: no mechanism has that name.
        UnknownOptionError: an option is unknown or ill-typed, or stands beside an instance or beside
            a spec that has its own.
        InvalidInputError: the spec is malformed, or the mechanism refuses a value.
    """
    if isinstance(mechanism, Mechanism):
        if options:
            raise _UnknownOptionError(
                f"options {', '.join(sorted(options))} were given beside the instance {mechanism!r}; "
                "put them into the instance"
            )
        return mechanism
    if isinstance(mechanism, type) and issubclass(mechanism, Mechanism):
        raise InvalidInputError(
            f"got the class {mechanism.__name__}; pass an instance: {mechanism.__name__}(...)"
        )
    name, given = specs.parse(mechanism)
    if given and options:
        raise _UnknownOptionError(
            f"options {', '.join(sorted(options))} were given beside the spec {mechanism!r:.80}, "
            "which has its own; put them all in one place"
        )
    return specs.build(lookup(name), given or options)


def list_mechanisms() -> list[MechanismRecord]:
    """Every registered mechanism, sorted by name."""
    found = []
    for name, entry in sorted(_ready().entries.items()):
        cls = entry.cls
        kinds = specs.option_types(cls)
        options = {}
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]
            required = f.default is f.default_factory is dataclasses.MISSING
            default = None
            if f.default is not dataclasses.MISSING:
                default = f.default
            elif f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            options[f.name] = Option(specs.type_name(kinds[f.name]), default, required)
        doc = (cls.__dict__.get("__doc__") or "").strip()
        # A dataclass without a docstring gets its signature for one, which says nothing.
        first = doc.split("\n\n")[0]
        summary = "" if doc.startswith(f"{cls.__name__}(") else " ".join(first.split())
        found.append(
            MechanismRecord(
                name, cls.nature, entry.provider, summary, options, cls.looks_ahead, cls.source
            )
        )
    return found


def register_mechanism(cls: Any) -> Any:
    """Register a mechanism's class from a script; usable as a decorator above `@dataclass`.

    A class that is defined again (a notebook cell run twice) replaces its former self.

    Raises:
        PluginError: the class would fail later, or the name belongs to a plugin.
    """
    admission.admit_mechanism(cls)
    state = _ready()
    with _lock:
        held = state.entries.get(cls.name)
        if cls.name in state.contested or (held is not None and held.record is not None):
            raise PluginError(
                f"the mechanism name {cls.name!r} is taken by a plugin; choose another"
            )
        if held is not None and (held.cls.__module__, held.cls.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise PluginError(
                f"the mechanism name {cls.name!r} is taken by {held.cls.__qualname__}"
            )
        state.entries[cls.name] = _Entry(cls, cls.__module__, None)
    return cls


def extra_implementations(name: str) -> tuple[Implementation, ...]:
    """Implementations that plugins registered for a mechanism that another provides."""
    return tuple(impl for impl, _ in _ready().implementations.get(name, ()))


def inputs() -> dict[str, Callable[..., Any]]:
    """Harness inputs from plugins: name to `fn(length, seed, causal) -> (q, k, v)`."""
    return dict(_ready().inputs)


def metrics() -> dict[str, Callable[..., Any]]:
    """Harness metrics from plugins: name to `fn(out, ref, call) -> float`."""
    return dict(_ready().metrics)


def diagnose() -> list[PluginRecord]:
    """What became of every entry point found: loaded, blocked or broken, and why."""
    return list(_ready().records)


class prefer:  # a verb: it is called like a function, and is a context when used as one
    """Put implementations of these names first for `impl="auto"`, process-wide.

    `sa.prefer("name")` lasts; `with sa.prefer("name"): ...` is undone at the end; `sa.prefer()`
    clears.

    Raises:
        InvalidInputError: no registered mechanism has an implementation of that name.
    """

    def __init__(self, *names: str) -> None:
        global _preferred
        known = _implementation_names()
        for name in names:
            if name not in known:
                raise InvalidInputError(
                    f"no implementation is named {name!r:.80}; expected one of "
                    f"{', '.join(sorted(known))}.{did_you_mean(str(name), known)}"
                )
        with _lock:
            self._before = _preferred
            _preferred = names

    def __enter__(self) -> prefer:
        return self

    def __exit__(self, *_: object) -> None:
        global _preferred
        with _lock:
            _preferred = self._before


def _implementation_names() -> set[str]:
    state = _ready()
    names = {"reference"}
    for found in state.implementations.values():
        names |= {impl.name for impl, _ in found}
    for entry in state.entries.values():
        try:
            names |= {impl.name for impl in specs.build(entry.cls, {}).implementations()}
        except Exception:  # it needs options: its engine's names come from the others
            continue
    return names


def preferred() -> tuple[str, ...]:
    """The implementation names that `prefer` put first."""
    return _preferred


def reset() -> None:
    """Forget everything, so that the next use discovers again: for tests."""
    global _state, _preferred
    with _lock:
        _state, _preferred = _State(), ()
        intern.set_resolver(mechanism, _holds)


def _holds(mech: Mechanism) -> bool:
    """Whether a spec alone rebuilds this mechanism: a registered class, and literal options."""
    entry = _ready().entries.get(mech.name)
    if entry is None or entry.cls is not type(mech):
        return False
    try:
        name, options = specs.parse(repr(mech))
        return name == mech.name and specs.build(entry.cls, options) == mech
    except Exception:  # an option that is no literal shows its digest, which does not parse
        return False


intern.set_resolver(mechanism, _holds)
