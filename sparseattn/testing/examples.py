"""Mechanisms with options small enough for small cases to reach every part of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .. import registry, specs
from ..base import Mechanism
from ..call import AttentionCall
from ..errors import SparseAttnError
from ..layout import BlockLayout

# Longest case of the laws: what refuses such a length cannot be checked.
_LONGEST = 6000


def _serves(mechanism: Mechanism) -> bool:
    """Whether the mechanism serves the longest calls that the laws make."""
    x = torch.empty(1, 2, 1, 4)
    keys = torch.empty(1, 2, 1, 4).expand(1, 2, _LONGEST, 4)
    try:
        return not mechanism.refusals(AttentionCall.make(x, keys, keys, causal=True))
    except (
        Exception,
        SystemExit,
    ):  # a stranger's supports() may raise anything: the laws will report it
        return False


def _block_layout() -> BlockLayout:
    """Blocks of 4 near the query and a scattered one, for 600 positions; row 3 sees nothing."""
    rows = [[] if r == 3 else sorted({r, max(r - 1, 0), (r * 7) % (r + 1), 0}) for r in range(150)]
    indptr = [0]
    for row in rows:
        indptr.append(indptr[-1] + len(row))
    return BlockLayout(indptr, [c for row in rows for c in row], 4)


def _required(kind: Any) -> Any:
    """A value for an option that has no default, or None where its type does not suggest one."""
    text = specs.type_name(kind)
    if "BlockLayout" in text:
        return _block_layout()
    return {int: 5, float: 0.5, bool: True}.get(kind)


def default(name: str) -> Mechanism:
    """The mechanism of a name, with its defaults; options that have none get small values.

    Raises:
        UnknownMechanismError, UnknownOptionError: no such name, or an option with no guess.
    """
    return default_of(registry.lookup(name))


def default_of(cls: type[Mechanism]) -> Mechanism:
    """`default`, of a class, registered or not.

    Raises:
        UnknownOptionError: an option that has no default and no guess.
    """
    if not dataclasses.is_dataclass(cls):
        return cls()
    types = specs.option_types(cls)
    required = {
        f.name: _required(types[f.name])
        for f in dataclasses.fields(cls)
        if f.default is f.default_factory is dataclasses.MISSING
    }
    return specs.build(cls, {w: value for w, value in required.items() if value is not None})


def small(mechanism: Mechanism) -> Mechanism:
    """The mechanism with each large integer option made small, where it still serves.

    A window of 256 is all there is in a case of 65 tokens; a window of 5 is not.
    """
    if not dataclasses.is_dataclass(mechanism):
        return mechanism
    for at, field in enumerate(dataclasses.fields(mechanism)):  # type: ignore[arg-type]
        value = getattr(mechanism, field.name)
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if value == 0 and field.name in ("sinks", "sink"):
            sizes: tuple[int, ...] = (2,)
        elif value > 8:
            sizes = (4 + at % 3,)
        else:
            continue
        for size in sizes:
            try:
                changed = dataclasses.replace(mechanism, **{field.name: size})  # type: ignore[type-var]
            except SparseAttnError:
                continue
            if _serves(changed) or not _serves(mechanism):
                mechanism = changed
                break
    return mechanism


def examples(name: str) -> list[Mechanism]:
    """What stands for a registered name in the checks: small options first, then the defaults."""
    usual = default(name)
    found = small(usual)
    return [found] if found == usual else [found, usual]
