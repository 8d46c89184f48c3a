"""FlexAttention compiled: once for each static configuration, and kept."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx.experimental._config
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

import sparseattn as sa

from .clauses import visible
from .plan import BLOCK, Plan


class Config(NamedTuple):
    """What is compiled into a kernel.

    Attributes:
        terms: the pattern. scale, softcap: as in `attention`.
        key_mask, segments: whether they are given. lse: whether it is returned.
        grouped: whether heads of keys are fewer than heads of queries.
        of_one: what torch compiles apart however sizes are marked: the device's type, the dtype,
            and which sizes are 1. Otherwise sizes are not compiled in on the CPU, and torch's to
            judge on a GPU.
    """

    terms: Any
    scale: float
    softcap: float | None
    key_mask: bool
    segments: bool
    lse: bool
    grouped: bool
    of_one: tuple[Any, ...]


_lock = threading.Lock()
_made: dict[Config, Callable[..., Any]] = {}


def _compile(config: Config) -> Callable[..., Any]:
    cap = config.softcap

    def soft(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert cap is not None
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
            (q.shape[2], k.shape[2]),
            *blocks,
            *(transposed or (None,) * 4),
            BLOCK_SIZE=(BLOCK, BLOCK),
            mask_mod=mask_mod,
        )
        return flex_attention(
            q,
            k,
            v,
            score_mod=None if cap is None else soft,
            block_mask=mask,
            scale=config.scale,
            enable_gqa=config.grouped,
            return_aux=AuxRequest(lse=True) if config.lse else None,
        )

    # torch counts recompilations by code object, and gives up after a few: each configuration has
    # its own.
    code = flex.__code__.replace(co_name=f"flex_{len(_made)}")
    own = types.FunctionType(code, flex.__globals__, code.co_name, None, flex.__closure__)
    return torch.compile(own, fullgraph=True)


def _of_any_size(x: Tensor | None) -> Tensor | None:
    """x, with sizes that are not compiled in: for the CPU, where compiling takes seconds.

    `dynamic=True` would turn the numbers of the pattern into symbols too, which FlexAttention's CPU
    template does not take.
    """
    if x is None:
        return None
    x = x.detach().contiguous()  # the mark stays on the tensor, which may be the caller's own
    for dim, size in enumerate(x.shape):
        if size > 1:
            torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def _on_cpu(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """Call a kernel that serves all sizes, and have it show NaN."""

    def run(*inputs: Any) -> Tensor:
        inputs, others = torch.utils._pytree.tree_map_only(Tensor, _of_any_size, (inputs, rest))
        # Sizes that happen to be equal in the first call need not be in the next.
        with torch.no_grad(), torch.fx.experimental._config.patch(use_duck_shape=False):
            return kernel(*inputs, *others)  # type: ignore[no-any-return]

    if q.isinf().any() or k.isinf().any():
        raise sa.UnsupportedCallError(
            "implementation 'flex' got q or k with an infinity, which FlexAttention on the CPU may "
            'turn into a plausible number; take another with impl=, such as "torch"'
        )
    out = run(q, k, v)
    # A NaN in a score makes the CPU kernel leave out keys, or all of the row. Which rows see one is
    # told by the same kernel: the mean of 0 and 1 over the keys that a row sees is above 0 where
    # one of them is 1.
    bad_q, bad_k = (x.isnan().any(-1, keepdim=True) for x in (q, k))
    for bad, rows in ((bad_k, torch.ones_like(bad_q)), (torch.ones_like(bad_k), bad_q)):
        if bad.any() and rows.any() and (bad_q.any() or bad_k.any()):
            mean = run(torch.zeros_like(q), torch.zeros_like(k), bad.to(v.dtype).expand_as(v))
            out = out.masked_fill((mean > 0) & rows, torch.nan)
    return out


def attend(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, call: sa.AttentionCall
) -> tuple[Tensor, Tensor | None]:
    """Serve a call that `Flex.supports`; shapes as in `Implementation.run`."""
    sink = call.sink_logits
    sized = (q, v, *plan.blocks[1:2], *(table.listed for table in plan.tables))
    config = Config(
        plan.terms,
        call.scale,
        call.softcap,
        call.key_mask is not None,
        call.q_segments is not None,
        call.needs_lse or sink is not None,
        call.groups > 1,
        (call.device.type, call.dtype, call.m == 1, *(s == 1 for x in sized for s in x.shape)),
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
    pattern = (plan.offset, plan.tables, plan.blocks, plan.transposed)
    inputs = (q, k, v, pattern, (call.key_mask, call.q_segments))
    if call.device.type == "cpu":
        return _on_cpu(kernel, *inputs), None
    result = kernel(*inputs)
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
