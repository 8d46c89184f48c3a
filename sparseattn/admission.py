"""What a plugin registers is checked once, in words, for all that would fail later."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Any

from torch import Tensor

from . import specs
from .base import (
    NATURES,
    KernelizedLinear,
    MaskedSoftmax,
    Mechanism,
    format_spec,
)
from .errors import PluginError
from .implementation import Implementation
from .specs import NAME

# The parameters of attention(), which takes options beside them; it lives on a higher floor.
CALL_KEYWORDS = (
    *("q", "k", "v", "mechanism", "causal", "scale", "key_mask", "q_segments", "kv_segments"),
    *("q_offset", "softcap", "sink_logits", "bias", "cache", "impl", "return_lse"),
)
RESERVED_IMPLEMENTATIONS = frozenset({"auto", "reference"})
# The harness's own inputs: a plugin's would never be reached under these names.
RESERVED_INPUTS = frozenset({"gaussian", "clustered", "needle", "sink_heavy", "recorded"})
_CLASS_WORDS = ("name", "nature", "source", "looks_ahead", "honours", "normalize")
_HONOURED = frozenset({"scale", "softcap", "sink_logits", "bias", "lse"})


def _refuse(cls: Any, problem: str, way_out: str) -> PluginError:
    name = f"{cls.__qualname__:.80}" if isinstance(cls, type) else f"{cls!r:.80}"
    return PluginError(f"mechanism class {name}: {problem}; {way_out}")


def _overrides(cls: type, base: type, method: str) -> bool:
    return getattr(cls, method) is not getattr(base, method)


def admit_mechanism(cls: Any) -> None:
    """Refuse a mechanism's class that would fail when it is used.

    Raises:
        PluginError: it says what is wrong and how to mend it.
    """
    if not isinstance(cls, type):
        came = f"register got an instance of {type(cls).__name__}"
        raise _refuse(cls, came, "register the class itself")
    if not issubclass(cls, Mechanism):
        way_out = "derive from MaskedSoftmax, KernelizedLinear or Mechanism of sparseattn"
        raise _refuse(cls, "it is no Mechanism", way_out)
    if "__dataclass_fields__" not in cls.__dict__:
        raise _refuse(cls, "it is no dataclass", "decorate it with @dataclass(frozen=True)")
    params = cls.__dataclass_params__  # type: ignore[attr-defined]
    if not params.frozen:
        way_out = "use @dataclass(frozen=True): options are its identity"
        raise _refuse(cls, "it is not frozen", way_out)
    if not params.eq or cls.__hash__ is None or cls.__hash__ is object.__hash__:
        raise _refuse(cls, "it does not compare by its options", "leave eq on, and hash alone")
    if cls.__repr__ is not format_spec:
        raise _refuse(cls, "its repr is not its spec", "delete its __repr__")
    _admit_class_words(cls)
    _admit_options(cls)
    _admit_maths(cls)


def _admit_class_words(cls: type[Mechanism]) -> None:
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for word in _CLASS_WORDS:
        if word in fields:
            problem = f"{word!r} is annotated, which makes it an option"
            raise _refuse(cls, problem, f"write `{word} = ...`")
    if type(cls.name) is not str or not NAME.fullmatch(cls.name):
        came = f"its name is {cls.name!r:.80}" if cls.name != "" else "it has no name"
        raise _refuse(cls, came, "set name = '...', of the form [a-z][a-z0-9_]{0,63}")
    if type(cls.nature) is not str or cls.nature not in NATURES:
        raise _refuse(cls, f"its nature is {cls.nature!r:.80}", f"use one of {', '.join(NATURES)}")
    if not isinstance(cls.looks_ahead, bool):
        raise _refuse(cls, f"looks_ahead is {cls.looks_ahead!r:.80}", "set it to True or False")
    if not isinstance(cls.source, str):
        raise _refuse(cls, f"source is {cls.source!r:.80}", "set it to the paper, as a string")
    honours = cls.honours
    if not isinstance(honours, (set, frozenset)) or not honours <= _HONOURED:
        way_out = f"use a frozenset of some of {', '.join(sorted(_HONOURED))}"
        raise _refuse(cls, f"honours is {honours!r:.80}", way_out)


def _admit_options(cls: type[Mechanism]) -> None:
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:  # a stranger's annotations may name anything
        problem = f"its annotations cannot be read ({type(error).__name__}: {error})"
        raise _refuse(cls, problem, "annotate options with types that exist at run time") from error
    given = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in cls.__dict__["__dataclass_fields__"]:
        # What a dataclass lists beside its fields is a ClassVar or an InitVar.
        if name not in given and not _is_class_var(hints.get(name)):
            problem = f"option {name!r} is an InitVar, which is no part of the mechanism's identity"
            raise _refuse(cls, problem, "make it a field")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        problem, way_out = _fault(cls, field, hints[field.name])
        if problem:
            raise _refuse(cls, f"option {field.name!r} {problem}", way_out)


def _is_class_var(kind: Any) -> bool:
    return kind is typing.ClassVar or typing.get_origin(kind) is typing.ClassVar


def _fault(cls: type[Mechanism], field: dataclasses.Field[Any], kind: Any) -> tuple[str, str]:
    """What is wrong with an option, and the way out; empty when nothing is."""
    if field.name in CALL_KEYWORDS:
        return "is a keyword of attention()", "give it another name"
    if _hides(cls, field.name):
        return "bears the name of a method", "give it another name"
    if not field.init:
        return "cannot be given (init=False)", "make it a property"
    if not field.compare or field.hash is False:
        return "is left out of comparison", "drop compare=False and hash=False"
    trouble = _untypable(kind)
    if trouble:
        return f"has the type {specs.type_name(kind)}: {trouble}", "use a literal's or a class"
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        default = field.default
    else:
        return "", ""
    try:
        hash(default)
    except TypeError:
        return f"has the unhashable default {default!r:.80}", "use a tuple"
    try:
        specs.convert(default, kind)
    except specs.Mismatch:
        return f"has the default {default!r:.80}, no {specs.type_name(kind)}", "mend either"
    return "", ""


def _hides(cls: type[Mechanism], name: str) -> bool:
    """Whether an option would stand where the core calls a method."""
    for base in cls.__mro__:
        if base.__module__ != Mechanism.__module__:
            continue
        method = base.__dict__.get(name)
        if isinstance(method, (types.FunctionType, property)):
            # A list of blocks is an option `layout`: then the engine must be given `clauses`.
            return not (name == "layout" and _overrides(cls, MaskedSoftmax, "clauses"))
    return False


def _untypable(kind: Any) -> str:
    """Why values of a type cannot be checked, or cannot be an identity; empty when they can."""
    if kind in (Any, object) or isinstance(kind, (typing.TypeVar, str)):
        return "it says nothing"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal or kind is None or kind is type(None):
        return ""
    if origin in (typing.Union, types.UnionType) or origin is tuple:
        return next((t for t in (_untypable(x) for x in args if x is not Ellipsis) if t), "")
    bare = origin or kind
    if not isinstance(bare, type):
        return "values cannot be checked against it"
    if bare is Tensor or bare.__hash__ is None:
        return "it is unhashable"
    try:
        isinstance(None, bare)
    except TypeError:
        return "values cannot be checked against it"
    return ""


def _admit_maths(cls: type[Mechanism]) -> None:
    if issubclass(cls, MaskedSoftmax):
        dynamic = _overrides(cls, MaskedSoftmax, "select")
        visible = any(_overrides(cls, MaskedSoftmax, x) for x in ("visible", "visible_in"))
        if not dynamic and not visible:
            raise _refuse(cls, "it has no definition", "give visible(i, j), or select(q, k, call)")
        if dynamic and not _has_block(cls):
            raise _refuse(cls, "select names blocks of no size", "give `block`, keys a block")
    elif issubclass(cls, KernelizedLinear):
        if not _overrides(cls, KernelizedLinear, "feature_map"):
            raise _refuse(cls, "it has no feature map", "give feature_map(x, positions, call)")
        if type(cls.normalize) is not bool:
            raise _refuse(cls, f"normalize is {cls.normalize!r:.80}", "set it to True or False")
    elif not _overrides(cls, Mechanism, "weights"):
        raise _refuse(cls, "it has no definition", "give weights(q, k, call) -> [B, Hq, N, M]")
    abstract = getattr(cls, "__abstractmethods__", None)
    if abstract:
        raise _refuse(cls, f"it leaves {', '.join(sorted(abstract))} abstract", "define them")


def _has_block(cls: type[Mechanism]) -> bool:
    if any(f.name == "block" for f in dataclasses.fields(cls)):  # type: ignore[arg-type]
        return True
    block = inspect.getattr_static(cls, "block", None)
    return isinstance(block, property) or (type(block) is int and block > 0)


def admit_implementation(name: Any, implementation: Any) -> str:
    """Refuse an implementation that could not be called, or named.

    Returns:
        its own name.

    Raises:
        PluginError: it says what is wrong and how to mend it.
    """
    if type(name) is not str or not NAME.fullmatch(name):
        raise PluginError(
            f"register got the mechanism name {name!r:.80}; expected "
            'register("windowed", implementation), the name of a mechanism first'
        )
    if not isinstance(implementation, Implementation):
        what = implementation if isinstance(implementation, type) else type(implementation)
        way_out = (
            f"register an instance, {what.__name__}(...)"
            if issubclass(what, Implementation)
            else "register an instance of a subclass of sparseattn.Implementation"
        )
        raise PluginError(f"implementation of {name!r}: got {implementation!r:.80}; {way_out}")
    own = implementation.name
    if type(own) is not str or not NAME.fullmatch(own) or own in RESERVED_IMPLEMENTATIONS:
        raise PluginError(
            f"implementation of {name!r}: its name is {own!r:.80}; expected "
            f"[a-z][a-z0-9_]{{0,63}}, not {' nor '.join(sorted(RESERVED_IMPLEMENTATIONS))}"
        )
    if type(implementation).run is Implementation.run:
        raise PluginError(
            f"implementation {own!r} of {name!r} has no run(mechanism, q, k, v, call)"
        )
    return own


# What the harness will call, by position.
_FUNCTIONS = {"input": ("length", "seed", "causal"), "metric": ("out", "ref", "call")}


def admit_function(kind: str, name: Any, function: Any) -> None:
    """Refuse a harness input or metric that has no proper name, or could not be called.

    Raises:
        PluginError: it says what is wrong and how to mend it.
    """
    if type(name) is not str or not NAME.fullmatch(name):
        raise PluginError(
            f"register got the {kind} name {name!r:.80}; expected [a-z][a-z0-9_]{{0,63}}"
        )
    if kind == "input" and name in RESERVED_INPUTS:
        raise PluginError(f"input {name!r}: the name is the harness's own; choose another")
    shape = f"{kind} {name!r} must be a function ({', '.join(_FUNCTIONS[kind])})"
    if not callable(function):
        raise PluginError(f"{shape}, got {function!r:.80}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # one written in C may not tell
        return
    try:
        signature.bind(*_FUNCTIONS[kind])
    except TypeError as error:
        raise PluginError(f"{shape}, called by position; it takes {signature}") from error
