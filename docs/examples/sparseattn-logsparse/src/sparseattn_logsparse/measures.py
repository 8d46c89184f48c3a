"""An input and a metric for `sparseattn compare`."""

from __future__ import annotations

import torch
from torch import Tensor

import sparseattn as sa

DELAY = 64


def delayed(length: int, seed: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that each look for the key 64 positions before them; the first 64 look for nothing.

    Returns:
        q, k, v `[1, 4, length, 64]`, float32: the same for the same arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 4, length, 64, generator=generator).unbind(0)
    found = torch.zeros_like(k)
    found[:, :, DELAY:] = k[:, :, :-DELAY] if length > DELAY else 0.0
    # Twice a key has a logit of about 2 sqrt(D) = 16 with that key, and about 0 with the others.
    return q + 2 * found, k, v


def cosine(out: Tensor, ref: Tensor, call: sa.AttentionCall) -> float:
    """The mean cosine of the angle between each output row and that of exact attention."""
    return float(torch.nn.functional.cosine_similarity(out, ref, dim=-1).mean())
