"""Interned keys: a mechanism travels through operators, compile and export as a string.

The key is the spec for a class that the registry holds, so that a loaded export can rebuild the
mechanism in another process. For any other class the key also names the class object itself, so
that two classes with one name never mix; such a key lives as long as the process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

_known: dict[str, Any] = {}
_keys: dict[Any, str] = {}
_resolver: Callable[[str], Any] | None = None
_holds: Callable[[Any], bool] | None = None

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which imports the compiler to set this same mark.

    That import takes a second, in every process that compiles nothing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def set_resolver(resolve: Callable[[str], Any], holds: Callable[[Any], bool]) -> None:
    """Give the registry's functions: `resolve(spec)` makes a mechanism that `holds` recognises.

    `holds(mechanism)` says whether its spec alone rebuilds it.
    """
    global _resolver, _holds
    _resolver, _holds = resolve, holds
    _keys.clear()


@constant
def key(mechanism: Any) -> str:
    """The string that stands for a mechanism in operator calls; a constant to traced code."""
    found = _keys.get(mechanism)
    if found is not None and type(_known[found]) is type(mechanism):
        return found
    spec = repr(mechanism)
    known = _known.get(spec)
    replaced = known is not None and type(known) is not type(mechanism)
    if _holds is None or replaced or not _holds(mechanism):
        cls = type(mechanism)
        spec = f"{cls.__module__}.{cls.__qualname__}@{id(cls):x}:{spec}#{hash(mechanism):x}"
    # Kept strongly: a backward pass may resolve the key long after the caller dropped the object.
    _known[spec] = mechanism
    _keys[mechanism] = spec
    return spec


def resolve(name: str) -> Any:
    """The mechanism behind a key; a spec never seen in this process is built by the registry."""
    found = _known.get(name)
    if found is None:
        if _resolver is None:
            # A loaded export may run before anything else of the package was used. The registry is
            # a higher floor, so it is reached by name, and only here.
            importlib.import_module("sparseattn.registry")
        assert _resolver is not None
        found = _known[name] = _resolver(name)
    return found
