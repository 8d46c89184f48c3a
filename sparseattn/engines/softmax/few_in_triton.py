"""Few queries over many keys on a GPU: decoding steps, whether or not a cache keeps the keys.

No plan, no table and no host read: a step launches two kernels, and may be captured in a CUDA
graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import wide
from ..rows import rows_of
from ..triton_launch import launch, target
from .launches import constants, numbers

MOST_ROWS = 64  # queries times query heads of a group
MANY_KEYS = 256  # fewer are one part, for which one launch over tiles does
_AT_ONCE = 16  # parts that a program merges at a time


def serves(call: AttentionCall) -> bool:
    """Whether a call has few rows, many keys, and something to compute."""
    few = 0 < call.n * call.groups <= MOST_ROWS
    return few and call.m > MANY_KEYS and call.batch * call.q_heads > 0


def split_size(keys: int) -> int:
    """Keys of a part: enough parts to fill a GPU, large enough that merging them costs little."""
    return 256 if keys <= 2**14 else 1024 if keys <= 2**16 else 2048


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    band: tuple[int, int],
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of few queries, without sink logits.

    Args:
        q, k, v: `[B, Hq, n, D]`, `[B, Hkv, L, D]`, `[B, Hkv, L, Dv]`, of one dtype.
        call: its sizes (but m), scale and softcap.
        band: (low, high): query i sees the keys from `low + i` to `high + i`.
        mask: bool, broadcastable to `[B, Hq, n, L]`: and of those only where it is True.

    Returns:
        out `[B, Hq, n, Dv]` in q's dtype and lse `[B, Hq, n]`, wide; 0 and -inf in empty rows.
    """
    from .triton import config
    from .triton.decode import merge_parts, part_of_keys

    shape = (call.batch, call.q_heads, call.n)
    q, k, v = (rows_of(x) for x in (q, k, v))
    number = wide(q.dtype)
    out = q.new_empty(*shape, call.value_dim)
    lse = q.new_empty(shape, dtype=number)
    low, high = band
    begin, end = max(low, 0), min(high + call.n, k.shape[2])
    keys = max(end - begin, 0)
    size = split_size(keys)
    splits = max(1, -(-keys // size))
    on = target(q.device)
    rows = max(16, config.padded(call.n * call.groups))
    width = max(call.head_dim, call.value_dim)
    tiles = config.decode_tiles(on, q.dtype, width, rows)
    constant = constants(on, q.dtype, call)
    parts = (call.batch, call.kv_heads, splits, rows)
    part = torch.empty((*parts, constant["DV"]), dtype=number, device=q.device)
    part_lse = torch.empty(parts, dtype=number, device=q.device)
    seen, steps = q, q.stride()[:3]
    if mask is not None:
        seen = mask.expand(*shape, k.shape[2])
        seen = seen if seen.stride(-1) == 1 else seen.contiguous()
        steps = seen.stride()[:3]
        # Triton 3.6 makes no products of float64 beside loads of bytes.
        seen = seen.to(torch.int32) if q.dtype == torch.float64 else seen.view(torch.uint8)
    launch(
        part_of_keys,
        (splits, call.kv_heads, call.batch),
        *(q, k, v, seen, part, part_lse),
        *(stride for x in (q, k, v) for stride in x.stride()[:3]),
        *(*steps, *numbers(call), call.head_dim, call.value_dim, call.groups, call.n),
        *(low, high, begin, max(end, begin), splits),
        MASKED=mask is not None,
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        SPLIT=size,
        EVEN=(constant["D"], constant["DV"]) == (call.head_dim, call.value_dim),
        **constant,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    launch(
        merge_parts,
        (call.n * call.groups, call.kv_heads, call.batch),
        *(part, part_lse, out, lse, *out.stride()[:3], *lse.stride()[:2]),
        *(call.value_dim, call.groups, call.n, splits),
        NUMBER=constant["NUMBER"],
        ROWS=rows,
        DV=constant["DV"],
        AT_ONCE=_AT_ONCE,
        num_warps=4,
    )
    return out, lse


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """The same over all keys that a mask shows, or all there are."""
    return attend(q, k, v, call, (-call.n, k.shape[2]), mask)
