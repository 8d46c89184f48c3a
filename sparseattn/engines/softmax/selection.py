"""Dynamic patterns: one choice of key blocks a call, shared by definition and implementations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import is_readable
from ...call import AttentionCall
from ...errors import PluginError, UnsupportedCallError
from ...runs import Run, cut, trim_future


@torch.no_grad()
def attach(mechanism: Any, q: Tensor, k: Tensor, call: AttentionCall) -> AttentionCall:
    """The call with the mechanism's selection, made in float32 or wider from q and k as given.

    Padding and packing are invisible to `select`: it is called for each run alone. While tracing,
    masks cannot be read: the selection is then left to the operator, which runs untraced.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    # Selection is constant to gradients, and the inputs' own precision decides, not autocast's.
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.detach(), k.detach()
        if not is_readable(q):
            return _attach_traced(mechanism, q.to(wide), k.to(wide), call)
        runs = cut(call)
        pieces = [_select(mechanism, q, k, call, run, wide) for run in runs]
    width = max((piece.shape[-1] for piece in pieces), default=1)
    if len(pieces) == 1 and pieces[0].shape[:3] == q.shape[:3]:
        return call.replace(selection=pieces[0])
    chosen = q.new_full((*q.shape[:3], width), -1, dtype=torch.int32)
    for run, piece in zip(runs, pieces, strict=True):
        chosen[run.batch, :, run.queries, : piece.shape[-1]] = piece
    return call.replace(selection=chosen)


def _attach_traced(mechanism: Any, q: Tensor, k: Tensor, call: AttentionCall) -> AttentionCall:
    masked = call.key_mask is not None or call.q_segments is not None
    if masked or isinstance(call.q_offset, Tensor):
        raise UnsupportedCallError(
            f"{mechanism!r} cannot choose its keys in traced or vmapped code when key_mask, "
            'segments or a tensor q_offset are given; use an engine (impl="torch"), or call eagerly'
        )
    return call.replace(selection=mechanism.select(q, k, call).to(torch.int32))


def _select(
    mechanism: Any, q: Tensor, k: Tensor, call: AttentionCall, run: Run, wide: torch.dtype
) -> Tensor:
    sub = run.subcall(call)
    reachable = trim_future(sub)
    if reachable < sub.m:
        # Keys after the last query are in no one's future selection: they must not be scored.
        run = run._replace(
            keys=slice(run.keys.start, run.keys.start + reachable),
            holes=None if run.holes is None else run.holes[:, :reachable],
        )
        sub = run.subcall(call)
    q_run = q[run.batch, :, run.queries].to(wide)
    k_run = k[run.batch, :, run.keys].to(wide)
    if run.holes is not None:
        k_run = k_run.masked_fill(~run.holes[:, None, :, None], 0.0)
    if sub.m == 0 or q_run.numel() == 0:
        return q.new_full((*q_run.shape[:3], 1), -1, dtype=torch.int32)
    ids = mechanism.select(q_run, k_run, sub.replace(dtype=wide))
    expected = f"int32 [B, Hq, N, S] = [{', '.join(map(str, q_run.shape[:3]))}, S]"
    if not isinstance(ids, Tensor) or ids.dtype != torch.int32 or ids.ndim != 4:
        raise PluginError(f"select of {mechanism!r} returned {_kind(ids)}; expected {expected}")
    if ids.shape[:3] != q_run.shape[:3] or ids.device != q_run.device:
        raise PluginError(f"select of {mechanism!r} returned {_kind(ids)}; expected {expected}")
    blocks = -(-sub.m // mechanism.block)
    if ids.numel() and (int(ids.min()) < -1 or int(ids.max()) >= blocks):
        raise PluginError(
            f"select of {mechanism!r} returned ids from {int(ids.min())} to {int(ids.max())}; "
            f"expected block ids 0 to {blocks - 1}, or -1 to pad"
        )
    return ids


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__
