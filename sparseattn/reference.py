"""Exact attention and every mechanism's definition in float64: the one oracle.

Nothing here is fast. Queries are served in slabs, so that the dense maps stay within bounded
memory at any length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .call import AttentionCall

if TYPE_CHECKING:
    from .base import Mechanism

# Elements of one dense [B, Hq, slab, M] map: 32 Mi float64 are 256 MiB.
SLAB_ELEMENTS = 32 * 2**20


def grouped_scores(q: Tensor, k: Tensor) -> Tensor:
    """`q . k` for grouped heads: q `[B, Hq, N, D]`, k `[B, Hkv, M, D]` -> `[B, Hq, N, M]`.

    Query head h reads key head `h // (Hq / Hkv)`; k is never copied to Hq heads.
    """
    b, hq, n, d = q.shape
    hkv, m = k.shape[1], k.shape[2]
    if hq == hkv:
        return q @ k.transpose(-1, -2)
    folded = q.reshape(b, hkv, hq // max(hkv, 1) * n, d) if hkv else q.reshape(b, 0, n, d)
    return (folded @ k.transpose(-1, -2)).reshape(b, hq, n, m)


def grouped_apply(weights: Tensor, v: Tensor) -> Tensor:
    """`W @ v` for grouped heads: `[B, Hq, N, M]`, `[B, Hkv, M, Dv]` -> `[B, Hq, N, Dv]`."""
    b, hq, n, m = weights.shape
    hkv, dv = v.shape[1], v.shape[3]
    if hq == hkv:
        return weights @ v
    folded = weights.reshape(b, hkv, hq // max(hkv, 1) * n, m) if hkv else weights
    return (folded @ v).reshape(b, hq, n, dv)


def logits(q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
    """Scaled, capped and biased logits `[B, Hq, N, M]` in q's dtype, before any mask."""
    out = grouped_scores(q, k) * call.scale
    if call.softcap is not None:
        out = call.softcap * torch.tanh(out / call.softcap)
    if call.bias is not None:
        out = out + call.bias.to(out.dtype)
    return out


def masked_softmax(
    scores: Tensor, mask: Tensor, sink_logits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax over the visible keys, and its log normaliser (natural log).

    Args:
        scores: logits `[B, Hq, N, M]`.
        mask: bool, broadcastable to `scores`; True where visible.
        sink_logits: `[Hq]`, one logit a head that takes weight and has no value.

    Returns:
        `weights [B, Hq, N, M]`, all 0 in a row that sees no key, and `lse [B, Hq, N]`, there -inf
        (or the sink logit).
    """
    mask = mask.expand_as(scores)
    scores = scores.masked_fill(~mask, -torch.inf)
    sink = None
    if sink_logits is not None:
        sink = sink_logits.to(scores.dtype)[None, :, None, None]
        sink = sink.expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:3], -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    # A row of -inf alone has no maximum to subtract: its exponentials are already 0.
    top = top.masked_fill(top == -torch.inf, 0.0)
    powers = torch.exp(scores - top)
    total = powers.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    weights = powers / total
    lse = (total.log() + top).masked_fill(empty, -torch.inf).squeeze(-1)
    return (weights if sink is None else weights[..., :-1]), lse


def make_inert(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Zero the queries that see no key and the keys and values that no query sees.

    `0 * NaN` is NaN: what is invisible must be gone before any product, not after it.

    Args:
        q, k, v: `[B, Hq, N, D]`, `[B, Hkv, M, D]`, `[B, Hkv, M, Dv]`.
        mask: bool `[B or 1, Hq or 1, N, M]`, True where visible.
        groups: query heads a key-value head.
    """
    q = q.masked_fill(~mask.any(-1)[..., None], 0.0)
    seen = mask.any(-2)
    if seen.shape[1] > 1 and groups > 1:
        seen = seen.unflatten(1, (-1, groups)).any(2)
    hidden = ~seen[..., None]
    return q, k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)


def _slab(
    mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor | None]:
    mask = mechanism.mask(call)
    q, k, v = make_inert(q, k, v, mask, call.groups)
    weights, lse = mechanism.definition(q, k, call)
    return grouped_apply(weights, v), lse


def slab_rows(call: AttentionCall) -> int:
    """How many queries one dense slab holds."""
    per_row = max(1, call.batch * call.q_heads * call.m)
    return max(1, SLAB_ELEMENTS // per_row)


def evaluate(
    mechanism: Mechanism,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """The mechanism's definition applied to v, computed in `dtype`; differentiable.

    A selection is made once from the inputs as given, before they are cast.

    Returns:
        out `[B, Hq, N, Dv]` and lse `[B, Hq, N]` (None where the nature has none), in `dtype`.
    """
    call = mechanism.with_selection(q, k, call)
    call = call.to_dtype(dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    rows = slab_rows(call)
    # Traced lengths are symbols: one slab keeps them so.
    if torch.compiler.is_compiling() or rows >= call.n:
        return _slab(mechanism, q, k, v, call)
    outs, lses = [], []
    for start in range(0, call.n, rows):
        piece = slice(start, min(start + rows, call.n))
        args = (mechanism, q[:, :, piece], k, v, call.take_rows(piece))
        if call.needs_grad:
            out, lse = checkpoint(_slab, *args, use_reentrant=False)
        else:
            out, lse = _slab(*args)
        outs.append(out)
        lses.append(lse)
    lse = None if lses[0] is None else torch.cat(lses, dim=2)
    return torch.cat(outs, dim=2), lse


def exact(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention (Vaswani et al. 2017, eq. 1) in `dtype`; returns out and lse.

    Shapes as in `evaluate`.
    """
    call = call.to_dtype(dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    outs, lses = [], []
    rows = call.n if torch.compiler.is_compiling() else slab_rows(call)
    for start in range(0, call.n, max(rows, 1)):
        piece = slice(start, min(start + rows, call.n))
        part = call.take_rows(piece)
        mask = part.allowed()
        q_part, k_part, v_part = make_inert(q[:, :, piece], k, v, mask, call.groups)
        weights, lse = masked_softmax(logits(q_part, k_part, part), mask, part.sink_logits)
        outs.append(grouped_apply(weights, v_part))
        lses.append(lse)
    if not outs:
        shape = (call.batch, call.q_heads, 0)
        return q.new_zeros(*shape, call.value_dim), q.new_zeros(shape)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
