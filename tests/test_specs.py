"""Spec strings: what is read, what is refused, and that a mechanism's repr reads back."""

from __future__ import annotations

import ast
import contextlib
import math
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseattn as sa
from sparseattn import specs


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("full", "full", {}),
        (" full\n", "full", {}),
        ("full()", "full", {}),
        ("a(b=1)", "a", {"b": 1}),
        ("a ( b = 1 , )", "a", {"b": 1}),
        ("a\n(\tb=\n1)", "a", {"b": 1}),
        ("a(b=-1, c=+2, d=- 3)", "a", {"b": -1, "c": 2, "d": -3}),
        ("a(b=1_000, c=00)", "a", {"b": 1000, "c": 0}),
        ("a(b=1e3, c=-1.5E-2, d=.5, e=2.)", "a", {"b": 1e3, "c": -0.015, "d": 0.5, "e": 2.0}),
        ("a(b=True, c=False, d=None)", "a", {"b": True, "c": False, "d": None}),
        ("a(b=(1, 2), c=[1, [2, 'x']])", "a", {"b": (1, 2), "c": (1, (2, "x"))}),
        ("a(b=(), c=(1,), d=(1))", "a", {"b": (), "c": (1,), "d": 1}),
        ("a(b='x y', c=\"it's\")", "a", {"b": "x y", "c": "it's"}),
        (r"a(b='\'\\\n\xe9\u20ac')", "a", {"b": "'\\\né€"}),
        ("a(b='é ( , = #')", "a", {"b": "é ( , = #"}),
        ("lambda(b=1)", "lambda", {"b": 1}),
        ("x" + "y" * 63, "x" + "y" * 63, {}),
    ],
)
def test_what_is_read(spec, name, options):
    got = specs.parse(spec)
    assert got == (name, options)
    assert [type(v) for v in got[1].values()] == [type(v) for v in options.values()]


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "  ",
        "(",
        "a(",
        "a)",
        "a(b=1",
        "a(b=1))",
        "a(b=1) c",
        "a(b=1) # comment",
        "a(b=1)\n#",
        "a(b=1).c",
        "a(b=1)(c=1)",
        "a(b=1)[0]",
        "a(b=1); c",
        "(a)(b=1)",
        "a(1)",
        "a(b)",
        "a(*b)",
        "a(**{})",
        "a(b=1, b=2)",
        "a(b==1)",
        "a(b:=1)",
        "a(b=c)",
        "a(b=c())",
        "a(b=c.d)",
        "a(b=1+1)",
        "a(b=1-1)",
        "a(b=2**99)",
        "a(b=--1)",
        "a(b=~1)",
        "a(b=not 1)",
        "a(b=-True)",
        "a(b=-'x')",
        "a(b=1 if 1 else 1)",
        "a(b=[x for x in 'y'])",
        "a(b=lambda: 1)",
        "a(b={})",
        "a(b={1})",
        "a(b=...)",
        "a(b=1j)",
        "a(b=0x10)",
        "a(b=007)",
        "a(b=1__0)",
        "a(b=1e999)",
        "a(b=-1e999)",
        "a(b=inf)",
        "a(b=nan)",
        "a(b=b'x')",
        "a(b=f'x')",
        "a(b=r'x')",
        "a(b='x' 'y')",
        "a(b='''x''')",
        "a(b='x)",
        "a(b='\\d')",
        "a(b='\\N{DASH}')",
        "a(b='x\ny')",
        "a(b='\x00')",
        "a(b=(1, 2)",
        "a(class=1)",
        "a(None=1)",
        "a(1b=1)",
        "a(b=1, , c=2)",
        "a(\N{FULLWIDTH LATIN SMALL LETTER B}=1)",
        "\N{FULLWIDTH LATIN SMALL LETTER A}(b=1)",
        "__import__('os').system('x')",
        "a(b=__import__('os'))",
        "a(" + "(" * 900,
        "a(b=" + "[" * 400 + "]" * 400 + ")",
        "a(b=" + "-" * 900 + "1)",
        "a" + "(" * 990,
        "a(b='" + "x" * 1000 + "')",
        "x" * 1001,
    ],
)
def test_what_is_refused(spec):
    with pytest.raises(sa.InvalidInputError) as caught:
        specs.parse(spec)
    assert 0 < len(str(caught.value)) < 600


@pytest.mark.parametrize("spec", ["Full", "1a", "_a", "a-b", "a.b", "x" * 65, "A(b=1)", "a-b()"])
def test_a_word_that_can_be_no_name_is_both_malformed_and_unknown(spec):
    for kind in (sa.InvalidInputError, sa.UnknownMechanismError):
        with pytest.raises(kind, match="names match"):
            specs.parse(spec)


@pytest.mark.parametrize("spec", [None, 1, b"full", ["full"], torch.zeros(1)])
def test_a_spec_is_a_string(spec):
    with pytest.raises(sa.InvalidInputError, match="string"):
        specs.parse(spec)


def test_the_limit_is_a_thousand_characters():
    longest = "a(b='" + "x" * 993 + "')"
    assert len(longest) == 1000
    assert specs.parse(longest)[1] == {"b": "x" * 993}
    with pytest.raises(sa.InvalidInputError, match="1001 characters"):
        specs.parse(longest + " ")


def test_brackets_may_be_sixteen_deep():
    assert specs.parse("a(b=" + "[" * 15 + "]" * 15 + ")")[0] == "a"
    with pytest.raises(sa.InvalidInputError, match="more than 16 deep"):
        specs.parse("a(b=" + "[" * 16 + "]" * 16 + ")")


def test_options_read_are_the_callers_own():
    specs.parse("a(b=1)")[1]["b"] = 2
    assert specs.parse("a(b=1)")[1] == {"b": 1}


@pytest.mark.parametrize(
    "unit", ["\\u1234", "\\u12345678", "\\x12\\n", "'\"", "1_1", " + ", "(", "a", "\\", "''", "1e"]
)
def test_hostile_text_is_refused_at_once(unit):
    start = time.process_time()
    for head in ("a(b=", "a(b='", "a(", ""):
        text = (head + unit * 1000)[:1000]
        with contextlib.suppress(sa.InvalidInputError):
            specs.parse(text)
    # A pattern that backtracks takes minutes; reading a thousand characters, milliseconds.
    assert time.process_time() - start < 5


LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)


@given(st.dictionaries(st.from_regex(r"opt_[a-z0-9_]{0,8}", fullmatch=True), LITERALS, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_repr_writes_is_read_back(options):
    spec = f"name({', '.join(f'{k}={v!r}' for k, v in options.items())})"
    if len(spec) <= specs.MAX_LENGTH and all(depth(v) < 15 for v in options.values()):
        assert specs.parse(spec) == ("name", options)


def depth(value):
    return 1 + max(map(depth, value), default=0) if isinstance(value, tuple) else 0


@given(
    st.text(alphabet="ab(=,)[]'\"\\-+.1e_ #\n\x00é{}*:;@TrueNon", max_size=40)
    | st.text(max_size=40)
    | st.text(alphabet="ab=,()1'-. ", max_size=30).map(lambda s: f"a(b={s})")
)
@settings(max_examples=500, deadline=None)
def test_whatever_is_read_python_reads_the_same(text):
    try:
        name, options = specs.parse(text)
    except sa.InvalidInputError as error:
        assert len(str(error)) < 600
        return
    assert specs.NAME.fullmatch(name)
    if not options:
        return
    # The oracle: Python's own literals, of each value alone.
    call = ast.parse(f"f{text.strip()[len(name) :].lstrip()}", mode="eval").body
    assert isinstance(call, ast.Call) and not call.args
    truth = {k.arg: tupled(ast.literal_eval(k.value)) for k in call.keywords}
    assert repr(options) == repr(truth)


def tupled(value):
    return tuple(map(tupled, value)) if isinstance(value, (list, tuple)) else value


class Thing:
    """An option that is no literal."""


@dataclass(frozen=True)
class Sample(sa.MaskedSoftmax):
    name = "sample"
    count: int = 1
    ratio: float = 0.5
    flag: bool = False
    word: str = "x"
    maybe: int | None = None
    pair: tuple[int, int] = (1, 2)
    many: tuple[float, ...] = ()
    either: int | tuple[int, int] = 3
    number: float | int = 1
    choice: Literal["a", "b", 3] = "a"
    thing: Thing | None = None
    anyhow: tuple = ()

    def __post_init__(self):
        if self.count == 13:
            raise ZeroDivisionError("no luck")
        if self.count == 14:
            raise sa.UnsupportedCallError("not here")

    def visible(self, i, j):
        return i == j


@pytest.mark.parametrize(
    ("option", "value", "held"),
    [
        ("count", 2, 2),
        ("count", np.int64(2), 2),
        ("count", np.uint8(2), 2),
        ("count", 2**64 - 1, 2**64 - 1),
        ("count", -(2**63), -(2**63)),
        ("ratio", 1, 1.0),
        ("ratio", 1.5, 1.5),
        ("ratio", np.float32(0.5), 0.5),
        ("ratio", np.int16(2), 2.0),
        ("ratio", Fraction(1, 4), 0.25),
        ("ratio", -0.0, 0.0),
        ("flag", True, True),
        ("flag", np.bool_(True), True),
        ("word", "y", "y"),
        ("word", np.str_("y"), "y"),
        ("maybe", None, None),
        ("maybe", 3, 3),
        ("pair", (3, 4), (3, 4)),
        ("pair", [3, np.int32(4)], (3, 4)),
        ("many", (1, 2.5), (1.0, 2.5)),
        ("many", [], ()),
        ("either", 4, 4),
        ("either", [4, 5], (4, 5)),
        ("number", 2, 2),
        ("number", 2.0, 2.0),
        ("choice", "b", "b"),
        ("choice", 3, 3),
        ("anyhow", [1, [2, "x"]], (1, (2, "x"))),
    ],
)
def test_values_of_the_right_type(option, value, held):
    made = specs.build(Sample, {option: value})
    got = getattr(made, option)
    assert got == held and type(got) is type(held) and repr(got) == repr(held)
    assert hash(made) == hash(specs.build(Sample, {option: held}))
    name, options = specs.parse(repr(made))
    again = specs.build(Sample, options)
    assert name == "sample" and again == made and repr(again) == repr(made)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("count", True, "int"),
        ("count", np.bool_(True), "int"),
        ("count", 1.0, "int"),
        ("count", "1", "int"),
        ("count", None, "int"),
        ("count", 2**64, "int of 64 bits"),
        ("count", torch.tensor(1), "int"),
        ("count", Fraction(1, 2), "int"),
        ("ratio", True, "float"),
        ("ratio", "1", "float"),
        ("ratio", math.inf, "float, finite"),
        ("ratio", math.nan, "float, finite"),
        ("ratio", np.float32("nan"), "float"),
        ("ratio", 10**400, "float"),
        ("ratio", 1j, "float"),
        ("ratio", torch.tensor(1.0), "float"),
        ("flag", 1, "bool"),
        ("flag", 0.0, "bool"),
        ("flag", "True", "bool"),
        ("word", 1, "str"),
        ("word", b"x", "str"),
        ("maybe", 1.5, "int | None"),
        ("pair", 1, "tuple[int, int]"),
        ("pair", (1,), "tuple[int, int]"),
        ("pair", (1, 2, 3), "tuple[int, int]"),
        ("pair", (1, True), "tuple[int, int]"),
        ("pair", {1, 2}, "tuple[int, int]"),
        ("many", (1.0, "x"), "tuple[float, ...]"),
        ("many", (math.nan,), "tuple[float, ...]"),
        ("either", "x", "int | tuple[int, int]"),
        ("number", True, "float | int"),
        ("choice", "c", "'a' | 'b' | 3"),
        ("choice", 3.0, "'a' | 'b' | 3"),
        ("thing", 1, "Thing | None"),
        ("anyhow", ({},), "tuple"),
    ],
)
def test_values_of_the_wrong_type(option, value, expected):
    with pytest.raises(sa.UnknownOptionError) as caught:
        specs.build(Sample, {option: value})
    message = str(caught.value)
    assert repr(option) in message and f"expected {expected}" in message
    assert type(value).__name__ in message and len(message) < 600
    assert "valid options: count: int" in message


def test_a_value_too_long_to_print_is_refused():
    with pytest.raises(sa.UnknownOptionError, match=r"cannot be printed \(int\)"):
        specs.build(Sample, {"count": 10**5000})


def test_an_object_is_held_as_it_is():
    thing = Thing()
    assert specs.build(Sample, {"thing": thing}).thing is thing


def test_an_unknown_option_suggests_the_nearest():
    with pytest.raises(sa.UnknownOptionError) as caught:
        specs.build(Sample, {"cuont": 1})
    message = str(caught.value)
    assert "Did you mean 'count'" in message and "ratio: float" in message


def test_a_missing_option_is_named():
    @dataclass(frozen=True)
    class Needy(sa.MaskedSoftmax):
        name = "needy"
        needed: int

        def visible(self, i, j):
            return i == j

    with pytest.raises(sa.UnknownOptionError, match="'needy' needs the option 'needed'"):
        specs.build(Needy, {})
    assert specs.build(Needy, {"needed": 3}).needed == 3


def test_what_the_class_raises_is_typed():
    with pytest.raises(sa.InvalidInputError, match="ZeroDivisionError: no luck") as caught:
        specs.build(Sample, {"count": 13})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(sa.UnsupportedCallError, match="not here"):
        specs.build(Sample, {"count": 14})


BUILT_IN = st.sampled_from(
    [
        ("windowed", {"window": st.integers(-5, 40) | st.tuples(*[st.integers(-1, 9)] * 2)}),
        ("dilated", {"window": st.integers(-1, 40), "dilation": st.integers(-1, 9)}),
        ("bigbird", {"block": st.integers(0, 70), "seed": st.integers()}),
        ("performer", {"features": st.integers(-1, 300), "orthogonal": st.booleans()}),
        ("cosformer", {"horizon": st.integers()}),
        ("topk_blocks", {"top": st.integers(), "local": st.integers(-1, 4)}),
    ]
).flatmap(lambda pick: st.tuples(st.just(pick[0]), st.fixed_dictionaries(pick[1])))


@given(BUILT_IN)
@settings(max_examples=100, deadline=None)
def test_the_repr_of_a_mechanism_is_its_spec(pick):
    name, options = pick
    try:
        made = sa.mechanism(name, **options)
    except sa.SparseAttnError as error:
        assert len(str(error)) < 600
        return
    again = sa.mechanism(repr(made))
    assert again == made and hash(again) == hash(made) and repr(again) == repr(made)
    assert all(getattr(made, key) == value for key, value in options.items())
