"""`sa.MultiheadAttention`: equal to torch's module, with any mechanism, and never bypassed."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from module_pairs import (
    ADDED,
    CAUSAL,
    PAD,
    B,
    E,
    H,
    M,
    N,
    banded,
    close,
    grouped,
    randn,
    torch_module,
)
from torch import Tensor, nn

import sparseattn as sa
from sparseattn.rotary import rotate
from sparseattn.testing.budgets import distance, rule


def in_dtype(module: Any, dtype: torch.dtype, inputs: Any, masks: Any, **keywords: Any) -> Any:
    cast = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in masks.items()
    }
    return copy.deepcopy(module).to(dtype)(*(x.to(dtype) for x in inputs), **cast, **keywords)


BLOCKED = torch.arange(M)[None] > torch.arange(N)[:, None] + 5

CALLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "self": ("self", {}, {}),
    "self, no bias": ("self", {"bias": False}, {}),
    "cross": ("cross", {}, {}),
    "cross, widths": ("cross", {"kdim": 10, "vdim": 6}, {}),
    "cross, widths, no bias": ("cross", {"kdim": 10, "vdim": 6, "bias": False}, {}),
    "padding": ("cross", {}, {"key_padding_mask": PAD}),
    "float padding": (
        "cross",
        {},
        {"key_padding_mask": torch.zeros(B, M).masked_fill(PAD, -torch.inf)},
    ),
    "bool mask": ("cross", {}, {"attn_mask": BLOCKED}),
    "float mask": ("cross", {}, {"attn_mask": ADDED}),
    "mask a head": ("cross", {}, {"attn_mask": randn(B * H, N, M, seed=8)}),
    "both masks": ("cross", {}, {"attn_mask": BLOCKED, "key_padding_mask": PAD}),
    "causal": ("self", {}, {"attn_mask": CAUSAL, "is_causal": True}),
    # Bottom-right, as the mask says; torch reads the mask here, whatever the hint.
    "causal, cross": (
        "cross",
        {},
        {"attn_mask": torch.ones(N, M, dtype=torch.bool).triu(1 + M - N), "is_causal": True},
    ),
    "causal, float": (
        "self",
        {},
        {"attn_mask": torch.zeros(M, M).masked_fill(CAUSAL, -torch.inf), "is_causal": True},
    ),
}


def inputs_of(kind: str, keywords: dict[str, Any], batch_first: bool) -> tuple[Tensor, ...]:
    widths = (E, keywords.get("kdim", E), keywords.get("vdim", E))
    if kind == "self":
        found = (randn(B, M, E),) * 3
    else:
        lengths = (N, M, M)
        found = tuple(randn(B, n, w, seed=n + w) for n, w in zip(lengths, widths, strict=True))
    if not batch_first:
        # One object thrice stays one: both modules look at that.
        made = {id(x): x.transpose(0, 1) for x in found}
        found = tuple(made[id(x)] for x in found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_full_equals_torch(name: str, batch_first: bool, dtype: torch.dtype) -> None:
    kind, keywords, masks = CALLS[name]
    theirs = torch_module(batch_first=batch_first, **keywords)
    ours = sa.MultiheadAttention(E, H, batch_first=batch_first, dtype=torch.float64, **keywords)
    ours.load_state_dict(theirs.state_dict())
    inputs = inputs_of(kind, keywords, batch_first)
    for average in (True, False):
        more = {"average_attn_weights": average}
        wide = in_dtype(theirs, torch.float64, inputs, masks, **more)
        naive = in_dtype(theirs, dtype, inputs, masks, **more)
        found = in_dtype(ours, dtype, inputs, masks, **more)
        exact = in_dtype(ours, torch.float64, inputs, masks, **more)
        for x, y, ref, right in zip(found, naive, wide, exact, strict=True):
            assert x.shape == ref.shape and x.dtype == dtype
            assert distance(x, ref) <= rule(y, ref, dtype)
            assert close(right, ref)
    out, weights = ours(*inputs, **masks, need_weights=False)
    assert weights is None and torch.equal(out, exact[0])


@pytest.mark.parametrize("name", [n for n in CALLS if n != "mask a head"])
def test_unbatched_equals_torch(name: str) -> None:
    kind, keywords, masks = CALLS[name]
    theirs = torch_module(**keywords)
    ours = sa.MultiheadAttention.from_torch(theirs)
    inputs = tuple(x[1] for x in inputs_of(kind, keywords, True))
    masks = {k: x[1] if k == "key_padding_mask" else x for k, x in masks.items()}
    if kind == "self":
        inputs = inputs[:1] * 3
    ref, found = (in_dtype(x, torch.float64, inputs, masks) for x in (theirs, ours))
    for x, y in zip(found, ref, strict=True):
        assert x.shape == y.shape and close(x, y)


def test_gradients_are_those_of_torch() -> None:
    theirs = torch_module(batch_first=True)
    ours = sa.MultiheadAttention.from_torch(theirs)
    x, added = randn(B, N, E), randn(N, N, seed=3)
    grads = []
    for module in (theirs, ours):
        given = [x.clone().requires_grad_(), added.clone().requires_grad_()]
        out, weights = module(given[0], given[0], given[0], attn_mask=given[1])
        leaves = [*given, *module.parameters()]
        grads.append(torch.autograd.grad(out.square().sum() + weights.square().sum(), leaves))
    assert all(close(a, b) for a, b in zip(grads[1], grads[0], strict=True))


def test_gradcheck() -> None:
    module = sa.MultiheadAttention(
        *(8, 4),
        batch_first=True,
        dtype=torch.float64,
        mechanism="windowed(window=2)",
        num_kv_heads=2,
        rotary_base=100.0,
        causal=True,
    )
    x = randn(1, 5, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x, x, x, need_weights=False)[0], x)


def test_arguments_are_those_of_torch() -> None:
    for name in ("__init__", "forward"):
        theirs = inspect.signature(getattr(nn.MultiheadAttention, name)).parameters
        ours = inspect.signature(getattr(sa.MultiheadAttention, name)).parameters
        same = list(ours.values())[: len(theirs)]
        assert [(p.name, p.default, p.kind) for p in same] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]
        rest = list(ours.values())[len(theirs) :]
        assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in rest)


@pytest.mark.parametrize(
    "keywords", [{}, {"bias": False}, {"kdim": 10}, {"vdim": 6, "batch_first": True}]
)
def test_one_seed_gives_the_parameters_of_torch(keywords: dict[str, Any]) -> None:
    made = []
    for kind in (nn.MultiheadAttention, sa.MultiheadAttention):
        torch.manual_seed(3)
        made.append(kind(E, H, **keywords).state_dict())
    assert list(made[0]) == list(made[1])
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


# --- other mechanisms, grouped heads, positions ---------------------------------------------------


def test_a_window_is_torch_with_its_mask() -> None:
    theirs = torch_module(batch_first=True)
    x = randn(B, M, E)
    ref = theirs(x, x, x, attn_mask=banded(M, 3), average_attn_weights=False)
    for ours in (
        sa.MultiheadAttention.from_torch(theirs, "windowed(window=3)", causal=True),
        sa.MultiheadAttention.from_torch(theirs, "windowed", causal=True, window=3),
        sa.MultiheadAttention.from_torch(theirs, sa.mechanism("windowed(window=3)"), causal=True),
    ):
        found = ours(x, x, x, average_attn_weights=False)
        assert all(close(a, b) for a, b in zip(found, ref, strict=True))
    ours = sa.MultiheadAttention.from_torch(theirs)
    ours.mechanism = "windowed(window=3)"
    assert ours.mechanism == sa.mechanism("windowed(window=3)")
    assert close(ours(x, x, x, is_causal=True)[0], ref[0])


def test_grouped_heads_equal_repeated_ones() -> None:
    ours, theirs = grouped(), torch_module(batch_first=True)
    assert ours.in_proj_weight.shape == ((H + 2 * 2) * E // H, E)
    with torch.no_grad():
        for name in ("in_proj_weight", "in_proj_bias"):
            q, k, v = getattr(ours, name).split([E, E // 2, E // 2])
            k, v = (
                x.unflatten(0, (2, E // H)).repeat_interleave(2, dim=0).flatten(0, 1)
                for x in (k, v)
            )
            getattr(theirs, name).copy_(torch.cat([q, k, v]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = randn(B, M, E)
    for a, b in zip(ours(x, x, x, PAD), theirs(x, x, x, PAD), strict=True):
        assert close(a, b)


def test_grouped_heads_with_widths_of_their_own() -> None:
    module = sa.MultiheadAttention(E, H, kdim=10, vdim=6, num_kv_heads=1, batch_first=True)
    shapes = {name: tuple(x.shape) for name, x in module.named_parameters()}
    assert shapes["k_proj_weight"] == (6, 10) and shapes["v_proj_weight"] == (6, 6)
    assert shapes["in_proj_bias"] == (E + 2 * 6,) and "in_proj_weight" not in shapes
    out, weights = module(torch.zeros(B, N, E), torch.zeros(B, M, 10), torch.zeros(B, M, 6))
    assert out.shape == (B, N, E) and weights.shape == (B, N, M)


def test_grouped_heads_do_not_load_torch_and_say_why() -> None:
    module = sa.MultiheadAttention(E, H, num_kv_heads=2)
    with pytest.raises(RuntimeError, match="leave num_kv_heads out"):
        module.load_state_dict(torch_module().state_dict())
    with pytest.raises(RuntimeError, match="leave num_kv_heads out"):
        nn.Sequential(module).load_state_dict(nn.Sequential(torch_module()).state_dict())


def turned(x: Tensor, at: Tensor, base: float) -> Tensor:
    """The half-split convention: feature i and feature i + D/2 are one complex number."""
    half = x.shape[-1] // 2
    angle = at[:, None] * base ** -(torch.arange(half).double() / half)
    numbers = torch.complex(*x.double().split(half, -1)) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([numbers.real, numbers.imag], dim=-1)


def test_rotary_positions_are_a_turn_of_complex_numbers() -> None:
    module, x, y = grouped(rotary_base=50.0), randn(B, N, E), randn(B, M, E, seed=2)
    width = E // H
    q, k, v = (
        nn.functional.linear(a, w, b).unflatten(2, (-1, width)).transpose(1, 2)
        for a, w, b in zip(
            (x, y, y),
            module.in_proj_weight.split([E, E // 2, E // 2]),
            module.in_proj_bias.split([E, E // 2, E // 2]),
            strict=True,
        )
    )

    # Bottom-right: the last query stands where the last key does.
    logits = (
        turned(q, torch.arange(M - N, M), 50.0)
        @ turned(k, torch.arange(M), 50.0).repeat_interleave(2, 1).mT
        * width**-0.5
    )
    ref = torch.softmax(logits, -1) @ v.repeat_interleave(2, 1)
    ref = module.out_proj(ref.transpose(1, 2).flatten(2))
    assert close(module(x, y, y)[0], ref)


def test_rotary_is_rounded_once() -> None:
    x, at = randn(1, 2, 3, 16), torch.tensor([0, 1, 100_000])
    # Angles of float32 would be off by hundredths at the last position.
    slack = 4 * torch.finfo(torch.float32).eps * x.abs().max()
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype)
        ref, found = turned(given, at, 10000.0), rotate(given, at[None], 10000.0)
        assert found.dtype == dtype
        assert ((found - ref).abs() <= torch.finfo(dtype).eps / 2 * ref.abs() + slack).all()


ABSOLUTE = ("windowed(window=4, sinks=2)", "linear", "full", "retention")


@pytest.mark.parametrize("spec", ABSOLUTE)
def test_padding_and_packing_are_invisible(spec: str) -> None:
    module = grouped(mechanism=spec, rotary_base=100.0, causal=True)
    x = randn(1, M, E)
    padded = torch.arange(M)[None] < 4
    alone = module(x[:, 4:], x[:, 4:], x[:, 4:])
    out, weights = module(x, x, x, padded)
    assert close(out[:, 4:], alone[0]) and close(weights[:, 4:, 4:], alone[1])
    ids = (torch.arange(M)[None] >= 4).int()
    packed, _ = module(x, x, x, q_segments=ids)
    assert close(packed[:, 4:], alone[0])
    assert close(packed[:, :4], module(x[:, :4], x[:, :4], x[:, :4])[0])


def test_a_query_that_sees_no_key_gives_the_bias_alone() -> None:
    module = grouped()
    x = randn(B, N, E)
    out, weights = module(x, x, x, torch.ones(B, N, dtype=torch.bool))
    assert torch.equal(out, module.out_proj.bias.expand_as(out)) and not weights.any()


@pytest.mark.parametrize("spec", ABSOLUTE)
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_cached_run_in_pieces_equals_one_call(spec: str, batch_first: bool) -> None:
    module = grouped(mechanism=spec, rotary_base=100.0, causal=True)
    module.batch_first = batch_first
    x, pad = randn(B, M, E), torch.zeros(B, M, dtype=torch.bool)
    pad[1, :5] = True  # all of the first piece, and more

    def run(x: Tensor, pad: Tensor, cache: Any = None) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        out, _ = module(x, x, x, pad, need_weights=False, cache=cache)
        return out if batch_first else out.transpose(0, 1)

    with torch.no_grad():
        whole = run(x, pad)
        cache = module.new_cache(B)
        sizes = [3, 1, 1, 2, 4]
        pieces = zip(x.split(sizes, 1), pad.split(sizes, 1), strict=True)
        found = torch.cat([run(a, b, cache) for a, b in pieces], dim=1)
        assert cache.length == M and close(found, whole)
        # Beam search: rows change places, and so do their positions.
        cache.reorder(torch.tensor([1, 0]))
        more = randn(B, 2, E, seed=4)
        both = torch.cat([x.flip(0), more], 1), nn.functional.pad(pad.flip(0), (0, 2))
        none = torch.zeros(B, 2, dtype=torch.bool)
        assert close(run(more, none, cache), run(*both)[:, -2:])
