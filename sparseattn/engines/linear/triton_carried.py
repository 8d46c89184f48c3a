"""The launches of the kernels that carry states through long spans: which calls, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ..triton_launch import launch, target

if TYPE_CHECKING:
    from .triton_launcher import Launcher

# Kernels that carry states: of a call, and of its gradients.
_FORWARD = ("outputs",)
_BACKWARD = ("means", "grad_queries", "grad_keys", "grad_values")


def carries(
    call: AttentionCall, features: int, backward: bool, parts: int = 1, projected: bool = False
) -> dict[str, Any]:
    """How kernels are cut that carry states of so many features; empty where none serve."""
    from .triton import config

    dtype, on = config.products(call.dtype), target(call.device)
    found = {
        kernel: config.carry(on, dtype, features, parts, call.value_dim, projected, kernel)
        for kernel in (_BACKWARD if backward else _FORWARD)
    }
    return {} if None in found.values() else found


def span(carried: dict[str, Any]) -> int:
    """Positions in a span."""
    from .triton import config

    return config.LONG_SPAN if carried else config.SPAN


def _options(on: Launcher, name: str) -> tuple[int, dict[str, Any]]:
    """How many blocks a state has, and constants and options of a launch."""
    from .triton import config

    carry, features = on.carries[name], on.features * on.parts
    even = features % carry.features == 0 and on.call.value_dim % carry.values == 0
    if on.maps[0].projection is not None:
        even &= on.width == config.padded(on.width)
    options = on.constants | {
        "EVEN": even,
        "ROWS": carry.rows,
        "D": config.padded(on.width),
        "F": carry.features,
        "E": carry.values,
        "num_warps": carry.warps,
        "num_stages": carry.stages,
    }
    if name == "means":
        del options["NORMALIZE"]
    blocks = -(-on.call.value_dim // carry.values)
    return max(blocks, -(-features // carry.features)), options


def _launch(
    on: Launcher, kernel: Any, tables: Any, heads: int, tensors: Any, state: Tensor, options: Any
) -> None:
    """Launch a kernel on tables of tiles, each with constants of its own.

    Args:
        tensors: in the order of arguments; so are the strides of those with four dimensions.
    """
    name, more, ways = options
    blocks, constants = _options(on, name)
    lengths = next(x for x in tensors if x.ndim == 3)
    strides = [stride for x in tensors if x.ndim == 4 for stride in x.stride()[:3]]
    strides += [*lengths.stride()[:2], *on.k_shift.stride()[:2], on.key_mask.stride(0)]
    call = on.call
    for tiles, way in zip(tables, ways, strict=True):
        launch(
            kernel,
            (tiles.shape[0] * blocks, heads, on.batch),
            *(*tensors, state, on.plan.runs, tiles, on.key_mask, on.logs, on.projection),
            *(on.q_shift, on.k_shift, *strides),
            *(on.width, call.value_dim, on.features, call.groups, on.plan.slots, on.span),
            *on.numbers,
            WALK=way,
            **more,
            **constants,
        )


def walk(on: Launcher, kernel: Any, name: str, tensors: Any, state: Tensor, **more: Any) -> None:
    """Launch a kernel that carries states of keys, on spans and on queries beyond them."""
    options = (name, {"CAUSAL": on.call.causal, **more}, (True, False))
    tables = (on.plan.walks, on.plan.tails)
    _launch(on, kernel, tables, on.call.q_heads, tensors, state, options)


def walk_back(
    on: Launcher, kernel: Any, name: str, tensors: Any, state: Tensor, **more: Any
) -> None:
    """Launch a kernel that carries states of queries; the last of tensors has the heads of keys,
    and takes the sum over those of queries where each has a state of its own."""
    *given, into = tensors
    taken, groups = into, on.call.groups
    apart = on.decays and groups > 1
    if apart:
        shape = (into.shape[0], on.call.q_heads, *into.shape[2:])
        taken = torch.zeros(shape, dtype=on.number, device=into.device)
    options = (name, more, (on.call.causal,))
    _launch(on, kernel, (on.plan.key_tiles,), on.heads, (*given, taken), state, options)
    if apart:
        into.copy_(taken.unflatten(1, (on.call.kv_heads, groups)).sum(2))
