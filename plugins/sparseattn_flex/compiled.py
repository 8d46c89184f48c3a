"""FlexAttention compiled: once for each static configuration, and kept."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

import sparseattn as sa

from .clauses import visible
from .plan import BLOCK, Plan


class Config(NamedTuple):
    """What is compiled into a kernel. Sizes, dtypes and strides are torch's own to guard.

    Attributes:
        terms: the pattern. scale, softcap: as in `attention`.
        key_mask, segments: whether they are given. lse: whether it is returned.
        device: its type.
    """

    terms: Any
    scale: float
    softcap: float | None
    key_mask: bool
    segments: bool
    lse: bool
    device: str


_lock = threading.Lock()
_made: dict[Config, Callable[..., Any]] = {}


def _compile(config: Config) -> Callable[..., Any]:
    cap = config.softcap

    def soft(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    def flex(q: Tensor, k: Tensor, v: Tensor, plan: Any, masks: Any) -> Any:
        offset, tables, blocks, transposed = plan
        key_mask, segments = masks

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = visible(config.terms, tables, i + offset, j)
            if config.key_mask:
                seen = seen & key_mask[b, j]
            if config.segments:
                seen = seen & (segments[b, i] == segments[b, j])
            return seen

        mask = BlockMask(
            (q.shape[2], k.shape[2]), *blocks, *(transposed or (None,) * 4), BLOCK_SIZE=(BLOCK, BLOCK),
            mask_mod=mask_mod,
        )
        return flex_attention(
            q, k, v,
            score_mod=None if cap is None else soft,
            block_mask=mask,
            scale=config.scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True) if config.lse else None,
        )

    # torch counts recompilations by code object, and gives up after a few: each configuration has
    # its own.
    code = flex.__code__.replace(co_name=f"flex_{len(_made)}")
    own = types.FunctionType(code, flex.__globals__, code.co_name, None, flex.__closure__)
    return torch.compile(own, fullgraph=True)


def _of_any_size(x: Tensor | None) -> Tensor | None:
    """x, with sizes that are not compiled in.

    A compilation takes seconds on the CPU, so that one should serve all sizes. On a GPU sizes are
    torch's to judge: compiled in, until one varies. `dynamic=True` would turn the numbers of the
    pattern into symbols too, which FlexAttention's CPU template does not take.
    """
    if x is None or x.device.type != "cpu":
        return x
    x = x.detach()  # the mark stays on the tensor, which may be the caller's own
    for dim in range(x.dim()):
        torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def attend(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, call: sa.AttentionCall
) -> tuple[Tensor, Tensor | None]:
    """Serve a call that `Flex.supports`; shapes as in `Implementation.run`."""
    sink = call.sink_logits
    config = Config(
        plan.terms,
        call.scale,
        call.softcap,
        call.key_mask is not None,
        call.q_segments is not None,
        call.needs_lse or sink is not None,
        call.device.type,
    )
    with _lock:
        kernel = _made.get(config)
        if kernel is None:
            kernel = _made[config] = _compile(config)
    unseen = plan.unseen
    if call.key_mask is not None:
        hidden = ~call.key_mask
        unseen = hidden if unseen is None else hidden | unseen
    if unseen is not None:
        # Their weights are 0, but 0 * NaN is NaN.
        unseen = unseen.view(-1, 1, call.m, 1)
        k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    inputs = (_of_any_size(x) for x in (q, k, v))
    pattern = (
        plan.offset,
        *(tuple(map(_of_any_size, x)) for x in (plan.tables, plan.blocks, plan.transposed)),
    )
    result = kernel(*inputs, pattern, (_of_any_size(call.key_mask), _of_any_size(call.q_segments)))
    if not config.lse:
        return result, None
    out, lse = result[0], result[1].lse
    return (out, lse) if sink is None else _with_sink(out, lse, sink)


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """softmax with one more logit a head, which takes weight and has no value."""
    sink = sink.to(lse.dtype)[:, None]
    empty = lse == -torch.inf
    finite = lse.masked_fill(empty, 0.0)
    share = torch.sigmoid(finite - sink).masked_fill(empty, 0.0)
    total = torch.where(empty, sink, torch.logaddexp(finite, sink))
    return (out * share[..., None]).to(out.dtype), total
