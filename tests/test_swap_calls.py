"""What a swapped transformers model may be asked: masks, training, dtypes, cross-attention.

The oracle is the same model with transformers' own SDPA attention and a dense mask.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import ARCHITECTURES
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

import sparseattn as sa
from sparseattn.integrations import transformers_route
from sparseattn.testing import budgets

WINDOW = 8
SPEC = "windowed(window=8, sinks=0)"
IDS = tiny_models.tokens()
BAND = (torch.arange(40)[:, None] - torch.arange(40)).abs() < WINDOW
CAUSAL = torch.ones(40, 40).tril().bool()


def make(name: str = "Llama", dtype: torch.dtype = torch.float32) -> Any:
    return ARCHITECTURES[name].make().to(dtype)


def dense(model: Any, allowed: Tensor, ids: Tensor = IDS, **words: Any) -> Tensor:
    """The unswapped model with a mask `[N, M]` or `[B, 1, N, M]`, bool."""
    mask = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill_(
        ~allowed, torch.finfo(model.dtype).min
    )
    mask = mask[None, None] if mask.ndim == 2 else mask
    mask = mask.expand(ids.shape[0], -1, -1, -1)
    return model(ids, attention_mask=mask, use_cache=False, **words).logits  # type: ignore[no-any-return]


@torch.no_grad()
def check(found: Tensor, allowed: Tensor, rows: Any = ..., **words: Any) -> None:
    ref = dense(make(dtype=torch.float64), allowed, **words)[rows]
    naive = dense(make(), allowed, **words)[rows]
    assert budgets.distance(found[rows], ref) <= budgets.rule(naive, ref, torch.float32)


# Masks.

PADS = {
    "left": tiny_models.padding("left"),
    "right": tiny_models.padding("right"),
    "none": torch.ones(2, 40, dtype=torch.int64),
}


@torch.no_grad()
@pytest.mark.parametrize("pad", PADS)
def test_sinks_begin_where_the_tokens_begin(pad: str) -> None:
    mask = PADS[pad]
    model = make()
    with sa.swap(model, "windowed(window=8, sinks=2)"):
        found = model(IDS, attention_mask=mask).logits
    first = mask.argmax(1)[:, None]
    sinks = (torch.arange(40) >= first) & (torch.arange(40) < first + 2)
    allowed = (BAND | sinks[:, None]) & CAUSAL & (mask > 0)[:, None]
    check(found, allowed[:, None], mask > 0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_dense_masks_of_the_persons_own(kind: str) -> None:
    """Holes, and a block that sees its own future: a swap must not prune it as causal."""
    allowed = CAUSAL.clone()
    allowed[10:20, 10:20] = True
    allowed[25:, 3] = False
    given = allowed[None, None].expand(2, 1, -1, -1)
    if kind == "float":
        given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
    model = make()
    with sa.swap(model, SPEC):
        found = model(IDS, attention_mask=given, use_cache=False).logits
    check(found, allowed & BAND)
    with sa.swap(model, "full"):
        found = model(IDS, attention_mask=given, use_cache=False).logits
    check(found, allowed)


@torch.no_grad()
def test_a_dense_causal_mask_with_padding_after_every_row() -> None:
    """As a batch padded to a multiple of some length: no row reaches the last key."""
    seen = torch.arange(40) < torch.tensor([[37], [30]])
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        swapped = sa.swap(model, "linear")  # which takes no bias
    with swapped:
        wanted = model(IDS, attention_mask=seen.long(), use_cache=False).logits
        dense = (CAUSAL & seen[:, None])[:, None]
        found = model(IDS, attention_mask=dense, use_cache=False).logits
    assert torch.equal(found[seen], wanted[seen])


@torch.no_grad()
@pytest.mark.parametrize(("n", "m"), [(4, 6), (6, 4), (1, 6), (5, 5)])
def test_without_a_mask_query_0_stands_at_key_0(n: int, m: int) -> None:
    """As in transformers' own SDPA function, where only a single query sees all."""
    model = make()
    module = model.model.layers[0].self_attn
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, rows, 8, generator=source) for rows in (n, m, m))
    with sa.swap(model, "full", impl="reference"):
        found, _ = transformers_route.attend(module, q, k, v, None)
    wanted = scaled_dot_product_attention(q, k, v, is_causal=n > 1)
    exact = scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=n > 1)
    tol = budgets.rule(wanted, exact, torch.float32)
    assert budgets.distance(found.transpose(1, 2), exact) <= tol


@torch.no_grad()
def test_blocks_that_a_model_or_s_into_its_causal_mask() -> None:
    """As Gemma 3 does for its images: an or_mask_function of its own."""
    block = torch.full((2, 40), -1)
    block[:, 10:20] = 0

    def same_block(batch: Any, head: Any, i: Any, j: Any) -> Any:
        return (block[batch, i] == block[batch, j]) & (block[batch, i] >= 0)

    model = make()
    x = model.model.embed_tokens(IDS)
    with sa.swap(model, SPEC) as swapped:
        mask = create_causal_mask(
            config=model.config,
            inputs_embeds=x,
            attention_mask=None,
            past_key_values=None,
            or_mask_function=same_block,
        )
        found = model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits
    allowed = CAUSAL.clone()
    allowed[10:20, 10:20] = True
    check(found, allowed & BAND)
    assert swapped.report[0].calls == 1


@torch.no_grad()
def test_packed_documents_are_the_documents_apart() -> None:
    places = torch.cat([torch.arange(13), torch.arange(27)])[None]
    model = make()
    for spec in (SPEC, "windowed(window=4, sinks=2)", "topk_blocks", "full"):
        with sa.swap(model, spec):
            found = model(IDS[:1], position_ids=places, use_cache=False).logits
            apart = [model(ids, use_cache=False).logits for ids in IDS[:1].split([13, 27], 1)]
        torch.testing.assert_close(found, torch.cat(apart, 1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GPT-OSS", "Mistral"])
def test_a_prompt_in_chunks_with_the_models_own_cache(name: str) -> None:
    model = make(name)
    with sa.swap(model, SPEC):
        whole = model(IDS).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in IDS.split(9, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


# Training.


def gradients(model: Any, forward: Any) -> list[Tensor]:
    model.zero_grad()
    (
        forward(model).float() if model.dtype != torch.float64 else forward(model)
    ).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_with_and_without_checkpointing(reentrant: bool | None) -> None:
    refs = gradients(make(dtype=torch.float64), lambda m: dense(m, CAUSAL & BAND))
    naive = gradients(make(), lambda m: dense(m, CAUSAL & BAND))
    model = make().train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with sa.swap(model, SPEC) as swapped:
        found = gradients(model, lambda m: m(IDS, use_cache=False).logits)
    for one, low, ref in zip(found, naive, refs, strict=True):
        assert budgets.distance(one, ref) <= budgets.rule(low, ref, torch.float32)
    assert swapped.report[0].calls == (1 if reentrant is None else 2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    ref = dense(make(dtype=torch.float64), CAUSAL & BAND)
    model = make(dtype=dtype)
    naive = dense(model, CAUSAL & BAND)
    with sa.swap(model, SPEC):
        found = model(IDS).logits
    assert found.dtype == dtype
    assert budgets.distance(found, ref) <= budgets.rule(naive, ref, dtype)
    if dtype == torch.bfloat16:
        model = make()
        with torch.autocast("cpu", dtype=dtype):
            naive = dense(model, CAUSAL & BAND)
            with sa.swap(model, SPEC):
                found = model(IDS).logits
        assert found.dtype == naive.dtype
        assert budgets.distance(found, ref) <= budgets.rule(naive, ref, dtype)


@torch.no_grad()
def test_compiled_before_or_within_a_swap() -> None:
    model = make()
    before = model(IDS, use_cache=False).logits
    early = torch.compile(model, backend="eager")
    torch.testing.assert_close(early(IDS, use_cache=False).logits, before)
    with sa.swap(model, SPEC):
        eager = model(IDS, use_cache=False).logits
        torch.testing.assert_close(early(IDS, use_cache=False).logits, eager)
    torch.testing.assert_close(early(IDS, use_cache=False).logits, before)
    assert not torch.equal(eager, before)


# What else attention is told.


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "word"),
    [("GPT-OSS", "sink"), ("Gemma2", "softcap"), ("T5", "bias"), ("Granite", "scale")],
)
def test_a_mechanism_without_it_refuses_in_words(name: str, word: str) -> None:
    model = make(name)
    if name == "Granite":
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.3
    if name in ("GPT-OSS", "Gemma2"):
        for layer in model.model.layers:
            layer.self_attn.sliding_window = 1000
        model.config.sliding_window = 1000
    words = {"decoder_input_ids": IDS} if name == "T5" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(sa.UnsupportedCallError, match=word) as caught, sa.swap(model, "linear"):
            model(IDS, **words)
    assert "module '" in str(caught.value) and len(str(caught.value)) < 600


@torch.no_grad()
@pytest.mark.parametrize("name", ["T5", "BART"])
def test_cross_attention_is_exact_unless_named(name: str) -> None:
    model = make(name)
    words = {"decoder_input_ids": IDS}
    before = model(IDS, **words).logits
    with sa.swap(model, "full", cross=SPEC) as swapped:
        within = model(IDS, **words).logits
    assert not torch.equal(within, before)
    assert sum(r.mechanism == SPEC for r in swapped.report) == 2
    with sa.swap(model, "full", cross="windowed(window=100)"):
        torch.testing.assert_close(model(IDS, **words).logits, before)
    with sa.swap(model, SPEC) as swapped:
        model(IDS, **words)
    exact = [r for r in swapped.report if r.reason == "cross-attention stays exact"]
    assert [r.mechanism for r in exact] == ["full", "full"]


@torch.no_grad()
def test_part_of_a_model_alone() -> None:
    """A vision tower, a decoder: a swap of a part rules that part alone."""
    model = make("BART")
    words = {"decoder_input_ids": IDS}
    with sa.swap(model.get_encoder(), SPEC) as swapped:
        found = model(IDS, **words).logits
    assert len(swapped.report) == 2
    with sa.swap(model, "full", layers={"model.encoder": SPEC}):
        torch.testing.assert_close(model(IDS, **words).logits, found)


def test_parameters_and_buffers_may_move_meanwhile() -> None:
    """`to`, `half` and weight loading are the person's, in a swap too."""
    model = make()
    with torch.no_grad(), sa.swap(model, SPEC):
        single = model(IDS).logits
        model.double()
        double = model(IDS).logits
        model.load_state_dict(make().state_dict())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single)
