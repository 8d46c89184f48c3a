"""The registry: names to mechanisms, discovered once, at first use, under a lock."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import admission, discovery, specs
from .base import Mechanism
from .claims import (
    Claim,
    Claims,
    State,
    own_implementations,
    publish,
    rival,
    settle,
    way_out,
    winner_of,
)
from .discovery import PluginRecord, Staged
from .engines import intern
from .errors import (
    InvalidInputError,
    PluginError,
    UnknownMechanismError,
    UnknownOptionError,
    did_you_mean,
)
from .implementation import Implementation
from .preference import Preference
from .preference import preferred as preferred

# Seconds to wait for another thread's discovery. It may be waiting for this thread in turn, where
# this one is in the middle of importing a plugin: an error frees both, patience would free neither.
_PATIENCE = 120.0


@dataclass(frozen=True)
class Option:
    """An option of a mechanism: its type in words, its default, and whether it must be given."""

    type: str
    default: Any
    required: bool


@dataclass(frozen=True)
class MechanismRecord:
    """A registered mechanism, as `list_mechanisms` reports it.

    Attributes:
        provider: the distribution, or what `register_mechanism` was told.
        summary: the first paragraph of the class's docstring, in one line.
        options: by name, in the class's order.
    """

    name: str
    nature: str
    provider: str
    summary: str
    options: dict[str, Option]
    looks_ahead: bool
    source: str


_lock = threading.RLock()
_state = State()
_loading: Staged | None = None  # the plugin being loaded, by the thread that holds the lock


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    if not _lock.acquire(timeout=_PATIENCE):
        raise PluginError(
            f"another thread has been loading plugins for {_PATIENCE:.0f} seconds, and perhaps "
            "waits for this one; do not use the registry while a plugin's module is imported"
        )
    try:
        yield
    finally:
        _lock.release()


def _ready() -> State:
    """The registry, with every plugin discovered.

    A plugin that uses it while it is being loaded itself sees the plugins before it, the built-in
    ones first.
    """
    if not _state.discovered:
        _discover()
    return _state


@intern.constant  # a compiled call may be the first: not for tracing
def _discover() -> bool:
    global _state, _loading
    unknown: list[PluginRecord] = []
    with _locked():
        if _state.discovered or _loading is not None:
            return True
        state = _state = State()
        try:
            setting = discovery.Setting()
            found = discovery.find()
            for one in found:
                record = PluginRecord(one.point.name, one.distribution, one.version)
                state.records.append(record)
                reason = setting.blocks(one)
                if reason:
                    record.status, record.reason = "blocked", reason
                    continue
                _loading = Staged(record)
                discovery.load(one, _loading)
                publish(state, _loading)
            unknown = setting.unknown({one.point.name for one in found})
            state.records += unknown
            with discovery.quiet():
                settle(state)
            state.discovered = True
        finally:
            _loading = None  # interrupted, the next use begins again, with nothing
    for record in unknown:
        warnings.warn(record.reason, stacklevel=2)
    return True


def lookup(name: str) -> type[Mechanism]:
    """The class registered under a name.

    Raises:
        UnknownMechanismError: none is; it suggests the nearest names, and says which plugins are
            broken, blocked or contest the name.
    """
    state = _ready()
    claims = state.mechanisms.get(name, [])
    winner = winner_of(claims)
    if winner is not None:
        return winner.value
    if claims:
        assert claims[0].record is not None
        raise UnknownMechanismError(
            f"the mechanism name {name!r} is registered by {' and '.join(map(rival, claims))}, so "
            f"none has it; {way_out(claims[0].record)}"
        )
    known = sorted(n for n, c in state.mechanisms.items() if winner_of(c) is not None)
    near = did_you_mean(str(name).lower().replace("-", "_"), known)
    reasons = [f"no mechanism is named {name!r:.80}.{near}"]
    absent = [r for r in state.records if r.status != "loaded"]
    # A plugin often bears the name of what it provides: the likeliest first.
    absent.sort(key=lambda r: not did_you_mean(str(name), [r.name]))
    hint = ""
    if absent:
        listed = ", ".join(f"{r.name!r} ({r.status})" for r in absent)
        hint = f" Plugins not loaded: {listed}; see `sparseattn doctor`."
        reasons += [f"plugin {r.name!r} is {r.status}: {r.reason}" for r in absent]
    if not state.records:
        hint = " No plugin is installed, not even the built-in ones: install sparseattn."
    unfit = not isinstance(name, str) or not specs.NAME.fullmatch(name)
    kind = specs.MisnamedError if unfit else UnknownMechanismError
    raise kind(f"{reasons[0]}{hint} Registered: {', '.join(known) or 'none'}.", reasons)


def mechanism(mechanism: str | Mechanism, /, **options: Any) -> Mechanism:
    """A mechanism by name and options, or by spec: `mechanism("windowed", window=256)`.

    An instance comes back as it is. Its `repr` is its spec.

    Raises:
        UnknownMechanismError: no mechanism has that name.
        UnknownOptionError: an option is unknown or ill-typed, or stands beside an instance or
            beside a spec that has its own.
        InvalidInputError: the spec is malformed, or the mechanism refuses a value.
    """
    if isinstance(mechanism, Mechanism):
        if options:
            raise UnknownOptionError(
                f"options {', '.join(sorted(options))} were given beside the instance "
                f"{mechanism!r}; make one that has them: dataclasses.replace(mechanism, ...)"
            )
        return mechanism
    if isinstance(mechanism, type) and issubclass(mechanism, Mechanism):
        raise InvalidInputError(
            f"got the class {mechanism.__name__}; call it: {mechanism.__name__}(...)"
        )
    name, given = specs.split(mechanism)
    cls = lookup(name)
    if given and options:
        raise UnknownOptionError(
            f"options {', '.join(sorted(options))} were given beside the spec {mechanism!r:.80}, "
            "which has its own; put them all in one place"
        )
    return specs.build(cls, given or options)


def list_mechanisms() -> list[MechanismRecord]:
    """Every registered mechanism, sorted by name."""
    held = [(name, winner_of(claims)) for name, claims in sorted(_ready().mechanisms.items())]
    return [_describe(claim.value, claim.provider) for _, claim in held if claim is not None]


def _describe(cls: type[Mechanism], provider: str) -> MechanismRecord:
    kinds = specs.option_types(cls)
    options = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = f.default is f.default_factory is dataclasses.MISSING
        default = None if f.default is dataclasses.MISSING else f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        options[f.name] = Option(specs.type_name(kinds[f.name]), default, required)
    doc = (cls.__dict__.get("__doc__") or "").strip()
    # A dataclass without a docstring gets its signature for one, which says nothing.
    first = "" if doc.startswith(f"{cls.__name__}(") else " ".join(doc.split("\n\n")[0].split())
    return MechanismRecord(
        cls.name, cls.nature, provider, first, options, cls.looks_ahead, cls.source
    )


def register_mechanism(cls: Any = None, /, *, provider: str | None = None) -> Any:
    """Register a mechanism's class from a script; usable as a decorator above `@dataclass`.

    A class that is defined again (a notebook cell run twice) replaces its former self.

    Args:
        provider: what `list_mechanisms` calls its source; by default the class's module.

    Raises:
        PluginError: the class would fail later, or the name is taken.
    """
    if cls is None:
        return lambda cls: register_mechanism(cls, provider=provider)
    _ready()
    with _locked():
        if _loading is not None:
            # In a plugin's module: it counts as the plugin's, and goes with it if that fails.
            return _loading.mechanism(cls)
        admission.admit_mechanism(cls)
        claims = _state.mechanisms.get(cls.name, [])
        for claim in claims:
            if claim.record is not None:
                raise PluginError(
                    f"mechanism class {cls.__qualname__}: the name {cls.name!r} is taken by the "
                    f"plugin {rival(claim)}; choose another"
                )
            held = claim.value
            if held is cls or _place(held) != _place(cls):
                raise PluginError(
                    f"mechanism class {cls.__qualname__}: the name {cls.name!r} is taken by "
                    f"{'itself: it is registered already' if held is cls else _place(held)}"
                )
        _state.mechanisms = {
            **_state.mechanisms,
            cls.name: [Claim(cls, provider or cls.__module__, None)],
        }
        # Instances that were interned as a stranger's now have a spec that rebuilds them.
        intern.set_resolver(mechanism, _holds)
    return cls


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def extra_implementations(mechanism: str | Mechanism) -> tuple[Implementation, ...]:
    """Implementations that plugins registered for a mechanism that another provides.

    Given an instance, none unless its class is the one that the registry holds: a stranger's class
    of the same name is another mechanism.
    """
    state = _ready()
    if isinstance(mechanism, str):
        return state.extra.get(mechanism, ())
    found = state.extra.get(mechanism.name, ())
    return found if found and _held(mechanism) else ()


def _implementation_names() -> set[str]:
    state = _ready()
    # These mean the same everywhere, whether or not this machine has them.
    names = {"reference", "torch", "native", "triton"}
    names |= {impl.name for found in state.extra.values() for impl in found}
    held = filter(None, map(winner_of, state.mechanisms.values()))
    return names.union(*(own_implementations(claim.value) for claim in held))


def prefer(*names: str) -> Preference:
    """Put implementations of these names first for `impl="auto"`, process-wide.

    `sa.prefer("name")` lasts; `with sa.prefer("name"): ...` is undone at the end, in whatever order
    several end; `.undo()` does it by hand. The latest one counts alone: `sa.prefer()` prefers
    nothing again. An implementation that does not support a call is passed over as ever.

    Raises:
        InvalidInputError: no registered mechanism has an implementation of that name.
    """
    known = _implementation_names()
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise InvalidInputError(
                f"no implementation is named {name!r:.80}; expected some of "
                f"{', '.join(sorted(known))}.{did_you_mean(str(name), known)}"
            )
    return Preference(names)


def _functions(claims: Claims) -> dict[str, Callable[..., Any]]:
    held = [(name, winner_of(rivals)) for name, rivals in sorted(claims.items())]
    return {name: claim.value for name, claim in held if claim is not None}


def inputs() -> dict[str, Callable[..., Any]]:
    """Harness inputs from plugins: name to `fn(length, seed, causal) -> (q, k, v)`.

    q `[B, Hq, length, D]`, k `[B, Hkv, length, D]` and v `[B, Hkv, length, Dv]` are float32 on the
    CPU, the same for the same arguments. The names of the harness's own inputs are refused.

    >>> def ramp(length, seed, causal):
    ...     '''One head whose keys grow with their position.'''
    ...     generator = torch.Generator().manual_seed(seed)
    ...     q, k, v = torch.randn(3, 1, 1, length, 16, generator=generator)
    ...     return q, k * torch.linspace(0, 1, length)[:, None], v
    >>> class Plugin:
    ...     @sparseattn.hookimpl
    ...     def register_inputs(self, register):
    ...         register("ramp", ramp)
    """
    return _functions(_ready().inputs)


def metrics() -> dict[str, Callable[..., Any]]:
    """Harness metrics from plugins: name to `fn(out, ref, call) -> float`.

    `out` and `ref` are float64 `[B, Hq, R, Dv]`: the mechanism's definition and exact attention, on
    the rows that the harness evaluates; `call` is the `AttentionCall` of those rows.

    >>> def mean_bias(out, ref, call):
    ...     '''How far the outputs lie to one side of exact attention.'''
    ...     return float((out - ref).mean())
    >>> class Plugin:
    ...     @sparseattn.hookimpl
    ...     def register_metrics(self, register):
    ...         register("mean_bias", mean_bias)
    """
    return _functions(_ready().metrics)


def diagnose() -> list[PluginRecord]:
    """What became of every entry point found: loaded, blocked or broken, and why."""
    return [dataclasses.replace(record) for record in _ready().records]


def _held(mech: Mechanism) -> bool:
    winner = winner_of(_ready().mechanisms.get(mech.name, []))
    return winner is not None and winner.value is type(mech)


def _holds(mech: Mechanism) -> bool:
    """Whether a spec alone rebuilds this mechanism: a registered class, and literal options."""
    if not _held(mech):
        return False
    try:
        name, options = specs.parse(repr(mech))
        return name == mech.name and specs.build(type(mech), options) == mech
    except Exception:  # an option that is no literal shows its digest, which does not parse
        return False


def reset() -> None:
    """Forget everything but preferences, so that the next use discovers again: for tests."""
    global _state
    with _locked():
        _state = State()
        intern.set_resolver(mechanism, _holds)


intern.set_resolver(mechanism, _holds)
