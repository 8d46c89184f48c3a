"""What a plugin registers is checked once, in words, for all that would fail later."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Hashable
from typing import Any

from .base import NATURES, Implementation, KernelizedLinear, MaskedSoftmax, Mechanism
from .errors import PluginError
from .specs import NAME

CALL_KEYWORDS = frozenset(
    "q k v mechanism causal scale key_mask q_segments kv_segments q_offset softcap sink_logits bias "
    "cache impl return_lse".split()
)
RESERVED_IMPLEMENTATIONS = frozenset({"auto", "reference"})


def _refuse(cls: Any, problem: str, way_out: str) -> PluginError:
    name = getattr(cls, "__qualname__", repr(cls)[:80])
    return PluginError(f"mechanism class {name}: {problem}; {way_out}")


def _overrides(cls: type, base: type, method: str) -> bool:
    return getattr(cls, method) is not getattr(base, method)


def admit_mechanism(cls: Any) -> None:
    """Refuse a mechanism's class that would fail when it is used.

    Raises:
        PluginError: it says what is wrong and how to mend it.
    """
    if not isinstance(cls, type) or not issubclass(cls, Mechanism):
        kind = f"an instance of {type(cls).__name__}" if not isinstance(cls, type) else "a class"
        raise _refuse(
            cls, f"register got {kind} that is no Mechanism subclass", "register the class itself"
        )
    own_fields = "__dataclass_fields__" in cls.__dict__
    if not own_fields or not dataclasses.is_dataclass(cls):
        raise _refuse(cls, "it is no dataclass", "decorate it with @dataclass(frozen=True)")
    params = cls.__dataclass_params__  # type: ignore[attr-defined]
    if not params.frozen:
        raise _refuse(
            cls, "it is not frozen", "use @dataclass(frozen=True): options are its identity"
        )
    if not params.eq or cls.__hash__ is None or cls.__hash__ is object.__hash__:
        raise _refuse(cls, "it does not compare by its options", "leave eq on, and hash alone")
    _admit_name(cls)
    _admit_options(cls)
    _admit_maths(cls)


def _admit_name(cls: type[Mechanism]) -> None:
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for word in ("name", "nature", "source", "looks_ahead", "honours", "normalize"):
        if word in fields:
            raise _refuse(
                cls, f"{word!r} is annotated, which makes it an option", f"write `{word} = ...`"
            )
    if not isinstance(cls.name, str) or not NAME.fullmatch(cls.name):
        raise _refuse(cls, f"its name is {cls.name!r:.80}", "set name = '[a-z][a-z0-9_]{0,63}'")
    if cls.nature not in NATURES:
        raise _refuse(cls, f"its nature is {cls.nature!r:.80}", f"use one of {', '.join(NATURES)}")
    if not isinstance(cls.looks_ahead, bool):
        raise _refuse(cls, f"looks_ahead is {cls.looks_ahead!r:.80}", "set it to True or False")
    known = {"scale", "softcap", "sink_logits", "bias", "lse"}
    if not isinstance(cls.honours, (set, frozenset)) or not set(cls.honours) <= known:
        raise _refuse(cls, f"honours is {cls.honours!r:.80}", f"use a frozenset of {sorted(known)}")


def _admit_options(cls: type[Mechanism]) -> None:
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:  # a stranger's annotations may name anything
        raise _refuse(
            cls, f"its annotations cannot be read ({error})", "annotate options with real types"
        ) from error
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in CALL_KEYWORDS:
            raise _refuse(
                cls, f"option {field.name!r} is a keyword of attention()", "give it another name"
            )
        if not field.init:
            raise _refuse(
                cls, f"option {field.name!r} cannot be given (init=False)", "make it a property"
            )
        kind = hints[field.name]
        bare = typing.get_origin(kind) or kind
        if bare in (list, dict, set, bytearray):
            raise _refuse(
                cls, f"option {field.name!r} has the unhashable type {bare.__name__}", "use a tuple"
            )
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = field.default
        if default is not dataclasses.MISSING:
            try:
                hash(default)
            except TypeError:
                raise _refuse(
                    cls, f"the default of option {field.name!r} cannot be hashed", "use a tuple"
                ) from None
            if not isinstance(default, Hashable):
                raise _refuse(
                    cls, f"the default of option {field.name!r} cannot be hashed", "use a tuple"
                )


def _admit_maths(cls: type[Mechanism]) -> None:
    if issubclass(cls, MaskedSoftmax):
        dynamic = _overrides(cls, MaskedSoftmax, "select")
        static = _overrides(cls, MaskedSoftmax, "visible") or _overrides(
            cls, MaskedSoftmax, "visible_in"
        )
        if not dynamic and not static:
            raise _refuse(cls, "it has no definition", "give visible(i, j), or select(q, k, call)")
        if dynamic:
            fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
            block = getattr(cls, "block", None)
            if "block" not in fields and (not isinstance(block, int) or block < 1):
                raise _refuse(cls, "select names blocks of no size", "give `block`, keys a block")
    elif issubclass(cls, KernelizedLinear):
        if not _overrides(cls, KernelizedLinear, "feature_map"):
            raise _refuse(cls, "it has no feature map", "give feature_map(x, positions, call)")
    elif not _overrides(cls, Mechanism, "weights"):
        raise _refuse(cls, "it has no definition", "give weights(q, k, call) -> [B, Hq, N, M]")
    abstract = getattr(cls, "__abstractmethods__", None)
    if abstract:
        raise _refuse(cls, f"it leaves {', '.join(sorted(abstract))} abstract", "define them")


def admit_implementation(name: Any, implementation: Any) -> None:
    """Refuse an implementation that could not be called, or named.

    Raises:
        PluginError: it says what is wrong and how to mend it.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PluginError(f"register got the mechanism name {name!r:.80}; expected a name")
    if not isinstance(implementation, Implementation):
        raise PluginError(
            f"implementation of {name!r}: got {type(implementation).__name__}; register an instance "
            "of a subclass of sparseattn.Implementation"
        )
    own = implementation.name
    if not isinstance(own, str) or not NAME.fullmatch(own) or own in RESERVED_IMPLEMENTATIONS:
        raise PluginError(
            f"implementation of {name!r}: its name is {own!r:.80}; expected [a-z][a-z0-9_]{{0,63}}, "
            f"other than {' and '.join(sorted(RESERVED_IMPLEMENTATIONS))}"
        )
    if type(implementation).run is Implementation.run:
        raise PluginError(
            f"implementation {own!r} of {name!r} has no run(mechanism, q, k, v, call)"
        )


def admit_function(kind: str, name: Any, function: Any) -> None:
    """Refuse a harness input or metric that has no proper name, or cannot be called."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PluginError(f"{kind} name {name!r:.80}: expected [a-z][a-z0-9_]{{0,63}}")
    if not callable(function):
        raise PluginError(f"{kind} {name!r}: got {type(function).__name__}; expected a function")
