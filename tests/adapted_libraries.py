"""Stand-ins for libraries that this machine lacks: their documented functions in plain torch.

They take the documented arguments and no others, so that an argument of another name is an error.
"""

from __future__ import annotations

import math
import types

import torch
from torch import Tensor


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Tensors are `[B, N, H, D]`; query i stands at key `i + M - N`; a window counts the keys
    before and after it, inclusive, and -1 is no limit; 0 is no softcap."""
    assert dropout_p == 0.0 and alibi_slopes is None
    n, m, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    at, j = torch.arange(n)[:, None] + m - n, torch.arange(m)
    left, right = window_size[0], 0 if causal else window_size[1]
    seen = torch.ones(n, m, dtype=torch.bool)
    if left >= 0:
        seen &= j >= at - left
    if right >= 0:
        seen &= j <= at + right
    scores = scores.masked_fill(~seen, -math.inf)
    out = (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    return (out.float(), lse.float(), None) if return_attn_probs else out.float()


def _decayed(q: Tensor, k: Tensor, v: Tensor, scale: float, gamma: Tensor) -> Tensor:
    """`scale * q_i . k_j * gamma_h ** (i - j)` for j <= i; tensors are `[B, T, H, D]`."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    at = torch.arange(q.shape[2])
    powers = gamma.double()[:, None, None] ** (at[:, None] - at).clamp(min=0)
    return ((q @ k.mT * scale * powers).tril() @ v).transpose(1, 2).float()


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Causal and linear, here without its own normaliser."""
    assert not normalize and initial_state is None and cu_seqlens is None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _decayed(q, k, v, scale, torch.ones(q.shape[2])), None


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Head h decays by `1 - 2 ** (-5 - h)` a position."""
    assert initial_state is None and cu_seqlens is None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gamma = 1 - 2.0 ** (-5 - torch.arange(q.shape[2], dtype=torch.float64))
    return _decayed(q, k, v, scale, gamma), None


def modules() -> dict[str, types.ModuleType]:
    """What `sys.modules` holds where the libraries are installed."""
    found = {}
    for name, functions in {
        "flash_attn": [flash_attn_func],
        "fla": [],
        "fla.ops": [],
        "fla.ops.linear_attn": [chunk_linear_attn],
        "fla.ops.retention": [chunk_retention],
    }.items():
        found[name] = types.ModuleType(name)
        for function in functions:
            setattr(found[name], function.__name__, function)
    return found
