"""Every architecture of the table in docs/compatibility.md: what a swap does to it, measured."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, LENGTH
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import sdpa_mask

import sparseattn as sa
from sparseattn.integrations import places
from sparseattn.testing import budgets

WINDOW = 8
PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    *,
    scale: float | None,
    window: int | None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention as written in a textbook, with a band where there is a window."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    n, m = scores.shape[-2:]
    if allowed is not None:
        if allowed.dtype != torch.bool:
            allowed = allowed == 0
        scores = scores.masked_fill(~allowed, float("-inf"))
    if window is not None:
        distance = torch.arange(n)[:, None] + (m - n) - torch.arange(m)
        scores = scores.masked_fill(distance.abs() >= window, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., :m]
    return weights @ v


def is_cross(module: nn.Module) -> bool:
    return bool(getattr(module, "crosses_now", False))


@contextlib.contextmanager
def textbook(model: nn.Module, window: int | None) -> Iterator[None]:
    """Textbook attention in the place of the model's own; cross-attention keeps all its keys."""

    def function(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **words: Any
    ) -> tuple[Tensor, None]:
        n, m = q.shape[2], k.shape[2]
        causal = words.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        cross = "cross" in type(module).__name__.lower() or is_cross(module)
        if mask is None and causal and n > 1 and not cross:
            mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        out = naive(
            q,
            k,
            v,
            mask,
            scale=words.get("scaling"),
            window=None if cross else window,
            bias=words.get("position_bias"),
            softcap=words.get("softcap"),
            sinks=words.get("s_aux"),
        )
        return out.transpose(1, 2).contiguous(), None

    def dense(**given: Any) -> Tensor | None:
        return sdpa_mask(**{**given, "allow_is_causal_skip": False})

    def sdpa(q: Any, k: Any, v: Any, attn_mask: Any = None, *_: Any, **words: Any) -> Tensor:
        mask = attn_mask
        if mask is None and words.get("is_causal"):
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        return naive(q, k, v, mask, scale=words.get("scale"), window=window)

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states = ("key_value_states", "encoder_hidden_states")
        module.crosses_now = any(kwargs.get(word) is not None for word in states)  # type: ignore

    AttentionInterface.register("textbook", function)
    AttentionMaskInterface.register("textbook", dense)
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules()]
    before, torch_sdpa = model.config._attn_implementation, F.scaled_dot_product_attention
    if "Falcon" in type(model).__name__:
        F.scaled_dot_product_attention = sdpa  # type: ignore[assignment]
    else:
        model.set_attn_implementation("textbook")
    try:
        yield
    finally:
        F.scaled_dot_product_attention = torch_sdpa
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


def oracle(name: str, pad: str | None, window: int | None) -> tuple[Tensor, Tensor]:
    """The output of textbook attention in float64 and in float32."""
    architecture = ARCHITECTURES[name]
    found = []
    for dtype in (torch.float64, torch.float32):
        model = architecture.make().to(dtype)
        with textbook(model, window):
            found.append(tiny_models.run(architecture, model, pad))
    return found[0], found[1]


PADS = {"vision": (None,), "encoder-decoder": (None, "right")}
# Its attention is given other keys than its cache: those are compressed.
NO_CACHE_OF_OURS = {"DeepSeek-V3"}
HEADER = (
    "| architecture | kind | its attention | `full` | `windowed` | checked with | caches |\n"
    "|---|---|---|---|---|---|---|"
)


def line(name: str, original: str, route: str) -> str:
    """The row of an architecture that passes its tests."""
    kind = ARCHITECTURES[name].kind
    full = "bit for bit" if original == "sdpa" else "within budget"
    pads = PADS.get(kind, (None, "left", "right"))
    checked = ", ".join(f"{pad} padding" if pad else "no padding" for pad in pads)
    if kind == "encoder-decoder":
        checked += ", cross-attention"
    caches = "-"
    if kind == "decoder":
        kinds = ["dynamic", "static"] + ["`make_cache`"] * (name not in NO_CACHE_OF_OURS)
        caches = ", ".join(kinds)
    return (
        f"| {name} | {kind} | {route}, {original} | {full} | the dense mask | {checked} "
        f"| {caches} |"
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_is_the_original_and_a_window_is_the_dense_mask(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.make()
    ran = model.config._attn_implementation
    for pad in PADS.get(architecture.kind, (None, "left", "right")):
        original = tiny_models.run(architecture, model, pad)
        with sa.swap(model, "full", impl="torch") as exact:
            full = tiny_models.run(architecture, model, pad)
        with sa.swap(model, "windowed", window=WINDOW) as swapped:
            windowed = tiny_models.run(architecture, model, pad)
        assert torch.equal(tiny_models.run(architecture, model, pad), original)
        # SigLIP's pooling is torch's attention with need_weights=True, which computes its own.
        attending = [record for record in exact.report if record.module != "head.attention"]
        assert attending and all(record.calls for record in attending)
        assert not any(record.fallback for record in swapped.report)
        crossing = [r for r in swapped.report if r.reason == "cross-attention stays exact"]
        assert len(crossing) == 2 * (architecture.kind == "encoder-decoder")

        ref, low = oracle(name, pad, None)
        if ran == "sdpa":
            assert torch.equal(full, original)
        assert budgets.distance(full, ref) <= budgets.rule(low, ref, torch.float32)
        ref, low = oracle(name, pad, WINDOW)
        budget = budgets.rule(low, ref, torch.float32)
        assert budgets.distance(windowed, ref) <= budget
        assert 100 * budget < budgets.distance(windowed, original)
    asks = any(places.asks_transformers(module) for module in model.modules())
    assert line(name, ran, "transformers" if asks else "SDPA") in PAGE.read_text().splitlines()


def test_the_page_has_no_other_row() -> None:
    page = PAGE.read_text()
    assert HEADER in page
    rows = [text for text in page.splitlines() if text.startswith("| ")][1:]
    assert [text.split(" | ")[0][2:] for text in rows] == list(ARCHITECTURES)


@pytest.mark.parametrize("kind", ["dynamic", "static", "fitting"])
@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.kind == "decoder"])
def test_decoding_in_chunks_is_one_forward(name: str, kind: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.make()
    mask, ids = tiny_models.padding("left"), tiny_models.tokens()
    if kind == "fitting" and name in NO_CACHE_OF_OURS:
        with pytest.raises(sa.SwapError, match="use its own cache"), sa.swap(model, "windowed"):
            model(ids, past_key_values=sa.make_cache(model))
        return
    spec = "windowed(window=8, sinks=2)" if kind == "fitting" else "windowed(window=8)"
    with torch.no_grad(), sa.swap(model, spec):
        cache: Any = sa.make_cache(model)
        if kind == "dynamic":
            cache = DynamicCache(config=model.config)
        elif kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=LENGTH + 8)
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        cuts = [0, 20, 33, *range(34, LENGTH + 1)]
        parts = []
        for start, end in itertools.pairwise(cuts):
            parts.append(
                model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    past_key_values=cache,
                    use_cache=True,
                ).logits
            )
    found = torch.cat(parts, 1)[mask.bool()]
    model64 = copy.deepcopy(model).double()
    with torch.no_grad(), sa.swap(model64, spec):
        ref = model64(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    assert budgets.distance(found, ref) <= budgets.rule(whole[mask.bool()], ref, torch.float32)


if __name__ == "__main__":  # the table, for the page
    print(HEADER)
    for name, architecture in ARCHITECTURES.items():
        model = architecture.make()
        asks = any(places.asks_transformers(module) for module in model.modules())
        print(line(name, model.config._attn_implementation, "transformers" if asks else "SDPA"))
