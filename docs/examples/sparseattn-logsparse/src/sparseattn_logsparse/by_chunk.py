"""Another way to compute `chunked`, which sparseattn itself defines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sparseattn as sa


class ByChunk(sa.Implementation):
    """Dense softmax attention in each chunk: one batched product, and one for the ragged end."""

    name = "by_chunk"

    def supports(self, mechanism: Any, call: sa.AttentionCall) -> list[str]:
        """Every reason against a call; it reads what was given, never what a tensor holds."""
        reasons = [
            f"it takes no {word}"
            for word in ("key_mask", "q_segments", "q_offset", "softcap", "sink_logits", "bias")
            if getattr(call, word) is not None
        ]
        if call.n != call.m:
            reasons.append(f"it needs as many queries as keys, got N={call.n}, M={call.m}")
        return reasons

    def run(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: sa.AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(q.dtype, torch.float32)
        # [B, Hkv, groups, N, D]: each group of query heads meets its key-value head.
        q = q.to(wide).unflatten(1, (call.kv_heads, call.groups))
        k, v = k.to(wide)[:, :, None], v.to(wide)[:, :, None]
        whole = call.n - call.n % mechanism.chunk
        parts = []
        if whole:
            cut = [x[..., :whole, :].unflatten(-2, (-1, mechanism.chunk)) for x in (q, k, v)]
            out, lse = _dense(*cut, call)
            parts.append((out.flatten(-3, -2), lse.flatten(-2)))
        if whole < call.n or not parts:
            parts.append(_dense(*(x[..., whole:, :] for x in (q, k, v)), call))
        out, lse = (torch.cat(x, dim=3).flatten(1, 2) for x in zip(*parts, strict=True))
        return out.to(call.dtype), lse


def _dense(q: Tensor, k: Tensor, v: Tensor, call: sa.AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention `[..., n, Dv]` and its log normaliser `[..., n]`, over the last two axes."""
    scores = q @ k.transpose(-1, -2) * call.scale
    if call.causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)
