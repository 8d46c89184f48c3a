"""The hooks that a plugin may implement, with `@sparseattn.hookimpl`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

PROJECT = "sparseattn"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_mechanisms(register: Callable[[type], None]) -> None:
    """Add mechanisms: call `register(Class)` for each frozen dataclass derived from `Mechanism`."""


@hookspec
def register_implementations(register: Callable[[str, Any], None]) -> None:
    """Add a faster path for any mechanism: call `register("windowed", implementation)`."""


@hookspec
def register_inputs(register: Callable[[str, Callable[..., Any]], None]) -> None:
    """Add inputs to the harness: `register(name, fn)`, `fn(length, seed, causal) -> (q, k, v)`."""


@hookspec
def register_metrics(register: Callable[[str, Callable[..., Any]], None]) -> None:
    """Add metrics to the harness: `register(name, fn)`, `fn(out, ref, call) -> float`."""
