"""Swaps in models that call torch's scaled_dot_product_attention, held to a dense oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sdpa_modules import SPEC, Calls, CallsEarlyBound, CallsHelper, band, close, draw, layers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as early_bound

import sparseattn as sa
from sparseattn.testing import budgets

TORCH_SDPA = F.scaled_dot_product_attention


@pytest.mark.parametrize("kind", [Calls, CallsEarlyBound, CallsHelper])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=len)
@pytest.mark.parametrize("causal", [False, True])
def test_own_modules_of_any_rank(
    kind: type[nn.Module], lead: tuple[int, ...], causal: bool
) -> None:
    q, k, v = (draw(*lead, 20, 8, seed=i) for i in range(3))
    model = kind()
    allowed = band(20, 20, 0) & (torch.ones(20, 20).tril().bool() if causal else True)
    with sa.swap(model, SPEC) as swapped:
        found = model(q, k, v, is_causal=causal)
    close(found, lambda q, k, v: early_bound(q, k, v, attn_mask=allowed), q, k, v)
    assert torch.equal(model(q, k, v, is_causal=causal), early_bound(q, k, v, is_causal=causal))
    assert [(r.module, r.calls, r.fallback) for r in swapped.report] == [("", 1, 0)]
    assert F.scaled_dot_product_attention is TORCH_SDPA


MASKS: dict[str, Tensor] = {
    "bool": draw(20, 26, seed=5) > -1,
    "bool of batch and heads": draw(2, 3, 20, 26, seed=5) > -1,
    "key padding": (torch.arange(26) < torch.tensor([[26], [19]]))[:, None, None],
    "key padding on the left": (torch.arange(26) >= torch.tensor([[0], [7]]))[:, None, None],
    "float": draw(20, 26, seed=5),
    "float of a batch": draw(2, 1, 20, 26, seed=5),
    "causal, float": torch.zeros(20, 26).masked_fill(
        ~torch.ones(20, 26).tril(6).bool(), -torch.inf
    ),
    "causal from the top left": torch.ones(20, 26).tril().bool(),
    "one row a key": draw(1, 26, seed=5) > -1,
}


@pytest.mark.parametrize("spec", ["full", SPEC])
@pytest.mark.parametrize("name", MASKS)
def test_masks_mean_what_they_mean_to_torch(name: str, spec: str) -> None:
    """A window counts from the bottom right where the mask says nothing else of positions."""
    mask = MASKS[name]
    q, k, v = draw(2, 3, 20, 8), draw(2, 3, 26, 8, seed=1), draw(2, 3, 26, 8, seed=2)
    offset = 0 if name == "causal from the top left" else 6
    pattern = band(20, 26, offset) if spec == SPEC else torch.ones(20, 26).bool()

    def wanted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            return early_bound(q, k, v, attn_mask=mask & pattern).nan_to_num(0.0)
        both = mask.to(q).masked_fill(~pattern, -torch.inf)
        return early_bound(q, k, v, attn_mask=both).nan_to_num(0.0)

    model = Calls()
    with sa.swap(model, spec):
        found = model(q, k, v, attn_mask=mask)
    close(found, wanted, q, k, v)
    with sa.swap(model, spec, impl="torch"):
        found = model(q, k, v, mask)
    close(found, wanted, q, k, v)


def test_causal_is_top_left_and_heads_may_be_grouped_and_scaled() -> None:
    q, k, v = draw(2, 4, 12, 8), draw(2, 2, 20, 8, seed=1), draw(2, 2, 20, 6, seed=2)
    model = Calls()
    allowed = band(12, 20, 0) & torch.ones(12, 20).tril().bool()
    with sa.swap(model, SPEC):
        found = model(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    close(
        found,
        lambda q, k, v: early_bound(q, k, v, attn_mask=allowed, scale=0.3, enable_gqa=True),
        *(q, k, v),
    )
    with sa.swap(model, SPEC):
        model(q, q, q)
        with pytest.raises((RuntimeError, sa.SparseAttnError)):
            model(q, k, v, is_causal=True)  # torch refuses heads that do not match, and so do we


def test_what_torch_broadcasts_is_broadcast() -> None:
    q, k, v = draw(2, 3, 12, 8), draw(1, 3, 12, 8, seed=1), draw(2, 1, 12, 8, seed=2)
    allowed = band(12, 12, 0)
    with sa.swap(model := Calls(), SPEC):
        found = model(q, k, v)
    close(found, lambda q, k, v: early_bound(q, k, v, attn_mask=allowed), q, k, v)


def test_a_mask_beside_is_causal_is_refused_as_torch_documents() -> None:
    q = draw(1, 1, 6, 8)
    with sa.swap(model := Calls(), SPEC):
        model(q, q, q)
        with pytest.raises(sa.InvalidInputError, match="is_causal"):
            model(q, q, q, torch.ones(6, 6).bool(), is_causal=True)


def test_gradients_are_those_of_the_dense_mask() -> None:
    model = Calls()
    given = [draw(1, 2, 20, 8, seed=i) for i in range(3)]
    allowed = band(20, 20, 0)

    def gradients(dtype: torch.dtype, swapped: bool) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in given)
        if swapped:
            with sa.swap(model, SPEC):
                out = model(q, k, v)
        else:
            out = early_bound(q, k, v, attn_mask=allowed)
        return list(torch.autograd.grad(out, (q, k, v), draw(1, 2, 20, 8, seed=9).to(dtype)))

    refs, naive = gradients(torch.float64, False), gradients(torch.float32, False)
    for found, low, ref in zip(gradients(torch.float32, True), naive, refs, strict=True):
        assert budgets.distance(found, ref) <= budgets.rule(low, ref, torch.float32)


def test_dropout_is_refused_even_by_full() -> None:
    q = draw(1, 2, 10, 8)
    for spec in ("full", SPEC):
        with sa.swap(model := Calls(), spec):
            model(q, q, q)
            with pytest.raises(sa.UnsupportedCallError, match="dropout"):
                model(q, q, q, dropout_p=0.1)


# torch's own layers.


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["encoder layer", "encoder"])
def test_encoders_on_and_off_the_fast_path(kind: str, training: bool) -> None:
    model = layers(kind).train(training)
    x = draw(2, 30, 32)
    pad = torch.arange(30) >= torch.tensor([[30], [21]])

    def dense(x: Tensor) -> Tensor:
        return layers(kind).to(x.dtype)(x, ~band(x.shape[1], x.shape[1], 0))

    before, padded = model(x), model(x, src_key_padding_mask=pad)
    with sa.swap(model, SPEC) as swapped:
        found, found_padded = model(x), model(x, src_key_padding_mask=pad)
    with sa.swap(model, "full"):
        exact, exact_padded = model(x), model(x, src_key_padding_mask=pad)
    close(found, dense, x)
    close(found_padded[1:, :21], dense, x[1:, :21])
    close(exact, layers_in_dtype(kind), x)
    close(exact_padded[1:, :21], layers_in_dtype(kind), x[1:, :21])
    assert torch.equal(model(x), before)
    assert torch.equal(model(x, src_key_padding_mask=pad), padded)
    assert torch.backends.mha.get_fastpath_enabled()
    assert sum(r.calls for r in swapped.report) == 2 * (1 if kind == "encoder layer" else 2)


def layers_in_dtype(kind: str) -> Any:
    return lambda x: layers(kind).to(x.dtype)(x)


def test_a_decoder_of_equal_lengths_keeps_its_cross_attention_exact() -> None:
    model = layers("decoder")
    x, memory = draw(2, 24, 32), draw(2, 24, 32, seed=1)
    hidden = ~band(24, 24, 0)
    with torch.no_grad():
        with sa.swap(model, SPEC) as swapped:
            found = model(x, memory)
        torch.testing.assert_close(found, model(x, memory, hidden))
        with sa.swap(model, SPEC, cross=SPEC):
            found = model(x, memory)
        torch.testing.assert_close(found, model(x, memory, hidden, hidden))
    reasons = [r.reason for r in swapped.report if "multihead" in r.module]
    assert reasons == ["cross-attention stays exact"] * 2


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_with_its_map_is_out_of_reach_and_says_so(need_weights: bool) -> None:
    mha = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = draw(2, 20, 32)
    if need_weights:
        with pytest.raises(sa.SwapError, match="need_weights"), sa.swap(mha, SPEC):
            mha(x, x, x)
        return
    with torch.no_grad(), sa.swap(mha, SPEC):
        found = mha(x, x, x, need_weights=False)[0]
    with torch.no_grad():
        wanted = mha(x, x, x, attn_mask=~band(20, 20, 0), need_weights=False)[0]
    torch.testing.assert_close(found, wanted)


def test_self_attention_by_three_views_of_one_tensor_is_self_attention() -> None:
    mha = nn.MultiheadAttention(32, 4).eval()
    x = draw(20, 2, 32)
    with torch.no_grad(), sa.swap(mha, SPEC) as swapped:
        found = mha(x, x, x, need_weights=False)[0]
        again = mha(query=x, key=x, value=x, need_weights=False)[0]
    assert torch.equal(found, again)
    assert swapped.report[0].reason == ""


def test_layers_of_torch_train_with_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    model = layers("encoder layer").train()
    x = draw(2, 20, 32).requires_grad_()
    with sa.swap(model, SPEC):
        (plain,) = torch.autograd.grad(model(x).square().sum(), x)
        for reentrant in (False, True):
            y = checkpoint(model, x, use_reentrant=reentrant)
            y.square().sum().backward()
            assert torch.equal(x.grad, plain)
            x.grad = None
