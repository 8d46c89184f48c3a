"""The registry in one process: names, refusals, registering from a script, preferences."""

from __future__ import annotations

import abc
import dataclasses
import doctest
import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

import sparseattn as sa
from sparseattn import registry
from sparseattn.engines import intern


@pytest.fixture(autouse=True)
def fresh():
    registry.reset()
    yield
    registry.reset()


def pattern(name_: str, **body: Any) -> type:
    """A plain mechanism's class, before it is a dataclass."""
    body = {"name": name_, "visible": lambda self, i, j: i - j < 3, **body}
    return type(name_.title(), (sa.MaskedSoftmax,), {"__module__": __name__, **body})


def frozen(name_: str, annotations: dict[str, Any] | None = None, **body: Any) -> type:
    body = {"__annotations__": annotations or {}, **body}
    return dataclass(frozen=True)(pattern(name_, **body))


BUILT_IN = {
    *("full", "windowed", "dilated", "chunked", "longformer", "strided", "bigbird"),
    *("block_sparse", "topk_blocks", "vertical_slash", "oracle_topk"),
    *("linear", "performer", "taylor", "cosformer", "retention"),
}


def test_the_built_in_mechanisms_are_listed():
    records = sa.list_mechanisms()
    assert [r.name for r in records] == sorted(BUILT_IN)
    by_name = {r.name: r for r in records}
    assert {r.provider for r in records} == {"sparseattn"}
    natures = {r.name: r.nature for r in records}
    assert natures["full"] == "exact" and natures["windowed"] == "masked_softmax"
    assert natures["performer"] == "softmax_estimate" and natures["taylor"] == "different_function"
    assert [r.name for r in records if r.looks_ahead] == ["vertical_slash"]
    assert all(r.summary and "\n" not in r.summary for r in records)
    windowed = by_name["windowed"].options
    assert list(windowed) == ["window", "sinks"]
    assert windowed["window"] == registry.Option("int | tuple[int, int]", 256, False)
    assert windowed["sinks"] == registry.Option("int", 0, False)
    assert by_name["block_sparse"].options["layout"].required
    assert by_name["full"].options == {}
    assert {r.name: r.status for r in registry.diagnose()} == dict.fromkeys(
        ("full", "windowed", "block_sparse", "linear", "flex", "flash_attn", "fla"), "loaded"
    )


def test_records_are_the_readers_own():
    registry.diagnose()[0].status = "broken"
    sa.list_mechanisms()[0].options["x"] = None
    assert registry.diagnose()[0].status == "loaded"
    assert "x" not in sa.list_mechanisms()[0].options


def test_a_mechanism_by_name_by_spec_and_by_itself():
    made = sa.mechanism("windowed", window=8)
    assert repr(made) == "windowed(window=8, sinks=0)"
    assert made == sa.mechanism("windowed(window=8)") == sa.mechanism(" windowed ( window = 8 ) ")
    assert sa.mechanism(made) is made
    assert sa.mechanism("windowed()", window=8) == made
    assert type(made) is registry.lookup("windowed")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.window = 9


def test_options_in_two_places_are_refused():
    made = sa.mechanism("windowed", window=8)
    with pytest.raises(sa.UnknownOptionError, match=r"window.*beside the instance.*replace"):
        sa.mechanism(made, window=8)
    with pytest.raises(sa.UnknownOptionError, match=r"sinks.*beside the spec.*one place"):
        sa.mechanism("windowed(window=8)", sinks=1)


def test_what_is_no_mechanism_is_refused():
    with pytest.raises(sa.InvalidInputError, match=r"call it: Windowed\(\.\.\.\)"):
        sa.mechanism(registry.lookup("windowed"))
    for wrong in (None, 3, torch.zeros(2), sa.MaskedSoftmax, object()):
        with pytest.raises(sa.InvalidInputError):
            sa.mechanism(wrong)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("windwed", "windowed"),
        ("Windowed", "windowed"),
        ("block-sparse", "block_sparse"),
        ("Full(x=1)", "full"),
        ("sliding_window", "windowed"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(wrong, near):
    with pytest.raises(sa.UnknownMechanismError) as caught:
        sa.mechanism(wrong)
    assert f"'{near}'" in str(caught.value).split("Registered")[0]
    assert len(str(caught.value)) < 600


def test_an_unknown_option_suggests_the_nearest():
    with pytest.raises(sa.UnknownOptionError, match="Did you mean 'window'"):
        sa.mechanism("windowed", windw=3)
    with pytest.raises(sa.UnknownOptionError, match="takes no options"):
        sa.mechanism("full", window=3)


# What registration refuses: a class, and words of the reason and the way out.


@dataclass
class Unfrozen(pattern("unfrozen")):
    pass


@dataclass(frozen=True, eq=False)
class Unequal(pattern("unequal")):
    pass


@dataclass(frozen=True)
class Shouting(pattern("shouting")):
    def __repr__(self):
        return "SHOUTING"


@dataclass(frozen=True)
class Initial(pattern("initial")):
    count: dataclasses.InitVar[int] = 1


class Undecorated(frozen("decorated")):
    name = "undecorated"
    width: int = 3


@dataclass(frozen=True)
class Abstract(pattern("abstract"), abc.ABC):
    @abc.abstractmethod
    def supports(self, call): ...


@dataclass(frozen=True)
class Outsider:
    name = "outsider"


def base(parent: type, **body: Any) -> type:
    body = {"__module__": __name__, "__qualname__": "Bare", "name": "bare", **body}
    return dataclass(frozen=True)(type("Bare", (parent,), body))


def select(self, q, k, call):
    return torch.zeros(call.batch, call.q_heads, call.n, 1, dtype=torch.int32)


@dataclass(frozen=True)
class Unread(pattern("unread")):
    thing: NoSuchType = None  # noqa: F821


REFUSED = {
    "an instance": (lambda: frozen("x")(), "an instance of X", "register the class itself"),
    "no mechanism": (lambda: Outsider, "no Mechanism", "MaskedSoftmax"),
    "the base itself": (lambda: sa.MaskedSoftmax, "no dataclass", "frozen=True"),
    "no dataclass": (lambda: pattern("x"), "no dataclass", "@dataclass(frozen=True)"),
    "undecorated": (lambda: Undecorated, "no dataclass", "@dataclass(frozen=True)"),
    "unfrozen": (lambda: Unfrozen, "not frozen", "@dataclass(frozen=True)"),
    "eq=False": (lambda: Unequal, "compare", "leave eq on"),
    "a repr": (lambda: Shouting, "repr", "delete"),
    "no name": (lambda: frozen(""), "no name", "set name"),
    "a bad name": (lambda: frozen("Bad-Name"), "Bad-Name", "[a-z][a-z0-9_]{0,63}"),
    "a newline": (lambda: frozen("x\n"), r"x\n", "[a-z][a-z0-9_]{0,63}"),
    "a long name": (lambda: frozen("x" * 65), "xxx", "[a-z][a-z0-9_]{0,63}"),
    "a number": (lambda: frozen("x", name=3), "name is 3", "set name"),
    "name an option": (lambda: frozen("x", {"name": str}), "'name' is annotated", "write `name"),
    "nature an option": (
        lambda: frozen("x", {"nature": str}, nature="exact"),
        "'nature' is annotated",
        "write `nature",
    ),
    "nature": (lambda: frozen("x", nature="magic"), "magic", "masked_softmax"),
    "looks_ahead": (lambda: frozen("x", looks_ahead="yes"), "looks_ahead", "True or False"),
    "honours": (lambda: frozen("x", honours={"dropout"}), "honours", "sink_logits"),
    "source": (lambda: frozen("x", source=None), "source", "string"),
    "unhashable type": (lambda: frozen("x", {"w": "list[int]"}), "unhashable", "class"),
    "hidden in a union": (lambda: frozen("x", {"w": "dict | None"}), "unhashable", "class"),
    "a tensor": (lambda: frozen("x", {"w": torch.Tensor}), "unhashable", "class"),
    "untyped": (lambda: frozen("x", {"w": Any}), "says nothing", "class"),
    "untyped object": (lambda: frozen("x", {"w": object}), "says nothing", "class"),
    "unreadable types": (lambda: Unread, "NoSuchType", "exist at run time"),
    "unhashable default": (
        lambda: frozen("x", {"w": tuple}, w=field(default_factory=lambda: ([],))),
        "unhashable default",
        "tuple",
    ),
    "ill-typed default": (lambda: frozen("x", {"w": int}, w=None), "default None, no int", "mend"),
    "bool for an int": (lambda: frozen("x", {"w": int}, w=True), "default True", "mend"),
    "init=False": (lambda: frozen("x", {"w": int}, w=field(default=1, init=False)), "init", "prop"),
    "compare=False": (
        lambda: frozen("x", {"w": int}, w=field(default=1, compare=False)),
        "comparison",
        "drop compare=False",
    ),
    "InitVar": (lambda: Initial, "InitVar", "field"),
    "a method's name": (lambda: frozen("x", {"supports": int}, supports=1), "method", "another"),
    "layout": (lambda: frozen("x", {"layout": int}, layout=1), "method", "another name"),
    "no pattern": (lambda: base(sa.MaskedSoftmax), "no definition", "visible(i, j)"),
    "no block": (lambda: base(sa.MaskedSoftmax, select=select), "no size", "`block`"),
    "block = 0": (lambda: base(sa.MaskedSoftmax, select=select, block=0), "no size", "`block`"),
    "no features": (lambda: base(sa.KernelizedLinear), "no feature map", "feature_map("),
    "normalize": (
        lambda: base(sa.KernelizedLinear, feature_map=lambda *a: a[1], normalize=None),
        "normalize",
        "True or False",
    ),
    "no weights": (lambda: base(sa.Mechanism), "no definition", "weights(q, k, call)"),
    "abstract": (lambda: Abstract, "supports abstract", "define"),
    **{
        f"option {word}": (
            lambda word=word: frozen("x", {word: int}, **{word: 1}),
            f"{word!r} is a keyword of attention()",
            "another name",
        )
        for word in (
            *("q", "k", "v", "mechanism", "causal", "scale", "key_mask", "q_segments", "bias"),
            *("kv_segments", "q_offset", "softcap", "sink_logits", "cache", "impl", "return_lse"),
        )
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_registration_refuses_what_would_fail_later(case):
    make, problem, way_out = REFUSED[case]
    cls = make()
    with pytest.raises(sa.PluginError) as caught:
        sa.register_mechanism(cls)
    message = str(caught.value)
    assert problem in message and way_out in message and len(message) < 600
    assert {r.name for r in sa.list_mechanisms()} == BUILT_IN


def test_the_refused_keywords_are_those_of_attention():
    import inspect

    from sparseattn import admission

    parameters = inspect.signature(sa.attention).parameters.values()
    assert [p.name for p in parameters if p.kind is not p.VAR_KEYWORD] == [*admission.CALL_KEYWORDS]


ADMITTED = {
    "plain": lambda: frozen("x"),
    "required": lambda: frozen("x", {"w": "int | tuple[int, int]"}),
    "int for a float": lambda: frozen("x", {"w": float}, w=1),
    "factory": lambda: frozen("x", {"w": "tuple[int, ...]"}, w=field(default_factory=tuple)),
    "class variable": lambda: frozen("x", {"table": ClassVar[dict]}, table={}),
    "visible_in": lambda: base(sa.MaskedSoftmax, visible_in=lambda self, i, j, m, c: i == j),
    "select, block": lambda: base(sa.MaskedSoftmax, select=select, block=16),
    "select, option": lambda: base(
        sa.MaskedSoftmax, select=select, block=16, __annotations__={"block": int}
    ),
    "select, property": lambda: base(
        sa.MaskedSoftmax, select=select, block=property(lambda self: 16)
    ),
    "layout, clauses": lambda: frozen(
        "x",
        {"layout": sa.BlockLayout},
        layout=field(),
        clauses=lambda self, grid: grid.everything(),
    ),
    "features": lambda: base(sa.KernelizedLinear, feature_map=lambda *a: a[1], normalize=False),
    "weights": lambda: base(sa.Mechanism, weights=lambda self, q, k, call: None),
    "keyword": lambda: frozen("lambda"),
    "slots": lambda: dataclass(frozen=True, slots=True)(
        pattern("x", __annotations__={"w": int}, w=3)
    ),
}


@pytest.mark.parametrize("case", ADMITTED)
def test_registration_admits_what_works(case):
    cls = ADMITTED[case]()
    assert sa.register_mechanism(cls) is cls
    assert registry.lookup(cls.name) is cls
    assert cls.name in [r.name for r in sa.list_mechanisms()]


def test_a_script_registers_with_a_decorator():
    @sa.register_mechanism(provider="my notebook")
    @dataclass(frozen=True)
    class Near(sa.MaskedSoftmax):
        """Keys near the query,
        and no others.

        More words.
        """

        name = "near"
        reach: int = 2

        def visible(self, i, j):
            return (i - j).abs() < self.reach

    (record,) = [r for r in sa.list_mechanisms() if r.name == "near"]
    assert record.provider == "my notebook"
    assert record.summary == "Keys near the query, and no others."
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)
    out = sa.attention(q, k, v, "near", reach=3, causal=True)
    # A window of 3 is the same pattern, computed by someone else's class and layout.
    truth = sa.attention(q, k, v, "windowed", window=3, causal=True, impl="reference")
    assert (out - truth).abs().max() <= 64 * torch.finfo(torch.float64).eps * v.abs().max()
    assert repr(sa.mechanism("near")) == "near(reach=2)"


def test_a_taken_name_is_refused_and_a_cell_run_twice_is_not():
    with pytest.raises(sa.PluginError, match="'full' is taken by the plugin 'full' of sparseattn"):
        sa.register_mechanism(frozen("full"))
    first = sa.register_mechanism(frozen("cell"))
    with pytest.raises(sa.PluginError, match="registered already"):
        sa.register_mechanism(first)
    second = sa.register_mechanism(frozen("cell"))
    assert second is not first and registry.lookup("cell") is second
    other = type("Other", (second,), {"__module__": __name__})
    with pytest.raises(sa.PluginError, match=r"taken by .*\.Cell"):
        sa.register_mechanism(dataclass(frozen=True)(other))


def test_one_class_is_never_taken_for_another_of_its_name():
    held = sa.register_mechanism(frozen("shared", visible=lambda self, i, j: i == j))
    stranger = frozen("shared", visible=lambda self, i, j: i - j < 2)
    assert repr(held()) == repr(stranger()) and held() != stranger()
    assert intern.key(held()) == "shared" != intern.key(stranger())
    assert intern.resolve(intern.key(stranger())) == stranger()
    q, k, v = torch.randn(3, 1, 1, 8, 4)
    one, two = (sa.attention(q, k, v, cls(), causal=True) for cls in (held, stranger))
    assert torch.equal(one, v) and not torch.equal(one, two)


def test_a_key_is_the_spec_only_where_the_spec_says_all():
    assert intern.key(sa.mechanism("windowed", window=7)) == "windowed(window=7, sinks=0)"
    layout = sa.BlockLayout.from_mask(torch.ones(2, 2, dtype=torch.bool), block=4)
    made = sa.mechanism("block_sparse", layout=layout)
    key = intern.key(made)
    assert key != repr(made) and intern.resolve(key) is made
    late = frozen("late_one")
    before = intern.key(late())
    sa.register_mechanism(late)
    assert before != intern.key(late()) == "late_one"
    assert intern.resolve(before) == late()


def test_threads_register_and_look_up_together():
    classes = [frozen(f"thread_{n}") for n in range(16)]
    start, errors = threading.Barrier(16), []

    def work(cls):
        start.wait()
        try:
            sa.register_mechanism(cls)
            assert type(sa.mechanism(cls.name)) is cls
            assert cls.name in [r.name for r in sa.list_mechanisms()]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(cls,)) for cls in classes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {r.name for r in sa.list_mechanisms()} == BUILT_IN | {cls.name for cls in classes}


def test_preferences_nest_and_end_in_any_order():
    assert registry.preferred() == ()
    outer = sa.prefer("reference")
    assert registry.preferred() == ("reference",)
    with sa.prefer("torch", "native") as inner:
        assert registry.preferred() == ("torch", "native")
        with sa.prefer():
            assert registry.preferred() == ()
        outer.undo()
        assert registry.preferred() == ("torch", "native")
        with inner:  # again: it is in force once
            pass
        assert registry.preferred() == ()
    assert registry.preferred() == ()
    with pytest.raises(ZeroDivisionError), sa.prefer("reference"):
        raise ZeroDivisionError
    assert registry.preferred() == ()


def test_a_preference_decides_what_auto_takes():
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    usual = sa.explain(q, k, v, "windowed", window=3).impl
    assert usual != "reference"
    with sa.prefer("reference"):
        assert sa.explain(q, k, v, "windowed", window=3).impl == "reference"
    assert sa.explain(q, k, v, "windowed", window=3).impl == usual


@pytest.mark.parametrize("wrong", ["referense", "auto", "", 3, None])
def test_an_unknown_preference_is_refused(wrong):
    with pytest.raises(sa.InvalidInputError, match="reference"):
        sa.prefer("torch", wrong)
    assert registry.preferred() == ()


@pytest.mark.parametrize("function", [registry.inputs, registry.metrics])
def test_the_examples_of_the_hooks_work(function):
    (example,) = doctest.DocTestFinder().find(function, globs={"torch": torch, "sparseattn": sa})
    assert len(example.examples) == 2
    # A runner clears the globals when it is done; what the example defined is still wanted.
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(example, clear_globs=False).failed == 0

    from sparseattn.discovery import PluginRecord, Staged

    staged = Staged(PluginRecord("example", "example", "1"))
    plugin = example.globs["Plugin"]()
    if function is registry.inputs:
        plugin.register_inputs(staged.input)
        first, again = (staged.inputs["ramp"](6, 3, True) for _ in range(2))
        assert [x.shape for x in first] == [(1, 1, 6, 16)] * 3
        assert all(map(torch.equal, first, again))
    else:
        plugin.register_metrics(staged.metric)
        out = torch.ones(1, 1, 2, 4, dtype=torch.float64)
        assert staged.metrics["mean_bias"](out, 0 * out, None) == 1.0
