"""The operator that both engines stand behind: one boundary for autograd, compile and export.

A mechanism crosses it as an interned string (see `intern.py`) and a kernel as `engine:name`, so
that nothing but tensors, numbers and strings is ever traced. Kernels register in `KERNELS`; the
names `torch`, `native` and `triton` are the ones that the base classes look for.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..call import AttentionCall
from ..errors import UnsupportedCallError
from . import intern


class Kernel(Protocol):
    """What an engine's implementation gives to the operator."""

    def supports(self, mechanism: Any, call: AttentionCall) -> list[str]:
        """Reasons against a call, from static facts; empty when it can be served."""

    def forward(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        """out `[B, Hq, N, Dv]`; lse `[B, Hq, N]` (float32, or float64) or None."""

    def backward(
        self,
        mechanism: Any,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and bias (None where the call has none)."""


KERNELS: dict[str, Kernel] = {}

# What describes a call beside q, k and v. Sink logits compose outside, from lse.
_CALL = (
    "Tensor? key_mask, Tensor? q_segments, Tensor? kv_segments, Tensor? selection, Tensor? bias, "
    "Tensor? q_offsets, SymInt? q_offset, str spec, bool causal, float scale, float? softcap, "
    "str kernel"
)
_LIB = torch.library.Library("sparseattn", "DEF")
_LIB.define(f"attend(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)")
_LIB.define(
    "attend_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rebuild(q: Tensor, k: Tensor, v: Tensor, args: tuple[Any, ...]) -> AttentionCall:
    """The call that `_CALL` describes; it was validated before it was taken apart."""
    key_mask, q_seg, kv_seg, selection, bias, offsets, offset, _, causal, scale, softcap, _ = args
    return AttentionCall(
        batch=q.shape[0],
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        n=q.shape[2],
        m=k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        causal=causal,
        scale=scale,
        dtype=q.dtype,
        device=q.device,
        q_offset=offset if offsets is None else offsets,
        key_mask=key_mask,
        q_segments=q_seg,
        kv_segments=kv_seg,
        softcap=softcap,
        bias=bias,
        selection=selection,
    )


def _forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    mechanism, kernel = intern.resolve(args[-5]), args[-1]
    call = _rebuild(q, k, v, args)
    with torch.autocast(q.device.type, enabled=False):
        if call.selection is None:
            call = mechanism.with_selection(q, k, call)
        out, lse = KERNELS[kernel].forward(mechanism, q, k, v, call)
    if lse is None:
        lse = q.new_empty(_lse_shape(q, kernel), dtype=_wide(q.dtype))
    return out.contiguous(), lse.contiguous()


def _lse_shape(q: Tensor, kernel: str) -> tuple[int, ...]:
    # Only softmax has a log normaliser.
    return tuple(q.shape[:3]) if kernel.startswith("softmax:") else (0,)


def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mechanism, kernel = intern.resolve(args[-5]), args[-1]
    call = _rebuild(q, k, v, args)
    with torch.autocast(q.device.type, enabled=False):
        if call.selection is None:
            call = mechanism.with_selection(q, k, call)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        dq, dk, dv, dbias = KERNELS[kernel].backward(
            mechanism, grad_out, grad_lse, q, k, v, out, lse, call
        )
    grads = dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    dbias = q.new_empty(0) if call.bias is None or dbias is None else dbias.to(call.bias.dtype)
    return *(g.contiguous() for g in grads), dbias.contiguous()  # type: ignore[return-value]


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(_lse_shape(q, args[-1]), dtype=_wide(q.dtype))


def _backward_fake(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = args[4]
    dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


class _RefuseSecond(torch.autograd.Function):
    """Passes gradients on, and refuses to be differentiated.

    It takes what the gradients depend on too: autograd skips a node that leads to no input, and a
    skipped refusal is a silent zero.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in tensors[:count] if t is not None)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            'attention has no second derivative; impl="reference" is plain differentiable torch'
        )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.sparseattn.attend.default(q, k, v, *args)
        ctx.save_for_backward(q, k, v, out, lse, *args[:6])
        ctx.rest = args[6:]
        ctx.set_materialize_grads(False)
        if lse.shape != out.shape[:3]:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * (9 + len(ctx.rest))
        with torch.no_grad():
            dq, dk, dv, dbias = torch.ops.sparseattn.attend_backward.default(
                grad_out, grad_lse, q, k, v, out, lse, *tensors, *ctx.rest
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: a second derivative through these must fail, not be left out.
            sources = (q, k, v, tensors[4], grad_out, grad_lse)
            dq, dk, dv, dbias = _RefuseSecond.apply(4, dq, dk, dv, dbias, *sources)
        dbias = None if tensors[4] is None else dbias
        return (dq, dk, dv, None, None, None, None, dbias, None, *(None for _ in ctx.rest))


def _autograd(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if forward_ad._current_level >= 0:  # type: ignore[attr-defined]
        raise UnsupportedCallError(
            "attention has no forward-mode derivative (jvp, dual numbers); use reverse mode, or "
            'impl="reference", which is plain differentiable torch'
        )
    bias = args[4]
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _Attend.apply(q, k, v, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sparseattn.attend.default(q, k, v, *args)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Fold the mapped dimension into the batch."""
    size = info.batch_size
    batch = next(
        a.shape[1] if d == 0 else a.shape[0] for a, d in zip(args[:3], in_dims[:3], strict=True)
    )
    if any(d not in (None, 0) for d in in_dims):
        args = tuple(
            a.movedim(d, 0) if isinstance(a, Tensor) and d is not None else a
            for a, d in zip(args, in_dims, strict=True)
        )
        batch = next(
            a.shape[1] if d is not None else a.shape[0]
            for a, d in zip(args[:3], in_dims[:3], strict=True)
        )
    folded: list[Any] = []
    for a, d in zip(args, in_dims, strict=True):
        if not isinstance(a, Tensor):
            folded.append(a)
            continue
        a = a if d is not None else a[None].expand(size, *a.shape)
        if a.shape[1] != batch:  # a bias shared by the batch
            a = a.expand(size, batch, *a.shape[2:])
        folded.append(a.reshape(size * batch, *a.shape[2:]))
    out, lse = torch.ops.sparseattn.attend.default(*folded)
    if lse.shape == out.shape[:3]:
        return (out.unflatten(0, (size, batch)), lse.unflatten(0, (size, batch))), (0, 0)
    return (out.unflatten(0, (size, batch)), lse), (0, None)


for _name, _body, _fake in (
    ("attend", _forward, _forward_fake),
    ("attend_backward", _backward, _backward_fake),
):
    _LIB.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparseattn::{_name}", _fake, lib=_LIB)
_LIB.impl("attend", _autograd, "Autograd")
torch.library.register_vmap("sparseattn::attend", _vmap, lib=_LIB)


def attend(
    mechanism: Any, kernel: str, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Run a kernel on a validated call; differentiable in q, k, v, bias and sink logits.

    Returns:
        out `[B, Hq, N, Dv]` and lse `[B, Hq, N]` (empty for the linear engine).
    """
    offset = call.q_offset
    out, lse = torch.ops.sparseattn.attend.default(
        q,
        k,
        v,
        call.key_mask,
        call.q_segments,
        call.kv_segments,
        call.selection,
        call.bias,
        offset if isinstance(offset, Tensor) else None,
        None if isinstance(offset, Tensor) else offset,
        intern.key(mechanism),
        call.causal,
        call.scale,
        call.softcap,
        kernel,
    )
    if call.sink_logits is None:
        return out, lse
    # softmax with one more logit s: the other weights shrink by sigmoid(lse - s).
    sink = call.sink_logits.to(lse.dtype)[None, :, None]
    empty = lse == -torch.inf
    finite = lse.masked_fill(empty, 0.0)
    share = torch.sigmoid(finite - sink).masked_fill(empty, 0.0)
    total = torch.where(empty, sink.expand_as(lse), torch.logaddexp(finite, sink))
    return (out * share[..., None]).to(out.dtype), total
