"""Tiny models with tokenizers, saved as a person would have them: a folder, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers, processors

CONTEXT = 128  # the most positions that these models take
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}


def alphabet() -> list[str]:
    """How byte-level tokenizers write the 256 bytes."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer(*special: str) -> Any:
    """A token a byte; with two special tokens, one is put before a text and one after it."""
    words = [*special, *alphabet()]
    made = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if special:
        first, last = special
        made.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B {last}",
            special_tokens=[(first, 0), (last, 1)],
        )
    return T.PreTrainedTokenizerFast(tokenizer_object=made)


def lively(model: Any, seed: int = 1) -> Any:
    """A model with other weights: as it comes, attention is nearly even and no window matters."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                spread = torch.randn(weight.shape, generator=source)
                weight.copy_(2 * spread * weight.shape[1] ** -0.5)
    return model.eval()


def save(folder: Path, kind: str, config: Any, *special: str) -> Path:
    model = lively(getattr(T, kind)(config))
    model.save_pretrained(folder)
    tokenizer(*special).save_pretrained(folder)
    return folder


def llama(folder: Path, **given: Any) -> Path:
    return save(folder, "LlamaForCausalLM", T.LlamaConfig(**{**LLAMA, "vocab_size": 256, **given}))


def bert(folder: Path) -> Path:
    sizes = {n: v for n, v in LLAMA.items() if n != "num_key_value_heads"}
    return save(folder, "BertModel", T.BertConfig(**sizes, vocab_size=258), "[CLS]", "[SEP]")


def gguf_llama(path: Path) -> dict[str, torch.Tensor]:
    """Write a Llama with Q8_0 weights; returns some of them as the file holds them, by the names
    that transformers has."""
    size, layers = LLAMA["hidden_size"], LLAMA["num_hidden_layers"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(CONTEXT)
    out.add_embedding_length(size)
    out.add_block_count(layers)
    out.add_feed_forward_length(LLAMA["intermediate_size"])
    out.add_head_count(LLAMA["num_attention_heads"])
    out.add_head_count_kv(LLAMA["num_key_value_heads"])
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(1e4)
    words = [*alphabet(), "th"]
    out.add_vocab_size(len(words))
    out.add_tokenizer_model("gpt2")
    out.add_token_list(words)
    out.add_token_types([gguf.TokenType.NORMAL] * len(words))
    out.add_token_merges(["t h"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    draw = np.random.default_rng(0)
    known = {}

    def put(name: str, rows: int, known_as: str = "") -> None:
        whole = draw.standard_normal((rows, size)).astype(np.float32) * 2 * size**-0.5
        packed = gguf.quants.quantize(whole, gguf.GGMLQuantizationType.Q8_0)
        out.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        if known_as:
            read = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            known[known_as] = torch.from_numpy(read)

    put("token_embd.weight", len(words), "model.embed_tokens.weight")
    put("output.weight", len(words), "lm_head.weight")
    out.add_tensor("output_norm.weight", np.ones(size, dtype=np.float32))
    for at in range(layers):
        for name, rows in (("attn_q", size), ("attn_k", size // 2)):
            put(f"blk.{at}.{name}.weight", rows)  # in another order of rows than transformers'
        put(f"blk.{at}.attn_v.weight", size // 2, f"model.layers.{at}.self_attn.v_proj.weight")
        put(f"blk.{at}.attn_output.weight", size, f"model.layers.{at}.self_attn.o_proj.weight")
        for name in ("gate", "up", "down"):
            put(f"blk.{at}.ffn_{name}.weight", size, f"model.layers.{at}.mlp.{name}_proj.weight")
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{at}.{name}.weight", np.ones(size, dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return known
