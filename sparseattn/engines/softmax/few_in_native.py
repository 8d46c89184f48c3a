"""Few queries over the keys that a cache keeps, in C++: row by row, without a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import AttentionCall
from ..native import library
from ..rows import rows_of
from . import plan
from .in_native import ROWS, pack

MOST_ROWS = 64  # queries times query heads of a group
_NONE = torch.zeros(1, dtype=torch.int32)


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Softmax attention over all keys that a mask shows, or all there are, without sink logits.

    Args:
        q, k, v: `[B, Hq, n, D]`, `[B, Hkv, L, D]`, `[B, Hkv, L, Dv]`, float32 or bfloat16.
        mask: bool, broadcastable to `[B, 1, n, L]`.
        call: its sizes, scale and softcap.

    Returns:
        out `[B, Hq, n, Dv]` in q's dtype and lse `[B, Hq, n]`, float32; 0 and -inf in empty rows.
    """
    q, k, v = (rows_of(x) for x in (q, k, v))
    shape, keys = (call.batch, call.q_heads, call.n), k.shape[2]
    out = q.new_empty((*shape, call.value_dim))
    lse = torch.empty(shape, dtype=torch.float64)
    run = torch.tensor([[0, 0, call.n, 0, keys, -call.n, keys, 0]], dtype=torch.int32)
    tiles = torch.tensor(
        [[0, at, 0, 0, 0, 0, 0, 0] for at in range(-(-call.n // ROWS))], dtype=torch.int32
    )
    made = plan.Plan(run, tiles, _NONE, _NONE, _NONE, True)
    place = (0, 0, 0)
    if mask is not None:
        mask = mask.expand(call.batch, 1, call.n, keys)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        place = (mask.data_ptr(), mask.stride(0), mask.stride(2))
    call = call.replace(m=keys, key_mask=None, fixed_placement=None)
    given = pack(call, made, call.batch, (q, k, v, out), lse, None, place)
    library.call("sparseattn_softmax_rows", given)
    return out, lse.float()
