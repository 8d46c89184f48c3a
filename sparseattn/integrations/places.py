"""Which swap rules which attention module, now.

A swap puts a `Place` on each module that it covers and takes it away when it is restored. The
latest place of a module rules it, so swaps nest, and may be restored in any order.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from ..base import Mechanism
    from .swapping import Swap

# What attention code calls the states that keys come from where these are not the queries' own.
_OTHER_STATES = frozenset({"key_value_states", "encoder_hidden_states", "memory", "context"})
# Where transformers keeps what all its models share, and which attends to nothing itself.
_LIBRARY = ("transformers.modeling_utils", "transformers.generation.utils")
_lock = threading.RLock()


class Now(threading.local):
    """Of a module's forward in this thread: whether it has yet to attend, whether that is to
    another sequence, and the layer of `make_cache` that was given its new keys."""

    awaited = False
    crosses = False
    layer: Any = None


@dataclass(eq=False)
class Place:
    """A swap's hold on one module, and what it counted there."""

    swap: Swap
    name: str
    calls: int = 0
    fallbacks: int = 0
    served: bool = False  # by a mechanism that the swap chose
    impl: str | None = None
    mechanism: object = ""  # its spec is written where a report asks for it
    reason: str = ""
    now: Now = field(default_factory=Now)

    def count(self, mechanism: Mechanism, impl: str) -> None:
        """A call that a mechanism served."""
        with _lock:
            self.calls += 1
            self.served = True
            self.mechanism, self.impl = mechanism, impl

    def count_exact(self, impl: str) -> None:
        """A call of cross-attention that the model's original attention served."""
        with _lock:
            self.calls += 1
            self.mechanism, self.impl = "full", impl
            self.reason = "cross-attention stays exact"

    def count_fallback(self, mechanism: Mechanism, impl: str, reasons: list[str]) -> None:
        """A call that the original attention served, for the mechanism refused it."""
        with _lock:
            self.calls += 1
            self.fallbacks += 1
            self.mechanism, self.impl, self.reason = mechanism, impl, "; ".join(reasons)


# Sees a module's forwards from now on, and returns what ends that.
Watch = Callable[[nn.Module], Callable[[nn.Module], None]]


class _Held(NamedTuple):
    """A module's places, the latest last, and what ends the watch on its forwards."""

    places: list[Place]
    unwatch: Callable[[nn.Module], None]


_modules: weakref.WeakKeyDictionary[nn.Module, _Held] = weakref.WeakKeyDictionary()


def put(module: nn.Module, place: Place, watch: Watch) -> None:
    with _lock:
        held = _modules.get(module)
        if held is None:
            held = _modules[module] = _Held([], watch(module))
        held.places.append(place)


def take_away(place: Place, module: nn.Module) -> None:
    with _lock:
        held = _modules[module]
        held.places.remove(place)
        if not held.places:
            del _modules[module]
            held.unwatch(module)


def ruling(module: nn.Module) -> Place | None:
    """The place that rules a module, or None outside of every swap."""
    held = _modules.get(module)
    return held.places[-1] if held and held.places else None


def crosses(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a forward call attends to another sequence than its own."""
    kind = type(module)
    if vars(module).get("is_cross_attention") is True or "CrossAttention" in kind.__name__:
        return True
    if isinstance(module, nn.MultiheadAttention):
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        return given.get("key") is not given.get("query")
    if any(kwargs[word] is not None for word in _OTHER_STATES & kwargs.keys()):
        return True
    return bool(args) and any(at < len(args) and args[at] is not None for at in _positions(kind))


_known_positions: dict[type, tuple[int, ...]] = {}


def _positions(kind: type) -> tuple[int, ...]:
    """Where a class's forward takes other states, as positional arguments."""
    if kind not in _known_positions:
        try:
            names = list(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            names = []
        _known_positions[kind] = tuple(at for at, name in enumerate(names) if name in _OTHER_STATES)
    return _known_positions[kind]


@torch.compiler.disable
def _begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # A function of this module, so that a swapped model can be pickled; a copy is in no swap.
    place = ruling(module)
    if place is not None:
        now = place.now
        now.awaited, now.crosses, now.layer = True, crosses(module, args, kwargs), None


def watch_asking(module: nn.Module) -> Callable[[nn.Module], None]:
    """Note at each forward of a module what it is about; returns what ends that."""
    hook = module.register_forward_pre_hook(_begin, with_kwargs=True)
    return lambda _: hook.remove()


def code_names(kind: type) -> frozenset[str]:
    """Every global and attribute name in the methods that a class defines above `nn.Module`."""
    if kind not in _known_names:
        names: set[str] = set()
        for base in kind.__mro__:
            if base is nn.Module:
                break
            if base.__module__ in _LIBRARY:
                continue
            for value in vars(base).values():
                function = inspect.unwrap(value) if callable(value) else value
                code = getattr(function, "__code__", None)
                if code is not None:
                    names.update(code.co_names)
        _known_names[kind] = frozenset(names)
    return _known_names[kind]


_known_names: dict[type, frozenset[str]] = {}


def asks_transformers(module: nn.Module) -> bool:
    """Whether a module's class asks transformers for its attention function."""
    return "ALL_ATTENTION_FUNCTIONS" in code_names(type(module))


def eager_function(module: nn.Module) -> Any:
    """What transformers calls "eager": a function in the module's own file, or None."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def says_causal(module: nn.Module, words: Mapping[str, Any]) -> bool:
    """Where no mask says it: what a call, or else the module, says of itself, as transformers
    reads it."""
    said = words.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


class _Inside(threading.local):
    depth = 0


_inside = _Inside()


@contextlib.contextmanager
def inside() -> Iterator[None]:
    """While our own attention runs: torch's function is then torch's."""
    _inside.depth += 1
    try:
        yield
    finally:
        _inside.depth -= 1


def is_inside() -> bool:
    return _inside.depth > 0
