"""What a swap saves in a model: generation in constant memory, and a long padded prompt.

    python benchmarks/swapped_models.py [--json PATH]

1. A Llama generates 4,096 tokens through a windowed mechanism with sinks; each layer keeps a ring.
   Printed are the bytes that the cache holds as it goes, and whether the tokens are those that
   come of recomputing everything: one by one for the first 256, in one forward for all.
2. A Llama reads 16,384 tokens, left-padded, through the same mechanism. Printed is the peak of
   memory over the weights, beside that of torch's own attention with its dense mask. Each runs in
   a process of its own, because a peak can only be read once.

The weights are random: neither memory nor equality depends on them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparseattn as sa
from sparseattn.harness import manifest, store
from sparseattn.integrations import decoding

SPEC = "windowed(window=252, sinks=4)"
STEPS, CHECKED, PROMPT = 4096, 256, 16


def llama(width: int, layers: int, longest: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=longest,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def generation() -> dict[str, Any]:
    model = llama(128, 2, 2 * STEPS)
    prompt = torch.randint(0, 256, (1, PROMPT))
    held: dict[int, int] = {}
    with torch.no_grad(), sa.swap(model, SPEC):
        cache = sa.make_cache(model)
        ids = prompt
        for step in range(STEPS):
            new = ids if step == 0 else ids[:, -1:]
            logits = model(new, past_key_values=cache, use_cache=True).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            if step + 1 in (1, 256, 512, 1024, 2048, STEPS):
                held[step + 1] = decoding.nbytes(cache)
        again = prompt
        for _ in range(CHECKED):
            logits = model(again, use_cache=False).logits[:, -1]
            again = torch.cat([again, logits.argmax(-1, keepdim=True)], 1)
        # Far out, where the ring has turned many times: every step of the last ones at once.
        whole = model(ids[:, :-1], use_cache=False).logits.argmax(-1)
    return {
        "tokens": STEPS,
        "cache_bytes": held,
        "same_as_recomputed": {
            f"first {CHECKED}, one by one": bool((again == ids[:, : again.shape[1]]).all()),
            f"all {STEPS}, in one forward": bool((whole[:, PROMPT - 1 :] == ids[:, PROMPT:]).all()),
        },
    }


def peak(swapped: bool, length: int) -> int:
    """Peak bytes of one forward of a left-padded prompt, over what stood before it."""
    model = llama(128, 2, length)
    ids = torch.randint(0, 256, (2, length))
    mask = torch.ones_like(ids)
    mask[0, : length // 4] = 0
    with torch.no_grad():
        model(ids[:, :64], attention_mask=mask[:, -64:])  # what is loaded once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if swapped:
            with sa.swap(model, SPEC):
                model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        else:
            model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def prompt(length: int) -> dict[str, Any]:
    found = {}
    for name in ("sdpa", "swapped"):
        command = [sys.executable, __file__, "--peak", name, "--length", str(length)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = int(done.stdout.split()[-1])
    return {
        "length": length,
        "peak_bytes": found,
        "ratio": found["swapped"] / found["sdpa"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=["sdpa", "swapped"], help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=16384, help="of the padded prompt")
    given = parser.parse_args()
    torch.set_num_threads(2)
    if given.peak:
        print(peak(given.peak == "swapped", given.length))
        return
    results = {"generation": generation(), "prompt": prompt(given.length)}
    print(json.dumps(results, indent=2))
    if given.json:
        about = manifest.conditions(torch.device("cpu"), None)
        store.write(given.json, {"manifest": about, "mechanism": SPEC, **results})


if __name__ == "__main__":
    main()
