"""Every other model that calls torch's `scaled_dot_product_attention`.

The call is caught twice over: a `TorchFunctionMode` sees it wherever its name was bound, and a
replacement in `torch.nn.functional` sees it inside of torch's own multi-head attention. Both look
for a forward of a swapped model in their own thread first, and otherwise do what torch does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import functional
from ..base import Mechanism
from ..errors import UnsupportedCallError
from . import dense_mask, places
from .places import Place

_torch_sdpa = torch.nn.functional.scaled_dot_product_attention
_ORDER = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_lock = threading.RLock()
_active = 0  # swaps that need the replacement


def may_reach(module: nn.Module) -> bool:
    """Whether a module's class shows a call of torch's attention."""
    found = "scaled_dot_product_attention" in places.code_names(type(module))
    return found or isinstance(module, nn.MultiheadAttention)


class _Frames(threading.local):
    """The swapped modules whose forward runs in this thread, the innermost last."""

    def __init__(self) -> None:
        self.modules: list[tuple[nn.Module, bool]] = []
        self.modes: list[_Catch] = []


_frames = _Frames()


class _Catch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _torch_sdpa:
            return _serve(args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _replacement(*args: Any, **kwargs: Any) -> Any:
    return _serve(args, kwargs)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if places.ruling(module) is None:
        return  # a copy of a swapped module has its hooks, but is in no swap
    if not _frames.modules:
        # It belongs to a thread, and to a forward: also to one that checkpointing repeats.
        mode = _Catch()
        mode.__enter__()
        _frames.modes.append(mode)
    _frames.modules.append((module, places.crosses(module, args, kwargs)))


def _leave(module: nn.Module, *_: Any) -> None:
    for at in range(len(_frames.modules) - 1, -1, -1):
        if _frames.modules[at][0] is module:
            del _frames.modules[at:]
            break
    if not _frames.modules and _frames.modes:
        _frames.modes.pop().__exit__(None, None, None)


def watch(module: nn.Module) -> list[Callable[[], None]]:
    """Know when a module's forward runs; returns what undoes it."""
    return [
        module.register_forward_pre_hook(_enter, with_kwargs=True).remove,
        module.register_forward_hook(_leave, always_call=True).remove,
    ]


def begin() -> None:
    global _active
    with _lock:
        _active += 1
        torch.nn.functional.scaled_dot_product_attention = _replacement  # type: ignore[assignment]


def end() -> None:
    global _active
    with _lock:
        _active -= 1
        if not _active:
            torch.nn.functional.scaled_dot_product_attention = _torch_sdpa


def _serve(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """One call of torch's attention, by whatever the innermost swapped module's swap chose."""

    def original() -> Tensor:
        with places.inside():
            found: Tensor = _torch_sdpa(*args, **kwargs)
        return found

    if places.is_inside() or not _frames.modules:
        return original()
    module, cross = _frames.modules[-1]
    place = places.ruling(module)
    if place is None:
        return original()
    chosen = place.swap.cross if cross else place.swap.chosen(place.name)
    if chosen is None:
        place.count_exact("torch")
        return original()
    given = dict(zip(_ORDER, args, strict=False)) | kwargs
    exact = chosen.nature == "exact" and place.swap.impl in ("auto", "torch")
    if exact and not given.get("dropout_p"):
        place.count(repr(chosen), "torch")
        return original()
    try:
        out, impl = _attend(chosen, place, given)
    except UnsupportedCallError as error:
        if place.swap.on_unsupported == "raise":
            raise UnsupportedCallError(
                f"module {place.name!r}: {error}. Give it another mechanism with layers={{...}}, "
                'or on_unsupported="full"',
                error.reasons,
            ) from error
        place.count_fallback(repr(chosen), "torch", error.reasons)
        return original()
    place.count(repr(chosen), impl)
    return out


def _attend(mechanism: Mechanism, place: Place, given: dict[str, Any]) -> tuple[Tensor, str]:
    query = given["query"]
    if given.get("dropout_p"):
        raise UnsupportedCallError(
            f"attention dropout of {given['dropout_p']} is no part of a mechanism; call "
            "model.eval(), or set the module's dropout to 0"
        )
    lead = query.shape[:-3]
    q, k, v = (_four(given[name], lead) for name in ("query", "key", "value"))
    if not given.get("enable_gqa") and k.shape[1] != q.shape[1]:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    n, m = q.shape[2], k.shape[2]
    said: dict[str, Any] = {}
    mask = given.get("attn_mask")
    if mask is not None:
        mask = _four(mask, lead) if mask.ndim >= 2 else mask.expand(1, 1, 1, m)
        said = dense_mask.read(mask, q.shape[0], n, m, q.dtype)
    elif given.get("is_causal"):
        # torch aligns query 0 with key 0.
        said = {"causal": True} | ({"q_offset": 0} if n != m else {})
    scale = given.get("scale")
    if scale is not None and float(scale) != q.shape[-1] ** -0.5:
        said["scale"] = float(scale)
    with places.inside():
        out, _, impl = functional.serve(mechanism, q, k, v, impl=place.swap.impl, **said)
    return out.reshape(*query.shape[:-1], v.shape[-1]), impl


def _four(x: Tensor, lead: torch.Size) -> Tensor:
    """`[..., H, L, E]` as `[B, H, L, E]`; what has fewer axes gets axes of one."""
    while x.ndim < 4:
        x = x[None] if x.ndim != 3 or lead else x[:, None]
    if x.ndim == 4:
        return x
    return x.expand(*lead, *x.shape[-3:]).flatten(0, -4)
