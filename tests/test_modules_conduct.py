"""`sa.MultiheadAttention` in torch's layers, copied, traced, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from module_pairs import (
    ADDED,
    CAUSAL,
    PAD,
    RIGHT,
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

# --- inside torch's own layers --------------------------------------------------------------------


def encoder(layers: int = 2, **keywords: Any) -> nn.TransformerEncoder:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(
        E, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64, **keywords
    )
    return nn.TransformerEncoder(layer, layers)


def swapped(whole: nn.TransformerEncoder, spec: str, **keywords: Any) -> nn.TransformerEncoder:
    whole = copy.deepcopy(whole)
    for layer in whole.layers:
        layer.self_attn = sa.MultiheadAttention.from_torch(layer.self_attn, spec, **keywords)
    return whole


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("pad", [None, RIGHT, RIGHT.flip(1)], ids=["none", "right", "left"])
@pytest.mark.parametrize("spec", ["full", "windowed(window=2)", "linear"])
def test_the_fast_path_of_an_encoder_does_not_go_past_the_mechanism(spec: str, pad: Any) -> None:
    original = encoder()
    model = swapped(original, spec)
    x = randn(B, M, E)
    kept = torch.ones(B, M, dtype=torch.bool) if pad is None else ~pad
    expected = model.train()(x, src_key_padding_mask=pad)[kept]  # no fast path while training
    original.train()
    exact = original(x, src_key_padding_mask=pad)[kept]
    for one in (model, nn.TransformerEncoder(model.layers[0], 2)):
        with torch.no_grad():
            found = one.eval()(x, src_key_padding_mask=pad)[kept]
        assert close(found, expected)
        assert close(found, exact) is (spec == "full")
    # The layer alone, and one swapped layer among torch's own.
    with torch.no_grad():
        single, plain = model.layers[0], original.layers[0]
        found = single.eval()(x, src_key_padding_mask=pad)[kept]
        assert close(found, single.train()(x, src_key_padding_mask=pad)[kept])
        assert close(found, plain.eval()(x, src_key_padding_mask=pad)[kept]) is (spec == "full")
        for at in range(2):
            mixed = copy.deepcopy(original)
            mixed.layers[at].self_attn = copy.deepcopy(model.layers[at].self_attn)
            slow = mixed.train()(x, src_key_padding_mask=pad)[kept]
            assert close(mixed.eval()(x, src_key_padding_mask=pad)[kept], slow)


@pytest.mark.parametrize("spec", ["full", "windowed(window=3)", "linear"])
def test_an_encoder_with_a_causal_mask(spec: str) -> None:
    original = encoder()
    x, mask = randn(B, M, E), nn.Transformer.generate_square_subsequent_mask(M).double()
    ours = swapped(original, spec)
    theirs = mask if spec != "windowed(window=3)" else banded(M, 3)
    found = ours(x, mask=mask)  # the encoder sees that it is causal, and says so
    assert close(found, original(x, mask=theirs)) is (spec != "linear")
    always = swapped(original, spec, causal=True)
    assert close(found, always(x))


def test_a_decoder_layer() -> None:
    torch.manual_seed(2)
    keywords = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    original = nn.TransformerDecoderLayer(E, H, 32, **keywords)
    layer = copy.deepcopy(original)
    layer.self_attn = sa.MultiheadAttention.from_torch(layer.self_attn, "windowed(window=3)")
    layer.multihead_attn = sa.MultiheadAttention.from_torch(layer.multihead_attn)
    x, memory = randn(B, M, E), randn(B, N, E, seed=1)
    found = layer(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True)
    assert close(found, original(x, memory, tgt_mask=banded(M, 3)))


# --- what a module must live through --------------------------------------------------------------


def test_copies_and_files() -> None:
    module = grouped(mechanism="windowed", window=3, rotary_base=100.0, causal=True)
    x = randn(B, N, E)
    expected = module(x, x, x)[0]
    twin = grouped(mechanism="windowed(window=3)", rotary_base=100.0, causal=True)
    nn.init.zeros_(twin.in_proj_weight)
    twin.load_state_dict(module.state_dict())
    for other in (twin, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, x, x)[0], expected)
        assert repr(other) == repr(module)
    text = "24, 4, mechanism=windowed(window=3, sinks=0), num_kv_heads=2, batch_first=True"
    assert text in repr(module)


def test_from_torch_copies() -> None:
    theirs = torch_module(dropout=0.1, kdim=10).eval()
    theirs.in_proj_bias.requires_grad_(False)
    ours = sa.MultiheadAttention.from_torch(theirs)
    assert ours.dropout == 0.1 and not ours.training
    assert not ours.in_proj_bias.requires_grad and ours.out_proj.weight.requires_grad
    nn.init.zeros_(ours.out_proj.weight)
    assert theirs.out_proj.weight.any()


def test_autocast() -> None:
    module = grouped(rotary_base=100.0).float()
    x = randn(B, N, E).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, weights = module(x, x, x)
        naive, _ = sa.MultiheadAttention.from_torch(torch_module(batch_first=True)).float()(x, x, x)
        cache = module.new_cache(B, dtype=torch.bfloat16)
        module(x, x, x, need_weights=False, is_causal=True, cache=cache)
    assert out.dtype == weights.dtype == naive.dtype == torch.bfloat16 and cache.length == N


class Alone(nn.Module):
    """A module's output without its map, and one input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.attention = module

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.attention(x, x, x, pad, need_weights=False)[0]


def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    module = Alone(grouped(mechanism="windowed(window=3)", rotary_base=100.0, causal=True))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (M, 6):
        x, pad = randn(B, n, E).requires_grad_(), RIGHT[:, :n]
        out, expected = compiled(x, pad), module(x, pad)
        assert torch.equal(out, expected)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in (out, expected)]
        assert torch.equal(*grads)
    # Another mechanism is another program, never the old one.
    module.attention.mechanism = "windowed(window=1)"
    assert torch.equal(compiled(x, pad), module(x, pad))


def test_compiled_code_reads_the_masks_that_tracing_cannot() -> None:
    torch._dynamo.reset()
    module = grouped()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def run(x: Tensor, pad: Tensor | None, mask: Tensor | None) -> Any:
        return module(x, x, x, pad, attn_mask=mask, is_causal=mask is not None)

    x, pad = randn(B, M, E), torch.zeros(B, M).masked_fill(RIGHT, -torch.inf)
    for a, b in zip(run(x, pad, CAUSAL), module(x, x, x, RIGHT, is_causal=True), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="other numbers than 0 and -inf"):
        run(x, pad - 1, CAUSAL)
    with pytest.raises(RuntimeError, match="not the causal mask"):
        run(x, pad, CAUSAL.T)


def test_export_survives_a_file() -> None:
    module = Alone(grouped(mechanism="windowed(window=3)", rotary_base=100.0)).eval()
    length = torch.export.Dim("n", min=2, max=64)
    shapes = {"x": {1: length}, "pad": {1: length}}
    program = torch.export.export(module, (randn(B, M, E), RIGHT), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for n in (M, 6):
        x = randn(B, n, E)
        assert torch.equal(loaded(x, RIGHT[:, :n]), module(x, RIGHT[:, :n]))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"add_bias_kv": True}, "add_bias_kv=True"),
        ({"add_zero_attn": True}, "sink_logits"),
        ({"num_heads": 5}, "embed_dim is 24"),
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"num_heads": 8, "rotary_base": 10000.0}, "even width: got 10000.0 and 3"),
        ({"rotary_base": -1.0}, "greater than 0"),
        ({"embed_dim": 24.0}, "embed_dim"),
        ({"mechanism": "windowd"}, "windowed"),
        ({"breadth": 3}, "breadth"),
        ({"mechanism": "windowed(window=3)", "sinks": 1}, "sinks"),
    ],
)
def test_a_module_that_cannot_be_is_refused(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(sa.SparseAttnError, match=said):
        sa.MultiheadAttention(**{"embed_dim": E, "num_heads": H, **keywords})


X, Y = randn(B, N, E), randn(B, M, E)


@pytest.mark.parametrize(
    ("error", "call", "said"),
    [
        ("input", {"query": X.float()}, "query has dtype torch.float32"),
        ("input", {"key": X[..., :-1]}, "key has width 23, expected 24"),
        ("input", {"value": X[0]}, "value must be a tensor"),
        ("input", {"key": X[:1], "value": X[:1]}, "share their batch"),
        ("input", {"value": Y}, "share their batch"),
        ("input", {"query": None}, "query must be a tensor"),
        ("input", {"key_padding_mask": PAD}, "key_padding_mask must have shape"),
        ("input", {"key_padding_mask": torch.ones(B, N)}, "other numbers than 0 and -inf"),
        ("input", {"key_padding_mask": torch.ones(B, N).int()}, "True where ignored"),
        ("input", {"attn_mask": CAUSAL}, "attn_mask must have shape"),
        ("input", {"attn_mask": CAUSAL[:N, :N].T, "is_causal": True}, "not the causal mask"),
        ("input", {"attn_mask": ADDED[:, :N], "is_causal": True}, "not the causal mask"),
        ("input", {"is_causal": 1}, "causal must be True or False"),
        ("call", {"key": Y, "value": Y, "cache": True}, "need_weights=False"),
    ],
)
def test_a_call_that_is_malformed_is_refused(error: str, call: dict[str, Any], said: str) -> None:
    module = grouped()
    given = {"query": X, "key": X, "value": X, **call}
    if "cache" in given:
        given["cache"] = module.new_cache(B)
    kind = sa.InvalidInputError if error == "input" else sa.UnsupportedCallError
    with pytest.raises(kind, match=said):
        module(**given)


@pytest.mark.parametrize(
    ("spec", "call", "said"),
    [
        ("linear", {"attn_mask": CAUSAL[:N, :N]}, "is_causal=True"),
        ("topk_blocks", {"attn_mask": CAUSAL[:N, :N]}, "a part in the choice"),
        ("retention", {}, "causal"),
    ],
)
def test_what_a_mechanism_cannot_do_is_refused(spec: str, call: Any, said: str) -> None:
    with pytest.raises(sa.UnsupportedCallError, match=said):
        grouped(mechanism=spec)(X, X, X, **call)


@pytest.mark.parametrize("word", ["key_padding_mask", "q_segments", "kv_segments", "cache"])
def test_what_is_no_tensor_is_refused_without_a_batch_too(word: str) -> None:
    module, x = grouped(), X[0]
    with pytest.raises(sa.InvalidInputError, match=word):
        module(x, x, x, need_weights=False, **{word: [0] * N})


def test_a_causal_mask_of_every_head_is_the_causal_mask() -> None:
    module = grouped()
    mask = CAUSAL[:N, :N].expand(B * H, -1, -1)
    wanted = module(X, X, X, is_causal=True)[0]
    assert torch.equal(module(X, X, X, attn_mask=mask, is_causal=True)[0], wanted)
    mask = mask.clone()
    mask[-1, 0, 1] = False
    with pytest.raises(sa.InvalidInputError, match="not the causal mask"):
        module(X, X, X, attn_mask=mask, is_causal=True)


def test_dropout_is_refused_while_training_alone() -> None:
    module = sa.MultiheadAttention(E, H, dropout=0.1, batch_first=True, dtype=torch.float64)
    with pytest.raises(sa.UnsupportedCallError, match=r"module\.dropout = 0\.0"):
        module(X, X, X)
    assert module.eval()(X, X, X)[0].shape == X.shape


def test_from_torch_refuses_what_is_not_there() -> None:
    with pytest.raises(sa.InvalidInputError, match="got Linear"):
        sa.MultiheadAttention.from_torch(nn.Linear(2, 2))  # type: ignore[arg-type]
    for word in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(sa.UnsupportedCallError, match=word):
            sa.MultiheadAttention.from_torch(torch_module(**{word: True}))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_are_refused() -> None:
    module = grouped()
    nested = torch.nested.nested_tensor([X[0], X[1, :3]])
    with pytest.raises(sa.UnsupportedCallError, match="self-attention alone"):
        module(nested, X, X)
    with pytest.raises(sa.UnsupportedCallError, match="without masks"):
        module(nested, nested, nested, attn_mask=ADDED)
    ragged = torch.nested.nested_tensor([X[0], X[1, :3]], layout=torch.jagged)
    with pytest.raises(sa.UnsupportedCallError, match="strided layout"):
        module(ragged, ragged, ragged)
