"""Swaps in models that call torch's scaled_dot_product_attention, held to a dense oracle."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as early_bound

import sparseattn as sa
from sparseattn.testing import budgets

TORCH_SDPA = F.scaled_dot_product_attention
WINDOW = 4
SPEC = "windowed(window=4, sinks=0)"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def band(n: int, m: int, offset: int) -> Tensor:
    """True where a window of 4 sees, with query 0 at key position `offset`."""
    return (torch.arange(n)[:, None] + offset - torch.arange(m)).abs() < WINDOW


class Calls(nn.Module):
    """A person's own module: whatever it is called with goes to torch's attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(*args, **kwargs)


class CallsEarlyBound(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return early_bound(*args, **kwargs)


class CallsHelper(nn.Module):
    """As diffusers does: a processor that is no module makes the call."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = lambda *args, **kwargs: torch.nn.functional.scaled_dot_product_attention(
            *args, **kwargs
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.processor(*args, **kwargs)


def close(found: Tensor, wanted: Any, *args: Tensor) -> None:
    """Within the budget of `wanted`, a function of tensors, in float64."""
    ref = wanted(*(x.double() for x in args))
    naive = wanted(*args)
    assert found.shape == ref.shape
    assert budgets.distance(found, ref) <= budgets.rule(naive, ref, torch.float32)


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


def layers(kind: str, dropout: float = 0.0, **words: Any) -> nn.Module:
    torch.manual_seed(3)
    given: dict[str, Any] = {"batch_first": True, "dropout": dropout, **words}
    if kind == "encoder layer":
        return nn.TransformerEncoderLayer(32, 4, 48, **given).eval()
    if kind == "encoder":
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, **given), 2).eval()
    if kind == "decoder layer":
        return nn.TransformerDecoderLayer(32, 4, 48, **given).eval()
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, **given), 2).eval()


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


# Whose call it is.


class Mixed(nn.Module):
    """A transformers model, and attention of the person's own after it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ARCHITECTURES["BERT"].make()
        self.head = Calls()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body(ids)[0]
        return self.head(x, x, x)


@torch.no_grad()
def test_a_model_of_both_kinds() -> None:
    model, ids = Mixed(), tiny_models.tokens()
    before = model(ids)
    with sa.swap(model, SPEC) as swapped:
        found = model(ids)
    assert [r.calls for r in swapped.report] == [1, 1, 1]
    assert swapped.report[-1].module == "head"
    with sa.swap(model.body, SPEC):
        x = model.body(ids)[0]
    close(found, lambda x: early_bound(x, x, x, attn_mask=band(x.shape[1], x.shape[1], 0)), x)
    with sa.swap(model, SPEC, layers={"head": "full"}):
        assert torch.equal(model(ids), early_bound(x, x, x))
    assert torch.equal(model(ids), before)


def test_a_failed_call_leaves_nothing_entered() -> None:
    other = Calls()
    q = draw(1, 2, 20, 8)

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = Calls()

        def forward(self, q: Tensor) -> Tensor:
            self.calls(q, q, q)
            raise LookupError("mine")

    bad = Fails()
    with sa.swap(bad, SPEC):
        with pytest.raises(LookupError, match="mine"):
            bad(q)
        assert torch.equal(other(q, q, q), early_bound(q, q, q))
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), early_bound(q, q, q))
    assert F.scaled_dot_product_attention is TORCH_SDPA


def test_restoring_inside_a_forward_leaves_nothing_entered() -> None:
    q = draw(1, 2, 20, 8)
    handles: list[Any] = []

    class Restores(Calls):
        def forward(self, q: Tensor) -> Tensor:
            handles.pop().restore()
            return super().forward(q, q, q)

    model = Restores()
    handles.append(sa.swap(model, SPEC))
    model(q)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert F.scaled_dot_product_attention is TORCH_SDPA


def test_threads_do_not_see_one_another() -> None:
    q = draw(1, 2, 40, 8)
    models = [Calls(), CallsEarlyBound(), Calls()]
    specs = ["windowed(window=2)", "windowed(window=9)", None]
    plain = early_bound(q, q, q)
    wanted = []
    for model, spec in zip(models, specs, strict=True):
        if spec is None:
            wanted.append(plain)
        else:
            with sa.swap(model, spec):
                wanted.append(model(q, q, q))
    wrong: list[int] = []
    start = threading.Barrier(3)

    def work(index: int) -> None:
        start.wait()
        for _ in range(20):
            if specs[index] is None:
                found = models[index](q, q, q)
            else:
                with sa.swap(models[index], specs[index]):
                    found = models[index](q, q, q)
            if not torch.equal(found, wanted[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert F.scaled_dot_product_attention is TORCH_SDPA


@pytest.mark.parametrize(
    "spec", ["topk_blocks", "performer", "retention", "linear", "vertical_slash"]
)
def test_other_natures(spec: str) -> None:
    q = draw(1, 2, 40, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sa.swap(model := Calls(), spec) as swapped:
            found = model(q, q, q, is_causal=True)
    wanted = sa.attention(q, q, q, spec, causal=True)
    assert torch.equal(found, wanted)
    assert swapped.report[0].impl not in (None, "") and swapped.report[0].calls == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["encoder layer", "own"])
def test_compiled_before_or_within_a_swap(kind: str) -> None:
    """torch.compile does not look at hooks again: a swap must not be lost on compiled code."""
    x = draw(2, 20, 32)
    model: nn.Module = layers("encoder layer") if kind == "encoder layer" else Own()
    before = model(x)
    early = torch.compile(model, backend="eager")
    torch.testing.assert_close(early(x), before)
    with sa.swap(model, SPEC) as swapped:
        eager = model(x)
        for compiled in (early, torch.compile(model, backend="aot_eager")):
            torch.testing.assert_close(compiled(x), eager)
    assert sum(r.calls for r in swapped.report) == 3
    assert not torch.equal(eager, before)
    torch.testing.assert_close(early(x), before)
    torch.testing.assert_close(compiled(x), before)


class Own(nn.Module):
    """Attention two modules down, behind a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([CallsEarlyBound()])

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        return self.inner[0](x, x, x) + 1


def test_autocast_reaches_the_mechanism() -> None:
    model = layers("encoder layer")
    x = draw(2, 20, 32)
    with torch.no_grad(), sa.swap(model, SPEC), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        dense = model(x, ~band(20, 20, 0))
    with torch.no_grad():
        ref = layers("encoder layer").double()(x.double(), ~band(20, 20, 0))
    assert budgets.distance(found, ref) <= budgets.rule(dense, ref, torch.bfloat16)
