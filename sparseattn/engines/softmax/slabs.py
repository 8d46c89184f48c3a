"""The general path: any call, any device, a slab of queries at a time in plain torch.

Serves what the other paths cannot: softcap, bias, holes in the key mask, other devices. Memory is
bounded by the slab, never N x M.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import wide
from ...layout import BlockCSR, Grid
from .pattern import selected_keys
from .primitive import math_backward, math_forward

# Elements of one slab of logits over batch, heads, rows and keys.
_SLAB_ELEMENTS = 2**22
_KEY_BLOCK = 64


class Slab(NamedTuple):
    """Queries `rows` against `keys` (a slice where they are contiguous, else an index).

    `mask` is bool, broadcastable to `[b, Hkv, G * R, L]`; `bias` is wide, broadcastable likewise.
    """

    rows: slice
    keys: slice | Tensor
    mask: Tensor
    bias: Tensor | None


def slab_size(call: AttentionCall) -> int:
    """Queries a slab: a power of two, so that lengths share layouts."""
    limit = max(1, _SLAB_ELEMENTS // max(1, call.batch * call.q_heads * call.m))
    return min(256, 1 << (limit.bit_length() - 1))


def lower(mechanism: Any, call: AttentionCall) -> BlockCSR:
    """The run's layout in blocks of a slab's queries by 64 keys; all keys where it is dynamic."""
    grid = Grid(call.n, call.m, call.causal, int(call.offset))
    layout = grid.everything() if mechanism.is_dynamic else mechanism.clauses(grid)
    return layout.lower(slab_size(call), _KEY_BLOCK)


def slabs(mechanism: Any, csr: BlockCSR, call: AttentionCall) -> Iterator[Slab]:
    """Cut a run into slabs; queries in none of them see nothing."""
    size, device = csr.frame.query_block, call.device
    for row in range(csr.shape[0]):
        cols = csr.indices[csr.indptr[row] : csr.indptr[row + 1]].astype(np.int64)
        if len(cols) == 0:
            continue
        rows = slice(row * size, min((row + 1) * size, call.n))
        mask = csr.entry_masks([row], cols[None], device)[0, : rows.stop - rows.start]
        keys: slice | Tensor
        if cols[-1] - cols[0] + 1 == len(cols):
            keys = slice(int(cols[0]) * _KEY_BLOCK, min(int(cols[-1] + 1) * _KEY_BLOCK, call.m))
            mask = mask[:, : keys.stop - keys.start]
        else:
            index = (cols[:, None] * _KEY_BLOCK + np.arange(_KEY_BLOCK)).ravel()
            keys = torch.from_numpy(index[index < call.m]).to(device)
            mask = mask[:, : len(keys)]
        mask = mask[None, None]
        if call.key_mask is not None:
            mask = mask & call.key_mask[:, None, None, keys]
        if call.selection is not None:
            place = torch.arange(call.m, device=device)[keys] // mechanism.block
            mask = mask & selected_keys(call.selection[:, :, rows], place[None])
        bias = call.bias
        if bias is not None:
            bias = (bias if bias.shape[2] == 1 else bias[:, :, rows])[..., keys]
            bias = _fold_heads(bias.to(wide(call.dtype)), call, rows.stop - rows.start)
        yield Slab(rows, keys, _fold_heads(mask, call, rows.stop - rows.start), bias)


def _fold_heads(x: Tensor, call: AttentionCall, rows: int) -> Tensor:
    """`[b or 1, Hq or 1, R or 1, L]` as `[b or 1, Hkv or 1, G * R, L]`: groups become rows."""
    x = x.expand(-1, -1, rows, -1)
    if x.shape[1] == 1:
        x = x[:, :, None].expand(-1, -1, call.groups, -1, -1)
    else:
        x = x.unflatten(1, (call.kv_heads, call.groups))
    return x.flatten(2, 3)


def _guard(slab: Slab, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero what the slab's mask hides from all: 0 * NaN is NaN."""
    hidden = ~slab.mask.any(-2)[..., None]
    q = q.masked_fill(~slab.mask.any(-1)[..., None], 0.0)
    return q, k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)


def forward(
    mechanism: Any, csr: BlockCSR, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Attention over one run: q `[b, Hkv, G, n, D]`, k, v `[b, Hkv, m, .]`.

    Returns:
        out `[b, Hkv, G, n, Dv]` in q's dtype, lse `[b, Hkv, G, n]`.
    """
    out = q.new_zeros(*q.shape[:4], v.shape[-1])
    lse = q.new_full(q.shape[:4], -torch.inf, dtype=wide(q.dtype))
    for slab in slabs(mechanism, csr, call):
        qs = q[:, :, :, slab.rows].flatten(2, 3)
        qs, ks, vs = _guard(slab, qs, k[:, :, slab.keys], v[:, :, slab.keys])
        o, s = math_forward(qs, ks, vs, call.scale, slab.mask, call.softcap, slab.bias)
        out[:, :, :, slab.rows] = o.unflatten(2, (call.groups, -1)).to(q.dtype)
        lse[:, :, :, slab.rows] = s.unflatten(2, (call.groups, -1))
    return out, lse


def backward(
    mechanism: Any,
    csr: BlockCSR,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
    dbias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, wide; shapes as `forward`. That of bias is added to `dbias`."""
    acc = wide(q.dtype)
    dq = torch.zeros(q.shape, dtype=acc, device=q.device)
    dk = torch.zeros(k.shape, dtype=acc, device=q.device)
    dv = torch.zeros(v.shape, dtype=acc, device=q.device)
    for slab in slabs(mechanism, csr, call):
        g, t, qs, o, s = (
            None if x is None else x[:, :, :, slab.rows].flatten(2, 3)
            for x in (grad_out, grad_lse, q, out, lse)
        )
        qs, ks, vs = _guard(slab, qs, k[:, :, slab.keys], v[:, :, slab.keys])  # type: ignore[arg-type]
        g = g.masked_fill(~slab.mask.any(-1)[..., None], 0.0)  # type: ignore[union-attr]
        a, b, c, d = math_backward(
            g,
            t,
            qs,
            ks,
            vs,
            o,  # type: ignore[arg-type]
            s,  # type: ignore[arg-type]
            call.scale,
            slab.mask,
            call.softcap,
            slab.bias,  # type: ignore[arg-type]
        )
        dq[:, :, :, slab.rows] = a.unflatten(2, (call.groups, -1))
        # An index names each key once, so this is no scatter: the same bits every time.
        dk[:, :, slab.keys] += b
        dv[:, :, slab.keys] += c
        if dbias is not None:
            _add_bias(dbias, d.unflatten(2, (call.groups, -1)).flatten(1, 2), slab)
    return dq, dk, dv


def _add_bias(dbias: Tensor, part: Tensor, slab: Slab) -> None:
    """Sum `[b, Hq, R, L]` over what the bias broadcasts, and add it in place."""
    for axis in range(3):
        if dbias.shape[axis] == 1 and part.shape[axis] != 1:
            part = part.sum(axis, keepdim=True)
    rows = slice(0, 1) if dbias.shape[2] == 1 else slab.rows
    dbias[:, :, rows, slab.keys] += part
