"""One token of a decode as one kernel that evaluates the feature maps; see `cache_state.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ..rows import rows_of
from ..triton_launch import halves, launch, reasons_against
from .triton_launcher import logs_of
from .triton_pieces import declared

_FEATURES, _COLUMNS = 32, 32  # of a block


def reasons_against_step(mechanism: Any, call: AttentionCall) -> list[str]:
    """Why the kernel does not serve new tokens; empty where it does."""
    reasons = reasons_against(call.device)
    if reasons:
        return reasons
    if call.n != 1:
        reasons.append(f"its decoding step takes one token at a time, and these are {call.n}")
    maps = declared(mechanism, call)
    if maps is None or maps[0].projection is not None or hasattr(mechanism, "scaled_map"):
        reasons.append("its decoding step serves feature maps that are elementwise functions")
    return reasons


def step(
    mechanism: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    state: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """The output of a token `[B, Hq, 1, Dv]`, and the state after it.

    Args:
        q, k, v: of the token. state: float64 `[B, heads, features, Dv]`, with one more column for
            the sums of the weights. positions: `[1 or B, 1, 1]`.
    """
    from .triton.step import state_step

    maps = declared(mechanism, call)
    assert maps is not None
    own, other = maps
    gamma = mechanism.decay(call)
    state = state.contiguous()
    after = torch.empty_like(state)
    out = torch.empty((*q.shape[:3], call.value_dim), dtype=q.dtype, device=q.device)
    q, k, v = (rows_of(x) for x in (q, k, v))
    columns = state.shape[-1]
    launch(
        state_step,
        (-(-columns // _COLUMNS), call.q_heads, call.batch),
        *(q, k, v, state, after, out, positions),
        q if gamma is None else logs_of(gamma, q.device),
        *(stride for x in (q, k, v) for stride in x.stride()[:2]),
        0 if positions.shape[0] == 1 else positions.stride(0),
        *(call.head_dim, call.value_dim, columns, call.groups),
        *(*halves(own.scale), *halves(other.scale), *halves(own.turn or 0.0)),
        NORMALIZE=mechanism.normalize,
        DECAY=gamma is not None,
        FUNCTION=own.function,
        PARTS=1 if own.turn is None else 2,
        F=_FEATURES,
        E=_COLUMNS,
    )
    return out, after
