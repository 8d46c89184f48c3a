"""The operator that both engines stand behind: one boundary for autograd, compile and export.

A mechanism crosses it as an interned string (see `intern.py`) and a kernel as `engine:name`, so
that nothing but tensors, numbers and strings is ever traced. Kernels register in `KERNELS`; the
names `torch`, `native` and `triton` are the ones that the base classes look for.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..call import AttentionCall
from ..digits import doubled, wide
from ..errors import UnsupportedCallError
from . import intern


class Kernel(Protocol):
    """What an engine's implementation gives to the operator."""

    def missing(self) -> list[str]:
        """What this machine lacks for any call; empty where it can serve some."""

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

# What describes a call beside q, k and v; sink_logits is [B or 1, Hq].
_CALL = (
    "Tensor? key_mask, Tensor? q_segments, Tensor? kv_segments, Tensor? selection, Tensor? bias, "
    "Tensor? sink_logits, Tensor? q_offsets, SymInt? q_offset, str spec, bool causal, float scale, "
    "float? softcap, str kernel"
)
_BIAS, _SINK, _TENSORS = 4, 5, 7
# With fewer pairs of a query and a key than this, kernels compute with twice the digits: the
# rounding of single numbers shows in the greatest error of a small result, and costs next to
# nothing to avoid. Forward, the pairs of one row of the batch count, so that a row gives the same
# bits in any batch; backward, those of the whole batch. The native kernels take care of few
# pairs themselves.
FEW_PAIRS, FEW_PAIRS_BACKWARD = 2**12, 2**19
FEW = {name: (FEW_PAIRS, FEW_PAIRS_BACKWARD) for name in ("torch", "triton")}
_LIB = torch.library.Library("sparseattn", "DEF")
_LIB.define(f"attend(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)")
_LIB.define(
    "attend_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


_NOTHING = contextlib.nullcontext()


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Inputs are cast already: autocast would only turn wide products back to half.

    Entering torch's own context costs microseconds: it is entered only where it changes anything.
    """
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


def _rebuild(
    mechanism: Any, q: Tensor, k: Tensor, v: Tensor, args: tuple[Any, ...]
) -> AttentionCall:
    """The call that `_CALL` describes, without its sink logits; it was validated before it was
    taken apart."""
    key_mask, q_seg, kv_seg, selection, bias, _, offsets, offset, _, causal, scale, softcap, _ = (
        args
    )
    if offsets is None:
        offsets = k.shape[2] - q.shape[2] if offset is None else offset
    call = AttentionCall(
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
        q_offset=offsets,
        key_mask=key_mask,
        q_segments=q_seg,
        kv_segments=kv_seg,
        softcap=softcap,
        bias=bias,
        selection=selection,
    )
    return call if selection is not None else mechanism.with_selection(q, k, call)


def _digits(kernel: str, call: AttentionCall, rows: int, backward: bool) -> torch.dtype:
    """The dtype to compute a call in: a wider one where `rows` of its batch have few pairs."""
    few = FEW.get(kernel.split(":")[1], (0, 0))[backward]
    return doubled(call.dtype) if rows * call.q_heads * call.n * call.m < few else call.dtype


def sinking(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """softmax with one more logit s, which has no value: other weights shrink by sigmoid(lse - s).

    Where no key is visible, lse is s alone.
    """
    sink = sink.to(lse.dtype)[..., None]
    empty = lse == -torch.inf
    finite = lse.masked_fill(empty, 0.0)
    share = torch.sigmoid(finite - sink).masked_fill(empty, 0.0)
    total = torch.where(empty, sink.expand_as(lse), torch.logaddexp(finite, sink))
    return (out * share[..., None]).to(out.dtype), total


def _sink_gradient(
    sink: Tensor, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> Tensor:
    """The gradient of sink logits `[B or 1, Hq]`, from the total out and lse: as that of any
    logit, `P * (grad . v + dlse - grad . out)` with v = 0, summed over the queries."""
    slope = -(grad_out.to(lse.dtype) * out).sum(-1)
    if grad_lse is not None:
        slope = slope + grad_lse
    share = (sink.to(lse.dtype)[..., None] - lse).exp()
    grads = (slope * share).masked_fill(lse == -torch.inf, 0.0).sum(-1)
    return grads.sum(0, keepdim=True) if sink.shape[0] == 1 else grads


def _run(
    mechanism: Any,
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """A kernel's forward in the dtype of q, with the sink logits."""
    out, lse = KERNELS[kernel].forward(mechanism, q, k, v, call)
    return (out, lse) if sink is None or lse is None else sinking(out, lse, sink)


def _forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    mechanism, kernel = intern.resolve(args[-5]), args[-1]
    with without_autocast(q.device.type):
        call = _rebuild(mechanism, q, k, v, args)
        dtype = _digits(kernel, call, 1, False)
        inputs = (q, k, v) if dtype == q.dtype else (q.to(dtype), k.to(dtype), v.to(dtype))
        out, lse = _run(mechanism, kernel, *inputs, call.to_dtype(dtype), args[_SINK])
    if lse is None:
        lse = q.new_empty(_lse_shape(q, kernel))
    return out.to(q.dtype).contiguous(), lse.to(_lse_dtype(q, kernel)).contiguous()


def _lse_shape(q: Tensor, kernel: str) -> tuple[int, ...]:
    # Only softmax has a log normaliser.
    return tuple(q.shape[:3]) if kernel.startswith("softmax:") else (0,)


def _lse_dtype(q: Tensor, kernel: str) -> torch.dtype:
    # The native gradients measure all weights of a row from it: its rounding to float32 would be
    # an error of each. `EngineImplementation` rounds what the caller gets.
    return torch.float64 if kernel == "softmax:native" else wide(q.dtype)


def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    mechanism, kernel = intern.resolve(args[-5]), args[-1]
    bias, sink = args[_BIAS], args[_SINK]
    with without_autocast(q.device.type):
        call = _rebuild(mechanism, q, k, v, args)
        if sink is not None:  # lse and out have its share
            call = call.replace(sink_logits=sink)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        dtype = _digits(kernel, call, call.batch, True)
        inputs = (q, k, v)
        if dtype != q.dtype:
            inputs = (q.to(dtype), k.to(dtype), v.to(dtype))
            grad_out, call = grad_out.to(dtype), call.to_dtype(dtype)
            out, found = _run(mechanism, kernel, *inputs, call, sink)
            lse = lse if found is None else found
        dq, dk, dv, dbias = KERNELS[kernel].backward(
            mechanism, grad_out, grad_lse, *inputs, out, lse, call
        )
        dsink = None
        if sink is not None:
            dsink = _sink_gradient(sink, grad_out, grad_lse, out, lse)
    grads = (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))
    extra = (
        q.new_empty(0) if x is None or g is None else g.to(x.dtype)
        for x, g in ((bias, dbias), (sink, dsink))
    )
    return tuple(g.contiguous() for g in (*grads, *extra))


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(_lse_shape(q, args[-1]), dtype=_lse_dtype(q, args[-1]))


def _backward_fake(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    extra = (
        q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (args[_BIAS], args[_SINK])
    )
    return (*(x.new_empty(x.shape) for x in (q, k, v)), *extra)


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
        raise UnsupportedCallError(
            'attention has no second derivative; impl="reference" is plain differentiable torch'
        )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.sparseattn.attend.default(q, k, v, *args)
        ctx.save_for_backward(q, k, v, out, lse, *args[:_TENSORS])
        ctx.rest = args[_TENSORS:]
        ctx.set_materialize_grads(False)
        if lse.shape != out.shape[:3]:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        bias, sink = tensors[_BIAS], tensors[_SINK]
        if grad_out is None and grad_lse is None:
            return (None,) * (3 + _TENSORS + len(ctx.rest))
        with torch.no_grad():
            grads = torch.ops.sparseattn.attend_backward.default(
                grad_out, grad_lse, q, k, v, out, lse, *tensors, *ctx.rest
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: a second derivative through these must fail, not be left out.
            sources = (q, k, v, bias, sink, grad_out, grad_lse)
            grads = _RefuseSecond.apply(5, *grads, *sources)
        dq, dk, dv, dbias, dsink = grads
        return (
            *(dq, dk, dv, None, None, None, None),
            None if bias is None else dbias,
            None if sink is None else dsink,
            *(None for _ in range(_TENSORS - _SINK - 1 + len(ctx.rest))),
        )


def _autograd(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if forward_ad._current_level >= 0:  # type: ignore[attr-defined]
        raise UnsupportedCallError(
            "attention has no forward-mode derivative (jvp, dual numbers); use reverse mode, or "
            'impl="reference", which is plain differentiable torch'
        )
    differentiable = (q, k, v, args[_BIAS], args[_SINK])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
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
        if a.shape[1] != batch:  # a bias or sink logits shared by the batch
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
    offset, sink = call.q_offset, call.sink_logits
    return torch.ops.sparseattn.attend.default(
        q,
        k,
        v,
        call.key_mask,
        call.q_segments,
        call.kv_segments,
        call.selection,
        call.bias,
        None if sink is None else sink[None],
        offset if isinstance(offset, Tensor) else None,
        None if isinstance(offset, Tensor) else offset,
        intern.key(mechanism),
        call.causal,
        call.scale,
        call.softcap,
        kernel,
    )
