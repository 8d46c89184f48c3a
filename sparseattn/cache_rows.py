"""Softmax attention of few queries over kept keys, pair by pair: what the caches compute with.

No layout is built: each length would need another. The mechanism's own definition says which pairs
are visible, at whatever positions the kept keys stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import AttentionCall
from .digits import doubled, wide
from .engines.op import FEW_PAIRS, sinking
from .engines.softmax import few_in_native, few_in_triton
from .engines.softmax.primitive import additive, flash_forward, math_forward

# Few pairs get twice the digits, as in the operator, while that copies no more numbers of k.
_FEW_NUMBERS = 2**17
# What serves few rows itself, of the kernel that a call is for.
ROW_KERNELS = ("softmax:torch", "softmax:native", "softmax:triton")
_FEW: dict[str, Any] = {"softmax:native": few_in_native, "softmax:triton": few_in_triton}


def _digits(call: AttentionCall, keys: int) -> torch.dtype:
    few = call.q_heads * call.n * keys < FEW_PAIRS
    if not few or keys * call.kv_heads * call.head_dim > _FEW_NUMBERS:
        return call.dtype
    return doubled(call.dtype)


def attend_rows(
    mechanism: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    all_seen: bool = False,
    kernel: str = "softmax:torch",
) -> tuple[Tensor, Tensor]:
    """A static pattern over the keys given, with the call's scale, softcap and sink logits.

    Args:
        q, k, v: `[B, Hq, n, D]`, `[B, Hkv, L, D]`, `[B, Hkv, L, Dv]`.
        call: its placement (`fixed_placement` for keys that are not contiguous) and `key_mask` are
            those of the L keys.
        all_seen: every query is known to see every key.
        kernel: of the implementation asked for: `softmax:triton` and `softmax:native` serve a
            step's few rows themselves.

    Returns:
        out `[B, Hq, n, Dv]` in q's dtype; lse `[B, Hq, n]`, wide. 0 and -inf where nothing is seen.
    """
    shape, acc = (call.batch, call.q_heads, call.n), wide(call.dtype)
    keys = k.shape[2]
    mask = None if all_seen else mechanism.mask(call)
    few = _FEW.get(kernel)
    if few is not None and not 0 < call.n * call.groups <= few.MOST_ROWS:
        few = None
    if mask is not None and few is None and bool(mask.all()):
        mask = None
    if 0 in shape or keys == 0:
        out = q.new_zeros(*shape, call.value_dim)
        lse = q.new_full(shape, -torch.inf, dtype=acc)
    elif few is few_in_native and call.value_dim:
        out, lse = few_in_native.attend_masked(q, k, v, mask, call)
    else:
        dtype = _digits(call, keys)
        serve = _masked if few is not few_in_triton else few_in_triton.attend_masked
        out, lse = serve(q.to(dtype), k.to(dtype), v.to(dtype), mask, call)
    if call.sink_logits is not None:
        out, lse = sinking(out, lse, call.sink_logits[None])
    return out.to(q.dtype), lse.to(acc)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """As `attend_rows`, in the dtype given; what is invisible is inert.

    Finite numbers under a mask need no care. NaN or inf would reach the sums that do not see them
    as NaN: only then the rows are computed one by one, without what each does not see.
    """
    out, lse = _heads(q, k, v, mask, call)
    if mask is None or bool(torch.isfinite(out.sum())):
        return out, lse
    for row in range(call.n):
        one = mask[:, :, row : row + 1]
        seen = one.expand(-1, call.q_heads, -1, -1).unflatten(1, (call.kv_heads, call.groups))
        hidden = ~seen.any(2).transpose(-1, -2)
        none = ~one.any(-1, keepdim=True)
        part = q[:, :, row : row + 1].masked_fill(none, 0.0)
        k_own, v_own = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        o, s = _heads(part, k_own, v_own, one, call)
        out[:, :, row : row + 1], lse[:, :, row : row + 1] = o, s
    return out, lse


def _heads(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    group = (call.kv_heads, call.groups)
    q = q.unflatten(1, group)
    if mask is not None:
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, group)
    if call.n == 1:  # the heads of a group are the rows of one rectangle
        if mask is not None:
            mask = mask.squeeze(3)
        out, lse = _rectangle(q.squeeze(3), k, v, mask, call)
        return out.flatten(1, 2)[:, :, None], lse.flatten(1, 2)[:, :, None]
    parts = []
    for head in range(call.groups):
        own = None
        if mask is not None:
            own = mask[:, :, 0 if mask.shape[2] == 1 else head]
        parts.append(_rectangle(q[:, :, head], k, v, own, call))
    out, lse = (torch.stack(x, dim=2) for x in zip(*parts, strict=True))
    return out.flatten(1, 2), lse.flatten(1, 2)


def _rectangle(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu" and call.softcap is None:
        bias = None if mask is None else additive(mask, q.dtype)
        return flash_forward(q, k, v, call.scale, bias)
    return math_forward(q, k, v, call.scale, mask, call.softcap)
