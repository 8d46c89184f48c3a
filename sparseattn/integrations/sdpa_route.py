"""Every other model that calls torch's `scaled_dot_product_attention`.

While a swapped module's forward runs, a `TorchFunctionMode` catches the call in that thread,
wherever its name was bound. torch's own `multi_head_attention_forward` is one function to the mode,
so it runs as a copy whose attention is ours. Nothing that other models use is replaced.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from .. import functional
from ..base import Mechanism
from ..errors import InvalidInputError, SwapError, UnsupportedCallError
from . import dense_mask, places
from .places import Place

_torch_sdpa = torch.nn.functional.scaled_dot_product_attention
_torch_mha = torch.nn.functional.multi_head_attention_forward
_ORDER = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def may_reach(module: nn.Module) -> bool:
    """Whether a module's class shows a call of torch's attention."""
    found = "scaled_dot_product_attention" in places.code_names(type(module))
    return found or isinstance(module, nn.MultiheadAttention)


def is_plain(module: nn.Module) -> bool:
    """Whether torch made it, and it attends to nothing: a layer, a container."""
    where = type(module).__module__
    torchs = where.startswith("torch.nn.") and where != "torch.nn.modules.transformer"
    return torchs and not may_reach(module)


class _Frame(NamedTuple):
    module: nn.Module
    crosses: bool
    grad: bool  # whether gradients were wanted where it began


class _Frames(threading.local):
    """The swapped modules whose forward runs in this thread, the innermost last."""

    def __init__(self) -> None:
        self.modules: list[_Frame] = []
        self.modes: list[_Catch] = []


_frames = _Frames()


class _Catch(TorchFunctionMode):
    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _torch_sdpa:
            func = _serve
        elif func is _torch_mha:
            func = _multi_head
        try:
            return func(*args, **(kwargs or {}))
        except (KeyboardInterrupt, SystemExit):
            # torch calls no hook then. The mode itself cannot leave here; the next forward has it.
            _frames.modules.clear()
            raise


@torch.compiler.disable
def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if places.ruling(module) is None:
        return  # a copy of a swapped module has its hooks, but is in no swap
    if not _frames.modes:
        # It belongs to a thread, and to a forward: also to one that checkpointing repeats.
        mode = _Catch()
        mode.__enter__()
        _frames.modes.append(mode)
    crosses = places.crosses(module, args, kwargs)
    _frames.modules.append(_Frame(module, crosses, torch.is_grad_enabled()))


@torch.compiler.disable
def _leave(module: nn.Module, *_: Any) -> None:
    for at in range(len(_frames.modules) - 1, -1, -1):
        if _frames.modules[at].module is module:
            del _frames.modules[at:]
            break
    if not _frames.modules and _frames.modes:
        _frames.modes.pop().__exit__(None, None, None)


def watch(module: nn.Module) -> Callable[[nn.Module], None]:
    """Know when a module's forward runs; returns what undoes it."""
    hooks = [
        module.register_forward_pre_hook(_enter, with_kwargs=True),
        module.register_forward_hook(_leave, always_call=True),
    ]

    def undo(module: nn.Module) -> None:
        for hook in hooks:
            hook.remove()
        _leave(module)  # where its forward runs now, for the hook will not

    return undo


@torch.compiler.disable
def _serve(*args: Any, **kwargs: Any) -> Tensor:
    """One call of torch's attention, by whatever the innermost swapped module's swap chose."""

    def original() -> Tensor:
        with places.inside():
            found: Tensor = _torch_sdpa(*args, **kwargs)
        return found

    if places.is_inside() or not _frames.modules:
        return original()
    frame = _frames.modules[-1]
    place = places.ruling(frame.module)
    if place is None:
        return original()
    chosen = place.swap.cross if frame.crosses else place.swap.chosen(place.name)
    if chosen is None:
        place.count_exact("torch")
        return original()
    given = dict(zip(_ORDER, args, strict=False)) | kwargs
    exact = chosen.nature == "exact" and place.swap.impl in ("auto", "torch")
    if exact and not given.get("dropout_p"):
        place.count(chosen, "torch")
        return original()
    if frame.grad and not torch.is_grad_enabled() and _is_checkpointing():
        raise SwapError(
            f"module {place.name!r} checkpoints a function of its own (use_reentrant=True): its "
            "repetition in the backward would find no swap. Checkpoint whole modules instead"
        )
    try:
        out, impl = _attend(chosen, place, given)
    except UnsupportedCallError as error:
        if place.swap.on_unsupported == "raise":
            raise UnsupportedCallError(
                f"module {place.name!r}: {error}. Give it another mechanism with layers={{...}}, "
                'or on_unsupported="full"',
                error.reasons,
            ) from error
        place.count_fallback(chosen, "torch", error.reasons)
        return original()
    place.count(chosen, impl)
    return out


def _is_checkpointing() -> bool:
    """Whether reentrant checkpointing called this, which repeats it without the module's hooks."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def _attend(mechanism: Mechanism, place: Place, given: dict[str, Any]) -> tuple[Tensor, str]:
    if given.get("dropout_p"):
        raise UnsupportedCallError(
            f"attention dropout of {given['dropout_p']} is no part of a mechanism; call "
            "model.eval(), or set the module's dropout to 0"
        )
    query, key, value = (given[name] for name in ("query", "key", "value"))
    mask: Tensor | None = given.get("attn_mask")
    if query.is_nested:
        raise UnsupportedCallError("nested tensors have no shape that a mechanism could read")
    if mask is not None and given.get("is_causal"):
        raise InvalidInputError(
            f"module {place.name!r}: attn_mask was given beside is_causal=True; torch's attention "
            "takes one of them"
        )
    # torch broadcasts all axes but the last two, and of grouped heads all but the last three.
    own = 3 if given.get("enable_gqa") else 2
    lead = torch.broadcast_shapes(
        *(x.shape[:-own] for x in (query, key, value, mask) if x is not None)
    )
    q, k, v = (_four(x.expand(*lead, *x.shape[-own:]), own) for x in (query, key, value))
    n, m = q.shape[2], k.shape[2]
    said: dict[str, Any] = {}
    if mask is not None:
        heads = query.shape[-3:-2] if own == 3 else ()
        dense = _four(mask.expand(*lead, *heads, n, m), own)
        said = dense_mask.read(dense, q.shape[0], n, m, q.dtype)
    elif given.get("is_causal"):
        # torch aligns query 0 with key 0.
        said = {"causal": True} | ({"q_offset": 0} if n != m else {})
    scale = given.get("scale")
    if scale is not None and float(scale) != q.shape[-1] ** -0.5:
        said["scale"] = float(scale)
    with places.inside():
        out, _, impl = functional.serve(mechanism, q, k, v, impl=place.swap.impl, **said)
    return out.reshape(*lead, *query.shape[-own:-1], v.shape[-1]), impl


def _four(x: Tensor, own: int) -> Tensor:
    """As `[B, H, L, E]`: without heads of its own (`own` is 2) the last axis before L is H."""
    if x.ndim == 2:
        return x[None, None]
    if x.ndim == 3:
        return x[:, None] if own == 2 else x[None]
    return x.flatten(0, -4)


# torch's multi-head attention, word for word, but for the attention that it calls.
_multi_head: Any = torch.compiler.disable(
    types.FunctionType(
        _torch_mha.__code__,
        {**vars(torch.nn.functional), "scaled_dot_product_attention": _serve},
        _torch_mha.__name__,
        _torch_mha.__defaults__,
        _torch_mha.__closure__,
    )
)
