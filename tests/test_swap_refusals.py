"""What a swapped mechanism cannot do: said in words, or served by the original and reported."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import ARCHITECTURES
from torch import Tensor, nn

import sparseattn as sa

WINDOW = "windowed(window=8, sinks=0)"
IDS = tiny_models.tokens()


@torch.no_grad()
def logits(model: nn.Module, **words: Any) -> Tensor:
    return model(IDS, **words).logits  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Any:
    return ARCHITECTURES["Llama"].make()


def test_a_refusal_is_raised_with_the_module_or_falls_back_with_the_reason() -> None:
    model = ARCHITECTURES["Gemma2"].make()  # softcap, and a window of its own
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused = pytest.raises(sa.UnsupportedCallError, match=r"layers\.0\.self_attn")
        with refused as caught, sa.swap(model, "linear"):
            logits(model)
        assert len(str(caught.value)) < 600 and caught.value.reasons
        with sa.swap(
            model, "linear", on_unsupported="full", layers={"*layers.1": WINDOW}
        ) as swapped:
            within = logits(model)
        with sa.swap(model, "full", layers={"*layers.1": WINDOW}):
            wanted = logits(model)
        nothing = pytest.raises(sa.SwapError, match=r"original attention served all 2 calls")
        with nothing, sa.swap(model, "linear", on_unsupported="full"):
            assert torch.equal(logits(model), before)
    torch.testing.assert_close(within, wanted)
    assert [record.fallback for record in swapped.report] == [1, 0]
    assert "linear" in swapped.report[0].reason and not swapped.report[1].reason


def test_an_explicit_impl_never_falls_back(model: Any) -> None:
    refused = pytest.raises(sa.SparseAttnError, match="its kernels run on a GPU")
    with refused, sa.swap(model, WINDOW, impl="triton", on_unsupported="full"):
        logits(model)
    with sa.swap(model, WINDOW, impl="reference") as swapped:
        logits(model)
    assert {record.impl for record in swapped.report} == {"reference"}


def test_dropout_while_training_is_refused_in_words() -> None:
    model = ARCHITECTURES["Llama"].make()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with sa.swap(model, WINDOW):
        logits(model)  # not while evaluating
        model.train()
        with pytest.raises(sa.UnsupportedCallError, match="dropout"):
            logits(model)


def test_attention_maps_are_refused_not_silently_none() -> None:
    for name in ("Llama", "BERT"):
        model = ARCHITECTURES[name].make()
        with sa.swap(model, WINDOW) as swapped, torch.no_grad():
            model(IDS)
            with pytest.raises(sa.UnsupportedCallError, match="output_attentions"):
                model(IDS, output_attentions=True)
            swapped.restore()
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        refused = pytest.raises(sa.UnsupportedCallError, match="output_attentions")
        with refused, sa.swap(model, WINDOW), torch.no_grad():
            model(IDS)


@dataclass(frozen=True)
class EveryOther(sa.MaskedSoftmax):
    """Keys at an even distance. Not registered anywhere."""

    name = "every_other"

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j) % 2 == 0


def test_a_mechanism_that_nobody_registered(model: Any) -> None:
    before = logits(model)
    with sa.swap(model, EveryOther()) as swapped:
        within = logits(model)
        cache = sa.make_cache(model)
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in IDS.split(13, 1)]
    assert swapped.report[0].mechanism == "every_other"
    assert not torch.equal(within, before)
    torch.testing.assert_close(torch.cat(parts, 1), within)


@pytest.mark.parametrize("spec", ["full", WINDOW, "topk_blocks", "performer", "retention"])
def test_mechanisms_of_every_nature(spec: str) -> None:
    model = ARCHITECTURES["Llama"].make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sa.swap(model, spec) as swapped:
            found = logits(model)
    assert found.isfinite().all()
    assert all(record.calls == 1 and not record.fallback for record in swapped.report)


def test_a_mechanism_that_looks_ahead_serves_a_prompt_alone(model: Any) -> None:
    with sa.swap(model, "vertical_slash"):
        assert logits(model, use_cache=False).isfinite().all()
        with pytest.raises(sa.SparseAttnError, match="ahead"):
            model(IDS)
        with pytest.raises(sa.SparseAttnError, match="ahead"), torch.no_grad():
            model(IDS, past_key_values=sa.make_cache(model))
