"""Adapters of other libraries: what reaches the library, what comes back, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adapted_libraries
import plugin_farm
import pytest
import torch
from torch import Tensor

import sparseattn as sa
import sparseattn_fla
import sparseattn_flash_attn
import sparseattn_flex
from sparseattn import registry
from sparseattn.testing import checks_for
from sparseattn.testing.budgets import Budgets
from sparseattn_flex import clauses, plan

_LISTED = sa.BlockLayout([0, 2, 2, 5, 7], [0, 3, 0, 1, 6, 2, 3], 48)
PATTERNS = [
    sa.mechanism("full"),
    sa.mechanism("windowed", window=5, sinks=2),
    sa.mechanism("windowed", window=(300, 17)),
    sa.mechanism("dilated", window=40, dilation=3),
    sa.mechanism("chunked", chunk=100),
    sa.mechanism("longformer", window=9, global_tokens=3),
    sa.mechanism("strided", stride=31),
    sa.mechanism("bigbird", block=32, random_blocks=1),
    sa.mechanism("block_sparse", layout=_LISTED),
]
# n, m, causal, q_offset
GRIDS = [
    (300, 300, True, None),
    (150, 400, False, None),
    (400, 150, True, None),
    (130, 257, True, 0),
    (70, 90, True, -60),
]


def tensors(
    n: int, m: int, heads: int = 4, kv: int = 2, d: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    g = torch.Generator().manual_seed(n + m)
    shapes = ((2, heads, n, d), (2, kv, m, d), (2, kv, m, d))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def dense(lists: tuple[Tensor, Tensor], columns: int) -> Tensor:
    """Which blocks a pair of FlexAttention's tensors lists, bool `[rows, columns]`."""
    count, listed = lists[0][0, 0], lists[1][0, 0]
    found = torch.zeros(len(count), columns, dtype=torch.bool)
    for row, (number, entries) in enumerate(zip(count.tolist(), listed.tolist(), strict=True)):
        found[row, entries[:number]] = True
    return found


def computed(made: plan.Plan, n: int, m: int) -> Tensor:
    """The pairs that FlexAttention would use, bool `[n, m]`: all of full blocks, and what the
    `mask_mod` allows of partial ones."""
    columns = made.blocks[1].shape[3]
    partial, full = (dense(made.blocks[x : x + 2], columns) for x in (0, 2))
    assert not (partial & full).any()
    i, j = torch.arange(n)[:, None], torch.arange(m)
    seen = clauses.visible(made.terms, made.tables, i + made.offset, j)
    blocks = i // plan.BLOCK, j // plan.BLOCK
    return full[blocks] | (partial[blocks] & seen)


def call_of(n: int, m: int, causal: bool, offset: int | None, **kw: Any) -> sa.AttentionCall:
    return sa.AttentionCall.make(*tensors(n, m), causal=causal, q_offset=offset, **kw)


def faults() -> list[str]:
    """Every pattern and grid on which FlexAttention would use other pairs than the definition."""
    plan._plan.cache_clear()
    found = []
    for mechanism in PATTERNS:
        for grid in GRIDS:
            call = call_of(*grid)
            used = computed(plan.make(mechanism, call), call.n, call.m)
            if not torch.equal(used, mechanism.mask(call)[0, 0]):
                found.append(f"{mechanism!r} {grid}")
    return found


def test_flex_is_given_the_pattern():
    assert faults() == []


def _off_by_one(band: Any, i: Tensor, j: Tensor) -> list[Tensor]:
    ends = [j - i > -band.left] if band.left is not None else []
    return ends + ([j - i <= band.right] if band.right is not None else [])


def _top_left(mechanism: Any, call: sa.AttentionCall) -> Any:
    return mechanism.clauses(sa.Grid(call.n, call.m, call.causal, 0)).with_causal()


_dense = plan._dense


def _swapped(csr: Any, which: Any) -> Any:
    return _dense(csr, ~which)


@pytest.mark.parametrize(
    ("module", "name", "planted", "seen_in"),
    [
        (clauses, "_band", _off_by_one, "windowed(window=5"),
        (plan, "layout_of", _top_left, "full"),
        (plan, "_dense", _swapped, "full"),
    ],
    ids=["a window off by one", "causal from the top left", "partial blocks called full"],
)
def test_a_planted_bug_in_the_plan_is_seen(monkeypatch, module, name, planted, seen_in):
    monkeypatch.setattr(module, name, planted)
    assert any(words.startswith(seen_in) for words in faults())
    monkeypatch.undo()
    plan._plan.cache_clear()


def test_keys_that_no_query_sees_are_known():
    for mechanism in PATTERNS:
        for grid in GRIDS:
            call = call_of(*grid)
            unseen = ~mechanism.mask(call)[0, 0].any(0)
            made = plan.make(mechanism, call).unseen
            assert torch.equal(torch.zeros_like(unseen) if made is None else made, unseen)


def test_a_million_tokens_are_planned_in_blocks_alone():
    x = torch.empty(1, 1, 1, 16).expand(1, 1, 2**20, 16)
    call = sa.AttentionCall.make(x, x, x, causal=True)
    made = plan.make(sa.mechanism("windowed", window=256), call)
    blocks = 2**20 // plan.BLOCK
    assert [x.numel() for x in made.blocks] == [blocks, blocks**2] * 2
    # A window of two blocks: two edges, and one full block between them.
    partial, full = (int(made.blocks[x].sum()) for x in (0, 2))
    assert (partial, full) == (2 * blocks - 2, blocks - 1) and made.unseen is None


def test_the_backward_has_the_lists_by_key():
    from torch.nn.attention.flex_attention import BlockMask

    q, k, v = tensors(300, 400)
    call = sa.AttentionCall.make(q.requires_grad_(), k, v, causal=True)
    made = plan.make(PATTERNS[2], call)
    theirs = BlockMask.from_kv_blocks(*made.blocks, BLOCK_SIZE=plan.BLOCK, seq_lengths=(300, 400))
    rows = made.blocks[0].shape[2]
    for at, names in enumerate(
        (("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices"))
    ):
        expected = dense(tuple(getattr(theirs, name) for name in names), rows)
        assert torch.equal(dense(made.transposed[2 * at : 2 * at + 2], rows), expected)


# Each row is compiled, for some seconds.
COMPILED: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
    ("windowed(window=5, sinks=2)", (140, 170), {"causal": True, "softcap": 2.0}),
    ("bigbird(block=32)", (170, 300), {}),
    ("windowed(window=(40, 3))", (200, 200), {"key_mask": True, "scale": -0.3}),
]


@pytest.mark.parametrize(("spec", "sizes", "kw"), COMPILED)
def test_flex_is_the_definition(spec, sizes, kw):
    q, k, v = tensors(*sizes)
    kw = dict(kw)
    if "key_mask" in kw:
        kw["key_mask"] = torch.rand(2, sizes[1], generator=torch.Generator().manual_seed(0)) < 0.7
        k, v = (x.masked_fill(~kw["key_mask"][:, None, :, None], torch.nan) for x in (k, v))
    out = sa.attention(q, k, v, spec, impl="flex", **kw)
    k, v = k.nan_to_num(), v.nan_to_num()
    verdict = Budgets(sa.mechanism(spec), q, k, v, sa.AttentionCall.make(q, k, v, **kw)).out(out)
    assert verdict.holds, verdict


def test_flex_serves_other_sizes_without_compiling_again():
    from sparseattn_flex import compiled

    spec, _, kw = COMPILED[0]
    for sizes in ((140, 170), (200, 260)):  # the second makes sizes symbols
        sa.attention(*tensors(*sizes), spec, impl="flex", **kw)
    stats = torch._dynamo.utils.counters["stats"]
    before = len(compiled._made), stats["unique_graphs"]
    # More queries than keys: the first of them see nothing, and their outputs are 0.
    q, k, v = tensors(290, 150)
    out = sa.attention(q, k, v, spec, impl="flex", **kw)
    assert (len(compiled._made), stats["unique_graphs"]) == before
    verdict = Budgets(sa.mechanism(spec), q, k, v, sa.AttentionCall.make(q, k, v, **kw)).out(out)
    assert verdict.holds, verdict
    assert (out[:, :, :140] == 0).all() and (out[:, :, 140:] != 0).all()


def test_flex_shows_nan_and_refuses_infinity():
    spec, sizes, kw = COMPILED[0]
    q, k, v = tensors(*sizes)
    q[1, 2, 9, 0] = k[0, 1, 100, 3] = torch.nan
    out = sa.attention(q, k, v, spec, impl="flex", **kw)
    expected = sa.attention(q, k, v, spec, impl="torch", **kw)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().sum() > 5 * 16
    k[0, 1, 100, 3] = torch.inf
    with pytest.raises(sa.UnsupportedCallError, match="plausible number"):
        sa.attention(q, k, v, spec, impl="flex", **kw)


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("flex", "full", {"return_lse": True}, "returns no lse on the CPU"),
    ("flex", "full", {"sink_logits": torch.zeros(4)}, "sink_logits need the lse"),
    ("flex", "full", {"bias": torch.zeros(1, 1, 1, 9)}, "a bias is N x M"),
    ("flex", "full", {"q_offset": torch.tensor([0, 1])}, "q_offset must be an int"),
    ("flex", "full", {"grad": True}, "no backward on the CPU"),
    ("flex", "full", {"dtype": torch.float64}, "not torch.float64"),
    ("flex", "full", {"n": 0}, "no empty tensor"),
    ("flex", "chunked(chunk=4)", {"key_mask": torch.ones(2, 9, dtype=torch.bool)}, "would move"),
    ("flex", "windowed(sinks=1)", {"q_segments": torch.zeros(2, 9, dtype=torch.int64)}, "segments"),
    (
        "flex",
        "full",
        {"q_segments": torch.zeros(2, 9).int(), "kv_segments": torch.zeros(2, 9).int()},
        "other lengths of queries",
    ),
    ("flash_attn", "full", {}, "pip install flash-attn"),
    ("flash_attn", "full", {}, "needs a GPU"),
    ("flash_attn", "full", {}, "not torch.float32"),
    ("flash_attn", "full", {"key_mask": torch.ones(2, 9, dtype=torch.bool)}, "takes no key_mask"),
    ("flash_attn", "full", {"q_segments": torch.zeros(2, 9).int()}, "takes no segments"),
    ("flash_attn", "full", {"sink_logits": torch.zeros(4)}, "takes no sink_logits"),
    ("flash_attn", "full", {"bias": torch.zeros(1, 1, 1, 9)}, "takes no bias"),
    ("flash_attn", "full", {"q_offset": 1}, "takes no q_offset"),
    ("flash_attn", "full", {"grad": True, "return_lse": True}, "no gradient on through its lse"),
    ("flash_attn", "full", {"d": 264}, "at most 256"),
    ("flash_attn", "full", {"n": 0}, "no empty tensor"),
    ("flash_attn", "windowed(window=2, sinks=1)", {}, "without sinks"),
    ("fla", "linear", {}, "pip install flash-linear-attention"),
    ("fla", "linear", {}, "need a GPU"),
    ("fla", "linear", {}, "not torch.float32"),
    ("fla", "linear", {}, "are causal"),
    ("fla", "linear", {"causal": True, "q_offset": 1}, "no q_offset"),
    ("fla", "linear", {"causal": True, "n": 7}, "as many keys as queries"),
    ("fla", "retention", {"causal": True}, "as many heads of keys"),
    ("fla", "retention", {"causal": True, "q_segments": torch.zeros(2, 9).int()}, "no segments"),
    ("fla", "linear", {"n": 0, "m": 0}, "no empty tensor"),
]


@pytest.mark.parametrize(("impl", "spec", "kw", "words"), REFUSED)
def test_what_an_adapter_cannot_serve_is_refused_in_words(impl, spec, kw, words):
    kw = dict(kw)
    sizes = {word: kw.pop(word) for word in ("d", "dtype") if word in kw}
    q, k, v = tensors(kw.pop("n", 9), kw.pop("m", 9), **sizes)
    q.requires_grad_(kw.pop("grad", False))
    with pytest.raises(sa.UnsupportedCallError) as caught:
        sa.attention(q, k, v, spec, impl=impl, **kw)
    assert any(words in reason for reason in caught.value.reasons), caught.value.reasons


@pytest.fixture
def libraries(monkeypatch):
    for name, module in adapted_libraries.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def through(adapter: sa.Implementation, spec: str, x: list[Tensor], **kw: Any) -> Any:
    """A call that reaches the stand-in, and the definition's budgets."""
    call = sa.AttentionCall.make(*x, **kw)
    mechanism = sa.mechanism(spec)
    return adapter.run(mechanism, *x, call), Budgets(mechanism, *x, call)


FLASH: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
    ("full", (9, 9), {}),
    ("full", (9, 14), {"causal": True, "scale": 0.4}),
    ("full", (14, 9), {"causal": True, "softcap": 1.5}),
    ("windowed(window=3)", (9, 14), {"causal": True}),
    ("windowed(window=(2, 4))", (14, 9), {}),
    ("windowed(window=(2, 4))", (14, 9), {"causal": True}),
    ("windowed(window=64)", (9, 9), {}),
]


def flash_faults() -> list[str]:
    found = []
    for spec, sizes, kw in FLASH:
        x = tensors(*sizes)
        (out, lse), budgets = through(
            sparseattn_flash_attn.FlashAttn(), spec, x, needs_lse=True, **kw
        )
        if not (budgets.out(out).holds and budgets.lse(lse).holds):
            found.append(spec)
    return found


def test_flash_attn_is_asked_for_the_same_pairs(libraries):
    assert flash_faults() == []


def test_a_planted_window_off_by_one_is_seen(libraries, monkeypatch):
    own = sparseattn_flash_attn._window

    def wider(mechanism: Any, call: Any) -> Any:
        left, right = own(mechanism, call)
        return left + (left >= 0), right

    monkeypatch.setattr(sparseattn_flash_attn, "_window", wider)
    assert {spec for spec in flash_faults()} == {"windowed(window=3)", "windowed(window=(2, 4))"}


def test_flash_attn_never_multiplies_a_key_that_no_query_sees(libraries):
    q, k, v = tensors(4, 14)
    for x in (k, v):
        x[:, :, :8] = torch.nan  # position 10 sees from 8 on
    out, _ = sparseattn_flash_attn.FlashAttn().run(
        sa.mechanism("windowed(window=3)"), q, k, v, sa.AttentionCall.make(q, k, v, causal=True)
    )
    assert out.isfinite().all()


@pytest.mark.parametrize("key_mask", [False, True])
@pytest.mark.parametrize("spec", ["linear", "retention"])
def test_fla_is_asked_for_the_same_map(libraries, spec, key_mask):
    adapter = {
        "linear": sparseattn_fla.ChunkedLinear(),
        "retention": sparseattn_fla.ChunkedRetention(),
    }[spec]
    x = tensors(40, 40, heads=3, kv=3, dtype=torch.bfloat16)
    kw: dict[str, Any] = {"causal": True}
    if spec == "retention":
        kw["scale"] = 0.7
    if key_mask:
        kw["key_mask"] = torch.arange(40) >= torch.tensor([[0], [9]])
    (out, lse), budgets = through(adapter, spec, x, **kw)
    verdict = budgets.out(out)
    assert lse is None and verdict.holds, verdict
    if key_mask:
        assert (out[1, :, :9] == 0).all()


def test_a_planted_scale_is_seen(libraries, monkeypatch):
    x = tensors(40, 40, heads=3, kv=3, dtype=torch.bfloat16)
    own = adapted_libraries.chunk_retention
    planted = lambda q, k, v, scale: own(q, k, v)  # noqa: E731
    monkeypatch.setattr(sys.modules["fla.ops.retention"], "chunk_retention", planted)
    (out, _), budgets = through(
        sparseattn_fla.ChunkedRetention(), "retention", x, causal=True, scale=0.7
    )
    assert not budgets.out(out).holds


def test_adapters_come_last_and_are_checked_on_request():
    assert [i.name for i in registry.extra_implementations("full")] == ["flash_attn", "flex"]
    assert [i.name for i in registry.extra_implementations("linear")] == ["fla"]
    assert {c.implementation for c in checks_for("full")} & {"flex", "flash_attn"} == set()
    assert {c.implementation for c in checks_for("full", impl="flex")} >= {"flex"}
    here = {one.name for one in registry.extra_implementations("full") if not one.missing()}
    assert "flex" in here
    assert {c.implementation for c in checks_for("full", expensive=True)} >= here
    assert {c.implementation for c in checks_for("full", impl="flash_attn")} >= {"flash_attn"}
    assert set(sparseattn_flex.MECHANISMS) == {
        record.name
        for record in sa.list_mechanisms()
        if record.provider == "sparseattn" and _is_static(record.name)
    }


def _is_static(name: str) -> bool:
    cls = registry.lookup(name)
    return issubclass(cls, sa.MaskedSoftmax) and cls.select is sa.MaskedSoftmax.select


def test_no_library_is_imported_before_a_call_that_uses_it(tmp_path: Path):
    heavy = plugin_farm.answers(
        tmp_path,
        """
        import json, sys, torch
        before = set(sys.modules)
        import sparseattn as sa
        q = torch.ones(1, 1, 4, 4)
        sa.attention(q, q, q, causal=True)
        sa.attention(q, q, q, "linear", causal=True)
        print(sa.explain(q, q, q), file=sys.stderr)
        print(json.dumps(sorted(set(sys.modules) - before)))
        """,
    )
    libraries = (
        "torch._dynamo",
        "torch._inductor",
        "torch.nn.attention.flex",
        "flash_attn",
        "fla.",
    )
    assert "sparseattn_flex" in heavy
    assert [m for m in heavy if m.startswith(libraries)] == []
