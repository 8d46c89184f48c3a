"""Spec strings: `name` or `name(key=value, ...)`, parsed by grammar, never evaluated."""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import numbers
import re
import types
import typing
from typing import Any

import numpy as np

from .errors import (
    InvalidInputError,
    SparseAttnError,
    UnknownMechanismError,
    UnknownOptionError,
    did_you_mean,
)

MAX_LENGTH = 1000
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MAX_DEPTH = 16
# What someone may write who means a name: answered with the nearest names, not with the grammar.
_WORD = re.compile(r"[A-Za-z0-9_.\-]+")
_HEAD = re.compile(rf"({_WORD.pattern})\s*\(")
# Every token that a spec may hold. Python's parser sees nothing else: no comment, operator, call,
# attribute, f-string or escape that `repr` of a string would not write.
_ESCAPE = r"""\\[\\'"nrt] | \\x[\da-fA-F]{2} | \\u[\da-fA-F]{4} | \\U[\da-fA-F]{8}"""
_TOKEN = re.compile(
    r"""\s+
    | [A-Za-z_][A-Za-z0-9_]* (?!["'])
    | [+-]? \s* (?: [0-9]+ (?:_[0-9]+)* \.? [0-9]* | \.[0-9]+ ) (?: [eE][+-]?[0-9]+ )? (?![\w.])
    | (?: '(?: [^'\\\n] | ESCAPE )*' | "(?: [^"\\\n] | ESCAPE )*"
      ) (?! \s* ["'])
    | [()\[\],=]""".replace("ESCAPE", _ESCAPE),
    re.VERBOSE | re.ASCII,
)


class MisnamedError(UnknownMechanismError, InvalidInputError):
    """A word stands where a name should, but no mechanism can bear it."""


def _bad(spec: str, why: str) -> InvalidInputError:
    shown = spec if len(spec) <= 80 else spec[:77] + "..."
    return InvalidInputError(
        f"spec {shown!r}: {why}; expected name or name(key=value, ...) with literal values, as in "
        "'windowed(window=256, sinks=4)'"
    )


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Split a spec into its name and options.

    Values are ints, floats, strings, True, False, None, and tuples or lists of these (a list
    becomes a tuple, so that options stay hashable).

    Raises:
        InvalidInputError: the spec is malformed, or longer than 1,000 characters.
        MisnamedError: an InvalidInputError and an UnknownMechanismError: it is well-formed but for
            its name, which does not match `[a-z][a-z0-9_]{0,63}`.
    """
    name, options = split(spec)
    if not NAME.fullmatch(name):
        raise MisnamedError(
            f"{name!r:.80} is no name of a mechanism; names match [a-z][a-z0-9_]{{0,63}}"
        )
    return name, options


def split(spec: str) -> tuple[str, dict[str, Any]]:
    """`parse`, with any word for a name, so that the registry can suggest near names."""
    if not isinstance(spec, str):
        raise InvalidInputError(
            f"a mechanism is named by a string, got {type(spec).__name__}; pass a name, a spec or "
            "an instance from sparseattn.mechanism(...)"
        )
    name, items = _split(spec)
    return name, dict(items)


@functools.lru_cache(maxsize=512)
def _split(spec: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    if len(spec) > MAX_LENGTH:
        raise _bad(spec, f"has {len(spec)} characters, more than {MAX_LENGTH}")
    bare = spec.strip()
    if _WORD.fullmatch(bare):
        return bare, ()
    head = _HEAD.match(bare)
    if head is None:
        raise _bad(spec, "does not begin with a name" if bare else "is empty")
    arguments = bare[head.end() - 1 :]
    _check_tokens(spec, arguments)
    try:
        # The head is replaced, so that a mechanism may bear the name of a Python keyword.
        tree = ast.parse(f"f{arguments}", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _bad(spec, "its options cannot be parsed") from None
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise _bad(spec, "goes on after its options")
    if tree.args:
        raise _bad(spec, "has a value without a key; write key=value")
    options: dict[str, Any] = {}
    for keyword in tree.keywords:
        assert keyword.arg is not None  # `**` is no token
        if keyword.arg in options:
            raise _bad(spec, f"gives {keyword.arg!r} twice")
        options[keyword.arg] = _literal(spec, keyword.arg, keyword.value)
    return head[1], tuple(options.items())


def _check_tokens(spec: str, text: str) -> None:
    at = depth = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise _bad(spec, f"{text[at : at + 20]!r} cannot stand in a spec")
        depth += (token[0] in "([") - (token[0] in ")]")
        if depth > _MAX_DEPTH:
            raise _bad(spec, f"is nested more than {_MAX_DEPTH} deep")
        at = token.end()


def _literal(spec: str, key: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and (
        node.value is None or isinstance(node.value, (bool, int, float, str))
    ):
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise _bad(spec, f"the value of {key!r} is too large for a float")
        return node.value
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_literal(spec, key, item) for item in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _literal(spec, key, node.operand)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    raise _bad(spec, f"the value of {key!r} is not a literal; strings need quotes")


class Mismatch(Exception):
    """A value is not of an option's type."""


def convert(value: Any, annotation: Any) -> Any:
    """`value` as the annotated type; numpy scalars and lists become Python's and tuples.

    Options that are equal must make mechanisms that are equal and print alike, so 1 becomes 1.0 for
    a float, and a bool is never taken for a number.

    Raises:
        Mismatch: it is not of that type.
    """
    value = _plain(value)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        for option in args:
            if type(value) is type(option) and value == option:
                return option
        raise Mismatch
    if origin in (typing.Union, types.UnionType):
        # The member that is the value's own type first: 1 stays an int for `float | int`.
        for kind in sorted(args, key=lambda kind: kind is not type(value)):
            try:
                return convert(value, kind)
            except Mismatch:
                continue
        raise Mismatch
    if origin is tuple or annotation is tuple:
        return _convert_tuple(value, args)
    if annotation is None or annotation is type(None):
        if value is None:
            return None
        raise Mismatch
    if annotation is int:
        # Positions, counts and seeds: nothing in a kernel is wider.
        if _is(value, numbers.Integral) and -(2**63) <= value < 2**64:
            return int(value)
        raise Mismatch
    if annotation is float:
        return _convert_float(value)
    if annotation is str and isinstance(value, str):
        return str(value)
    kind = origin or annotation
    if isinstance(kind, type) and _is(value, kind):
        return value
    raise Mismatch


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is list:
        return tuple(_plain(item) for item in value)
    return value


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind)


def _convert_float(value: Any) -> float:
    if not _is(value, numbers.Real):
        raise Mismatch
    try:
        number = float(value)
    except (OverflowError, ValueError, TypeError):
        raise Mismatch from None
    if not math.isfinite(number):
        raise Mismatch
    return number + 0.0  # -0.0 equals 0.0, and must print like it


def _convert_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise Mismatch
    if not kinds:
        try:
            hash(value)
        except TypeError:
            raise Mismatch from None
        return tuple(value)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(convert(item, kinds[0]) for item in value)
    if len(value) != len(kinds):
        raise Mismatch
    return tuple(convert(item, kind) for item, kind in zip(value, kinds, strict=True))


def type_name(annotation: Any) -> str:
    """An annotation in the words of an error message: `int | tuple[int, int]`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "None"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(kind) for kind in args)
    if origin is typing.Literal:
        return " | ".join(map(repr, args))
    if isinstance(annotation, type) and origin is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "")


@functools.lru_cache(maxsize=512)
def _option_types(cls: type) -> dict[str, Any]:
    # Resolving annotations takes a hundred times as long as making the instance.
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    return {field.name: hints[field.name] for field in fields if field.init}


def option_types(cls: type) -> dict[str, Any]:
    """The options of a mechanism's class and their types, in order."""
    return dict(_option_types(cls))


def _valid(known: dict[str, Any]) -> str:
    listed = ", ".join(f"{n}: {type_name(t)}" for n, t in known.items())
    return f"valid options: {listed}" if listed else "it takes no options"


def build(cls: Any, options: dict[str, Any]) -> Any:
    """An instance of a mechanism's class with checked options.

    Raises:
        UnknownOptionError: an option is unknown, ill-typed or missing; lists the valid ones.
        InvalidInputError: the class refuses a value.
    """
    known = _option_types(cls)
    checked: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise UnknownOptionError(
                f"{cls.name!r} has no option {name!r:.80}.{did_you_mean(name, known)} "
                f"{cls.name!r}: {_valid(known)}"
            )
        try:
            checked[name] = convert(value, known[name])
        except Mismatch:
            raise UnknownOptionError(
                f"option {name!r} of {cls.name!r} got {_shown(value)}; expected "
                f"{type_name(known[name])}{_limit(value)}; {_valid(known)}"
            ) from None
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init
        and f.name not in checked
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UnknownOptionError(
            f"{cls.name!r} needs the option {', '.join(map(repr, missing))}; {_valid(known)}"
        )
    try:
        return cls(**checked)
    except SparseAttnError:
        raise
    except Exception as error:  # a stranger's __post_init__ may raise anything
        raise InvalidInputError(
            f"{cls.name!r} refuses its options: {type(error).__name__}: {error}"
        ) from error


def _limit(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return ", finite"
    return " of 64 bits" if isinstance(value, int) and abs(value) >= 2**63 else ""


def _shown(value: Any) -> str:
    try:
        text = f"{value!r:.80}"
    except Exception:  # an int of thousands of digits, or a stranger's __repr__
        text = "a value that cannot be printed"
    return f"{text} ({type(value).__name__})"
