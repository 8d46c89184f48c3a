"""Tiny random models of many architectures, and one plain way to run any of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as T
from torch import Tensor, nn

WORDS, LENGTH, PADDED = 100, 40, 7
_SIZE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": WORDS,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPS = {**_SIZE, "num_key_value_heads": 2}
_NARROW = {**_GROUPS, "head_dim": 16}
_GPT = {
    **{"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, "n_positions": 128},
    **{"bos_token_id": 1, "eos_token_id": 2},
}
_BART = {
    **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": WORDS},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    **{"forced_eos_token_id": None},
}
_VISION = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 64, "image_size": 24, "patch_size": 4},
}


class Architecture(NamedTuple):
    """kind: decoder, encoder, encoder-decoder or vision. window: of its own layers, 0 for none."""

    kind: str
    make: Callable[[], nn.Module]
    window: int = 0


def _of(kind: str, model: str, config: str, window: int = 0, **given: Any) -> Architecture:
    def make() -> nn.Module:
        torch.manual_seed(1)
        settings = getattr(T, config)(**given)
        # Grouped products of experts know no float64, which the oracle is made of.
        settings._experts_implementation = "eager"
        found = getattr(T, model)(settings).eval()
        with torch.no_grad():
            for weight in found.parameters():
                # As a model comes, attention is nearly even; a window then changes little.
                if weight.ndim == 2:
                    weight.normal_(std=weight.shape[1] ** -0.5)
        return found  # type: ignore[no-any-return]

    return Architecture(kind, make, window)


def _lm(name: str, window: int = 0, **given: Any) -> Architecture:
    return _of("decoder", f"{name}ForCausalLM", f"{name}Config", window, **given)


ARCHITECTURES = {
    "Llama": _lm("Llama", **_GROUPS),
    "Mistral": _lm("Mistral", 12, **_GROUPS, sliding_window=12),
    "Mixtral": _lm("Mixtral", **_GROUPS, num_local_experts=2, sliding_window=None),
    "Qwen2": _lm("Qwen2", **_GROUPS),
    "Qwen3": _lm("Qwen3", **_NARROW),
    "Phi3": _lm("Phi3", **_GROUPS, sliding_window=None),
    "Gemma": _lm("Gemma", **_NARROW),
    "Gemma2": _lm("Gemma2", 12, **_NARROW, sliding_window=12),
    "Gemma3": _of(
        "decoder", "Gemma3ForCausalLM", "Gemma3TextConfig", 12, **_NARROW, sliding_window=12
    ),
    "GPT-2": _of("decoder", "GPT2LMHeadModel", "GPT2Config", **_GPT),
    "GPT-J": _lm("GPTJ", **_GPT, rotary_dim=8),
    "GPT-NeoX": _lm("GPTNeoX", **_SIZE),
    "OPT": _lm(
        "OPT",
        **{n: v for n, v in _SIZE.items() if n != "intermediate_size"},
        ffn_dim=64,
        word_embed_proj_dim=64,
    ),
    "GPT-OSS": _lm(
        "GptOss", 12, **_NARROW, sliding_window=12, num_local_experts=2, num_experts_per_tok=1
    ),
    "DeepSeek-V3": _lm(
        "DeepseekV3",
        **_SIZE,
        **{"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "v_head_dim": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_routed_experts": 2},
        **{"num_experts_per_tok": 1, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1},
        first_k_dense_replace=2,
    ),
    "StableLM": _lm("StableLm", **_SIZE, num_key_value_heads=4),
    "Starcoder2": _lm("Starcoder2", **_GROUPS),
    "OLMo": _lm("Olmo", **_GROUPS),
    "Cohere": _lm("Cohere", **_GROUPS),
    "Granite": _lm("Granite", **_GROUPS),
    "SmolLM3": _lm("SmolLM3", **_GROUPS),
    "Falcon": _lm(
        "Falcon",
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"vocab_size": WORDS, "alibi": False, "multi_query": False, "bos_token_id": 1},
        eos_token_id=2,
    ),
    "BERT": _of("encoder", "BertModel", "BertConfig", **_SIZE),
    "RoBERTa": _of("encoder", "RobertaModel", "RobertaConfig", **_SIZE),
    "DistilBERT": _of(
        "encoder",
        "DistilBertModel",
        "DistilBertConfig",
        **{"dim": 64, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": WORDS},
    ),
    "ModernBERT": _of(
        "encoder",
        "ModernBertModel",
        "ModernBertConfig",
        6,
        **_SIZE,
        **{"local_attention": 12, "global_attn_every_n_layers": 2},
        **{"cls_token_id": 1, "sep_token_id": 2},
    ),
    "ELECTRA": _of("encoder", "ElectraModel", "ElectraConfig", **_SIZE, embedding_size=64),
    "ALBERT": _of("encoder", "AlbertModel", "AlbertConfig", **_SIZE, embedding_size=64),
    "ESM": _of("encoder", "EsmModel", "EsmConfig", **_SIZE, mask_token_id=3),
    "T5": _of(
        "encoder-decoder",
        "T5ForConditionalGeneration",
        "T5Config",
        **{"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        **{"vocab_size": WORDS, "decoder_start_token_id": 0, "pad_token_id": 0},
    ),
    "BART": _of("encoder-decoder", "BartForConditionalGeneration", "BartConfig", **_BART),
    "Marian": _of("encoder-decoder", "MarianMTModel", "MarianConfig", **_BART),
    "ViT": _of("vision", "ViTModel", "ViTConfig", **_VISION),
    "DINOv2": _of("vision", "Dinov2Model", "Dinov2Config", **_VISION),
    "SigLIP": _of("vision", "SiglipVisionModel", "SiglipVisionConfig", **_VISION),
    "CLIP": _of("vision", "CLIPVisionModel", "CLIPVisionConfig", **_VISION),
}


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(3, WORDS, (batch, length), generator=source)


def padding(side: str, batch: int = 2, length: int = LENGTH) -> Tensor:
    """An attention mask that pads the first row on one side."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    rows = slice(None, PADDED) if side == "left" else slice(-PADDED, None)
    mask[0, rows] = 0
    return mask


def run(architecture: Architecture, model: nn.Module, pad: str | None = None) -> Tensor:
    """What a model makes of the same input each time: logits or states of what is no padding."""
    with torch.no_grad():
        if architecture.kind == "vision":
            source = torch.Generator().manual_seed(0)
            image = torch.randn(2, 3, 24, 24, generator=source)
            return model(image.to(next(model.parameters()).dtype))[0]  # type: ignore[no-any-return]
        mask = None if pad is None else padding(pad)
        words: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if architecture.kind == "encoder-decoder":
            words["decoder_input_ids"] = tokens(length=LENGTH - 4, seed=1)
        elif pad == "left" and architecture.kind == "decoder":
            assert mask is not None
            words["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if "OPT" in type(model).__name__:
            words.pop("position_ids", None)
        out: Tensor = model(tokens(), **words)[0]
    if mask is None or architecture.kind == "encoder-decoder":
        return out
    return out[mask.bool()]


def at_once(work: Callable[[int], None], count: int = 3) -> None:
    """Run `work(i)` in as many threads."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
