"""make_cache: what a cache keeps, every way of generating with it, and how it says no."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import ARCHITECTURES
from torch import Tensor
from transformers import DynamicCache, StaticCache

import sparseattn as sa
from sparseattn.integrations.decoding import nbytes

SPEC = "windowed(window=6, sinks=2)"
IDS = tiny_models.tokens()
MASK = tiny_models.padding("left")


def llama() -> Any:
    return ARCHITECTURES["Llama"].make()


@contextlib.contextmanager
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def generated(model: Any, cache: Any = None, ids: Tensor = IDS, **words: Any) -> Tensor:
    words = {"attention_mask": MASK[:, : ids.shape[1]], "max_new_tokens": 9, **words}
    if "do_sample" not in words:
        words["do_sample"] = False
    torch.manual_seed(0)
    with quiet():
        return model.generate(ids, past_key_values=cache, **words)  # type: ignore[no-any-return]


SPECS = {
    "windowed": SPEC,
    "full": "full",
    "linear": "linear",
    "performer": "performer",
    "retention": "retention",
    "topk_blocks": "topk_blocks",
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_greedy_tokens_are_those_of_recomputing_everything(spec: str) -> None:
    model = llama()
    with quiet(), torch.no_grad(), sa.swap(model, spec):
        found = generated(model, sa.make_cache(model))
        ids, mask = IDS, MASK
        for _ in range(9):
            places = (mask.cumsum(-1) - 1).clamp(min=0)  # a linear mechanism sees their rotation
            logits = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    assert torch.equal(found, ids)


WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "beams that penalise": {"num_beams": 2, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("layers", [None, {"*layers.1.*": "full"}], ids=["one", "mixed"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_is_that_of_the_models_own_cache(way: str, layers: Any) -> None:
    model = llama()
    with sa.swap(model, SPEC, layers=layers):
        wanted = generated(model, DynamicCache(config=model.config), **WAYS[way])
        found = generated(model, sa.make_cache(model), **WAYS[way])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "way", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=["lookup", "assisted"]
)
def test_taking_tokens_back_is_refused_or_right(way: dict[str, Any]) -> None:
    model = llama()
    if "assistant_model" in way:
        way = {"assistant_model": llama()}
    ids, mask = IDS[1:], MASK[1:]
    with sa.swap(model, SPEC):
        wanted = generated(model, None, ids, attention_mask=mask)
        assert torch.equal(generated(model, None, ids, attention_mask=mask, **way), wanted)
        try:
            found = generated(model, sa.make_cache(model), ids, attention_mask=mask, **way)
        except (sa.SwapError, ValueError) as error:
            assert "cache" in str(error)
        else:
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_caches_of_transformers_under_a_swap(kind: str) -> None:
    model = llama()
    with sa.swap(model, SPEC):
        wanted = generated(model, None)
        found = generated(model, None, cache_implementation=kind)
    assert torch.equal(found, wanted)


def test_out_of_a_swap_it_is_the_models_own() -> None:
    for name in ("Llama", "Gemma3", "BART"):
        model = ARCHITECTURES[name].make()
        cache = sa.make_cache(model)
        own = model(IDS, decoder_input_ids=IDS).past_key_values if name == "BART" else None
        if own is None:
            own = DynamicCache(config=model.config)
            assert [type(a) for a in cache.layers] == [type(b) for b in own.layers]
        assert type(cache) is type(own)
        assert torch.equal(generated(model, cache), generated(model, None))


def test_encoder_decoder_generation() -> None:
    for name in ("BART", "Marian"):
        model = ARCHITECTURES[name].make()
        for way in ({}, {"num_beams": 3}):
            with sa.swap(model, SPEC):
                wanted = generated(model, None, max_new_tokens=14, **way)
                cache = sa.make_cache(model)
                found = generated(model, cache, max_new_tokens=14, **way)
            assert torch.equal(found, wanted)


def test_a_position_bias_needs_all_keys_and_a_window_drops_them() -> None:
    model = ARCHITECTURES["T5"].make()
    with sa.swap(model, SPEC):
        wanted = generated(model, None)
        with pytest.raises(sa.UnsupportedCallError, match=r"bias.*own cache"):
            generated(model, sa.make_cache(model))
    with sa.swap(model, SPEC, layers={"decoder": "full"}):
        assert generated(model, sa.make_cache(model)).shape[0] == wanted.shape[0]


def test_memory_is_constant_with_a_window() -> None:
    model = llama()
    held = []
    with torch.no_grad(), sa.swap(model, SPEC):
        cache = sa.make_cache(model)
        for at in range(40):
            model(IDS[:, at : at + 1], past_key_values=cache)
            held.append(nbytes(cache))
        # keys and values of 8 tokens, 2 rows, 2 heads of 16 numbers of 4 bytes, in 2 layers
        assert held[-1] == held[10] == 2 * 2 * (2 * 2 * 8 * 16 * 4)
        assert [layer.get_seq_length() for layer in cache.layers] == [40, 40]
        gone = weakref.ref(cache.layers[0])
        del cache
        gc.collect()
        assert gone() is None


def test_a_prompt_in_chunks_and_reset() -> None:
    model = llama()
    with torch.no_grad(), sa.swap(model, SPEC):
        whole = model(IDS, attention_mask=MASK).logits
        cache = sa.make_cache(model)
        for _ in range(2):
            parts = [
                model(
                    IDS[:, at : at + 7], attention_mask=MASK[:, : at + 7], past_key_values=cache
                ).logits
                for at in range(0, 40, 7)
            ]
            torch.testing.assert_close(torch.cat(parts, 1)[MASK > 0], whole[MASK > 0])
            cache.reset()
            assert cache.get_seq_length() == 0 and nbytes(cache) == 0


def test_reorder_crop_and_batch_operations() -> None:
    model = llama()
    with torch.no_grad(), sa.swap(model, SPEC):
        cache = sa.make_cache(model)
        model(IDS, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        found = model(IDS[1:, :1].expand(2, 1), past_key_values=cache).logits
        assert torch.equal(found[0], found[1])
        for refused in (
            lambda: cache.crop(-3),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.batch_select_indices(torch.tensor([0])),
        ):
            with pytest.raises(sa.SwapError, match="own cache"):
                refused()


def test_a_cache_used_after_restore_raises() -> None:
    model = llama()
    with torch.no_grad():
        with sa.swap(model, SPEC):
            cache = sa.make_cache(model)
            model(IDS, past_key_values=cache)
        with pytest.raises(sa.SwapError, match="outside of the swap"):
            model(IDS[:, :1], past_key_values=cache)
        with sa.swap(model, "windowed(window=3)"):
            model(IDS)
            with pytest.raises(sa.SwapError, match="windowed"):
                model(IDS[:, :1], past_key_values=cache)
            unused = sa.make_cache(model)
        assert unused.get_seq_length() == 0
        other = llama()
        with sa.swap(model, SPEC):
            cache = sa.make_cache(model)
            model(IDS, past_key_values=cache)
            with pytest.raises(sa.SwapError):
                other(IDS, past_key_values=cache)


def test_a_failed_forward_leaves_the_cache_usable_or_says_so() -> None:
    model = llama()

    def fails(*_: Any) -> None:
        raise LookupError

    with torch.no_grad(), sa.swap(model, SPEC):
        wanted = model(IDS).logits
        cache = sa.make_cache(model)
        model(IDS[:, :20], past_key_values=cache)
        # before the first layer, between the layers, and between update and attention
        hook = model.model.layers[0].register_forward_pre_hook(fails)
        with pytest.raises(LookupError):
            model(IDS[:, 20:], past_key_values=cache)
        hook.remove()
        found = model(IDS[:, 20:], past_key_values=cache).logits
        torch.testing.assert_close(found, wanted[:, 20:])

        cache = sa.make_cache(model)
        model(IDS[:, :20], past_key_values=cache)
        hook = model.model.layers[0].mlp.register_forward_hook(fails)
        with pytest.raises(LookupError):
            model(IDS[:, 20:], past_key_values=cache)
        hook.remove()
        with pytest.raises(sa.SwapError, match="forward"):
            model(IDS[:, 20:], past_key_values=cache)
        cache.reset()
        torch.testing.assert_close(model(IDS, past_key_values=cache).logits, wanted)

        cache = sa.make_cache(model)
        with pytest.raises(sa.UnsupportedCallError):
            model(IDS, past_key_values=cache, output_attentions=True)
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(IDS, past_key_values=cache).logits, wanted)


def test_gradients_and_custom_masks_with_a_cache_are_refused() -> None:
    model = llama()
    dense = torch.ones(40, 40).tril().bool()[None, None].expand(2, 1, 40, 40).clone()
    dense[:, :, 20:, 3] = False
    with sa.swap(model, SPEC):
        with pytest.raises(sa.SparseAttnError, match="gradient"):
            model(IDS, past_key_values=sa.make_cache(model))
        with torch.no_grad():
            model(IDS, past_key_values=sa.make_cache(model))
            with pytest.raises(sa.SparseAttnError, match="cache"):
                model(IDS, past_key_values=sa.make_cache(model), attention_mask=dense)


def test_autocast_makes_a_cache_of_its_dtype() -> None:
    model = llama()
    with sa.swap(model, SPEC), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(IDS).logits
        cache = sa.make_cache(model)
        parts = [model(part, past_key_values=cache).logits for part in IDS.split(9, 1)]
        assert {layer.cache.dtype for layer in cache.layers} == {torch.bfloat16}
    # Rounding of bfloat16 apart, which the model's own layers do in another order too.
    with torch.no_grad(), sa.swap(model, SPEC):
        exact = model(IDS).logits
    assert float((torch.cat(parts, 1) - exact).norm()) <= 2 * float((whole - exact).norm())


def test_what_is_no_transformers_model_is_refused() -> None:
    for wrong in (torch.nn.Linear(2, 2), "model", None):
        with pytest.raises(sa.InvalidInputError, match="transformers model"):
            sa.make_cache(wrong)  # type: ignore[arg-type]


def test_a_nested_swap_rules_the_cache() -> None:
    model = llama()
    with torch.no_grad(), sa.swap(model, "full"), sa.swap(model.model.layers[1], SPEC):
        whole = model(IDS).logits
        cache = sa.make_cache(model)
        kinds = [type(layer).__name__ for layer in cache.layers]
        parts = [model(part, past_key_values=cache).logits for part in IDS.split(9, 1)]
    assert kinds == ["DynamicLayer", "MechanismCacheLayer"]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_static_cache_compiles() -> None:
    model = llama()
    with torch.no_grad(), sa.swap(model, SPEC):
        wanted = generated(model, None, max_new_tokens=4)
        cache = StaticCache(config=model.config, max_cache_len=64)
        compiled = torch.compile(model, backend="eager")
        ids, mask = IDS, MASK
        logits = compiled(ids, attention_mask=mask, past_key_values=cache).logits
        for _ in range(4):
            new = logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, mask.new_ones(2, 1)], 1)
            logits = compiled(new, attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(ids, wanted)


@pytest.mark.parametrize("name", ["Mistral", "Gemma3", "GPT-OSS"])
def test_the_models_own_window_fills_while_generating(name: str) -> None:
    model = ARCHITECTURES[name].make()  # its own window is 12; the prompt is shorter
    words = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    with sa.swap(model, "windowed(window=16, sinks=2)"):
        found = generated(model, sa.make_cache(model), IDS[:, -5:], **words)
        assert torch.equal(found, generated(model, None, IDS[:, -5:], use_cache=False, **words))
