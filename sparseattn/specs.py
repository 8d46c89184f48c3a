"""Spec strings: `name` or `name(key=value, ...)` with literals, parsed by grammar, never evaluated."""

from __future__ import annotations

import ast
import dataclasses
import math
import operator
import re
import types
import typing
from typing import Any

from .errors import InvalidInputError, SparseAttnError, UnknownOptionError, did_you_mean

MAX_LENGTH = 1000
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*\(")


def _bad(spec: str, why: str) -> InvalidInputError:
    shown = spec if len(spec) <= 80 else spec[:77] + "..."
    return InvalidInputError(
        f"spec {shown!r}: {why}; expected name or name(key=value, ...) with literal values, such as "
        "'windowed(window=256, sinks=4)'"
    )


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Split a spec into its name and options.

    Values are ints, floats, strings, True, False, None, and tuples or lists of these (a list
    becomes a tuple, so that options stay hashable).

    Raises:
        InvalidInputError: the spec is malformed, or longer than 1,000 characters.
    """
    if not isinstance(spec, str):
        raise InvalidInputError(
            f"a mechanism is named by a string, got {type(spec).__name__}; pass a name, a spec or "
            "an instance from sparseattn.mechanism(...)"
        )
    if len(spec) > MAX_LENGTH:
        raise _bad(spec, f"has {len(spec)} characters, more than {MAX_LENGTH}")
    bare = spec.strip()
    if NAME.fullmatch(bare):
        return bare, {}
    if not _CALL.match(bare):
        raise _bad(spec, "is not a name ([a-z][a-z0-9_]{0,63})")
    try:
        tree = ast.parse(bare, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _bad(spec, "cannot be parsed") from None
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise _bad(spec, "is not one name with options")
    if not NAME.fullmatch(tree.func.id):
        raise _bad(spec, f"{tree.func.id[:80]!r} is not a name ([a-z][a-z0-9_]{{0,63}})")
    if tree.args:
        raise _bad(spec, "has a value without a key")
    options: dict[str, Any] = {}
    for keyword in tree.keywords:
        if keyword.arg is None:
            raise _bad(spec, "has ** where a key was expected")
        if keyword.arg in options:  # Python's own parser refuses this too
            raise _bad(spec, f"gives {keyword.arg!r} twice")
        options[keyword.arg] = _literal(spec, keyword.arg, keyword.value)
    return tree.func.id, options


def _literal(spec: str, key: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and (
        node.value is None or isinstance(node.value, (bool, int, float, str))
    ):
        return node.value
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_literal(spec, key, item) for item in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _literal(spec, key, node.operand)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    raise _bad(spec, f"the value of {key!r} is not a literal")


class _Mismatch(Exception):
    pass


def convert(value: Any, annotation: Any) -> Any:
    """`value` as the annotated type (1 becomes 1.0 for a float), or `_Mismatch`."""
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return value
    if origin is typing.Literal:
        for option in typing.get_args(annotation):
            if value == option and type(value) is type(option):
                return option
        raise _Mismatch
    if origin in (typing.Union, types.UnionType):
        for kind in typing.get_args(annotation):
            try:
                return convert(value, kind)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is tuple or annotation is tuple:
        return _convert_tuple(value, typing.get_args(annotation))
    if annotation is None or annotation is type(None):
        if value is None:
            return None
        raise _Mismatch
    if annotation is bool:
        if isinstance(value, bool):
            return value
        raise _Mismatch
    if annotation in (int, float):
        return _convert_number(value, annotation)
    kind = origin or annotation
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise _Mismatch


def _convert_number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or isinstance(value, str):
        raise _Mismatch
    if kind is int:
        try:
            return operator.index(value)
        except TypeError:
            raise _Mismatch from None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _Mismatch from None
    if not math.isfinite(number):
        raise _Mismatch
    return number


def _convert_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise _Mismatch
    if not kinds:
        return tuple(value)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(convert(item, kinds[0]) for item in value)
    if len(value) != len(kinds):
        raise _Mismatch
    return tuple(convert(item, kind) for item, kind in zip(value, kinds, strict=True))


def type_name(annotation: Any) -> str:
    """An annotation in the words of an error message: `int | tuple[int, int]`."""
    return (
        annotation.__name__ if type(annotation) is type else str(annotation).replace("typing.", "")
    )


def option_types(cls: type) -> dict[str, Any]:
    """The options of a mechanism's class and their types, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def build(cls: Any, options: dict[str, Any]) -> Any:
    """An instance of a mechanism's class with checked options.

    Raises:
        UnknownOptionError: an option is unknown, ill-typed or missing; lists the valid ones.
        InvalidInputError: the class refuses a value.
    """
    known = option_types(cls)
    valid = ", ".join(f"{n}: {type_name(t)}" for n, t in known.items()) or "none"
    checked: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise UnknownOptionError(
                f"{cls.name!r} has no option {name!r:.80}; valid options: {valid}."
                f"{did_you_mean(name, known)}"
            )
        try:
            checked[name] = convert(value, known[name])
        except _Mismatch:
            raise UnknownOptionError(
                f"option {name!r} of {cls.name!r} got {value!r:.80} ({type(value).__name__}); "
                f"expected {type_name(known[name])}. Valid options: {valid}"
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
            f"{cls.name!r} needs the option {', '.join(map(repr, missing))}; valid options: {valid}"
        )
    try:
        return cls(**checked)
    except SparseAttnError:
        raise
    except Exception as error:  # a stranger's __post_init__ may raise anything
        raise InvalidInputError(
            f"{cls.name!r} refuses its options: {type(error).__name__}: {error}"
        ) from error
