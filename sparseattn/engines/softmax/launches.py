"""What every launch of the softmax engine's Triton kernels says of its call."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...call import AttentionCall
from ..triton_launch import Target, halves

_LOG2E = math.log2(math.e)


def numbers(call: AttentionCall) -> tuple[float, ...]:
    """scale, its rest, cap, its rest, as `logits` takes them."""
    if call.softcap is None:
        return (*halves(call.scale * _LOG2E), 1.0, 0.0)
    return (*halves(call.scale / call.softcap), *halves(call.softcap * _LOG2E))


def constants(target: Target, dtype: torch.dtype, call: AttentionCall) -> dict[str, Any]:
    """The constants that all kernels share, for inputs of a dtype."""
    import triton.language as tl

    from .triton import config

    kinds = {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }
    # The interpreter's products of bfloat16 are garbage.
    upcast = target.backend == "interpreter" and dtype == torch.bfloat16
    return {
        "SOFTCAP": call.softcap is not None,
        "PRECISION": config.precision(target, dtype),
        "NUMBER": tl.float64 if dtype == torch.float64 else tl.float32,
        "INPUT": tl.float32 if upcast else kinds[dtype],
        "D": config.padded(call.head_dim),
        "DV": config.padded(call.value_dim),
    }
