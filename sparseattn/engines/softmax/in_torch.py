"""The softmax engine in torch alone: any device, no compiler.

A call is cut into runs, and each run takes the first path that can serve it:

1. `pieces`: bands (exact attention, windows), and unions that come apart into bands, on torch's
   fused CPU kernel;
2. `blocks`: any other static layout, on the same kernel;
3. `choices`: selections, pair by pair or in tiles;
4. `slabs`: everything else, in plain torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import all_finite, wide
from ...layout import BlockCSR, Grid
from ...runs import Run, cut
from ..held import Held
from ..op import KERNELS
from . import blocks, choices, pieces, slabs, unions
from .bands import Piece

_CSR_CACHE_BYTES = 64 * 2**20


_csr_held: Held[BlockCSR] = Held(_CSR_CACHE_BYTES)


def _lowered(mechanism: Any, call: AttentionCall) -> BlockCSR:
    grid = (call.n, call.m, call.causal, int(call.offset))
    return _csr_held.get(
        (mechanism, *grid),
        lambda: mechanism.clauses(Grid(*grid)).lower(blocks.BLOCK, blocks.BLOCK),
    )


@lru_cache(maxsize=512)
def _pieces(mechanism: Any, n: int, m: int, causal: bool, offset: int) -> tuple[Piece, ...] | None:
    return unions.plan(mechanism.clauses(Grid(n, m, causal, offset)))


def _path(mechanism: Any, call: AttentionCall) -> tuple[str, Any]:
    """Which of the four paths serves a run, and what it runs on."""
    if mechanism.is_dynamic and choices.serves(call):
        return "choices", None
    fused = (
        call.device.type == "cpu"
        and call.softcap is None
        and call.bias is None
        and call.key_mask is None
        and not mechanism.is_dynamic
    )
    if not fused:
        return "slabs", slabs.lower(mechanism, call)
    plan = _pieces(mechanism, call.n, call.m, call.causal, int(call.offset))
    if plan is not None:
        return "pieces", plan
    return "blocks", _lowered(mechanism, call)


def _inert(csr: BlockCSR, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero invisible NaN and inf before any product; finite numbers need no such care."""
    if all_finite(q, k, v):
        return q, k, v
    queries, keys = blocks.seen(csr)
    hidden = ~keys[:, None]
    return (
        q.masked_fill(~queries[:, None], 0.0),
        k.masked_fill(hidden, 0.0),
        v.masked_fill(hidden, 0.0),
    )


def _grouped(x: Tensor, call: AttentionCall) -> Tensor:
    """`[b, Hq, n, ...]` as `[b * Hkv, G, n, ...]`."""
    return x.reshape(call.batch * call.kv_heads, call.groups, *x.shape[2:])


class TorchKernel:
    """See the module docstring; registered as `softmax:torch`."""

    def missing(self) -> list[str]:
        return []

    def supports(self, mechanism: Any, call: AttentionCall) -> list[str]:
        return []

    def forward(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor]:
        shape = (call.batch, call.q_heads, call.n)
        runs = cut(call) if call.q_heads and call.value_dim else []
        if call.value_dim == 0 and call.q_heads:
            # Nothing to weigh, but lse is still defined: lend the values a column of zeros.
            padded = v.new_zeros(*v.shape[:3], 1)
            out, lse = self.forward(mechanism, q, k, padded, call.replace(value_dim=1))
            return out[..., :0], lse
        if len(runs) == 1 and runs[0].n == call.n and runs[0].batch == slice(0, call.batch):
            return self._run_forward(
                mechanism, q, k[:, :, runs[0].keys], v[:, :, runs[0].keys], runs[0].subcall(call)
            )
        out = q.new_zeros(*shape, call.value_dim)
        lse = q.new_full(shape, -torch.inf, dtype=wide(q.dtype))
        for run in runs:
            rows, keys = (run.batch, slice(None), run.queries), (run.batch, slice(None), run.keys)
            o, s = self._run_forward(mechanism, q[rows], k[keys], v[keys], run.subcall(call))
            out[rows], lse[rows] = o, s
        return out, lse

    def _run_forward(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor]:
        path, plan = _path(mechanism, call)
        shape = (call.batch, call.q_heads, call.n)
        if path in ("choices", "slabs"):
            q5 = q.unflatten(1, (call.kv_heads, call.groups))
            if path == "choices":
                out, lse = choices.forward(mechanism, q5, k, v, call)
            else:
                out, lse = slabs.forward(mechanism, plan, q5, k, v, call)
            return out.reshape(*shape, call.value_dim), lse.reshape(shape)
        if path == "blocks":
            q, k, v = _inert(plan, q, k, v)
        run = pieces.forward if path == "pieces" else blocks.forward
        out, lse = run(plan, _grouped(q, call), k.flatten(0, 1), v.flatten(0, 1), call.scale)
        return out.reshape(*shape, call.value_dim), lse.reshape(shape)

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
        if call.value_dim == 0:
            grad_out, v, out = (x.new_zeros(*x.shape[:3], 1) for x in (grad_out, v, out))
            grads = self.backward(
                mechanism, grad_out, grad_lse, q, k, v, out, lse, call.replace(value_dim=1)
            )
            return grads[0], grads[1], grads[2][..., :0], grads[3]
        acc = wide(q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (q, k, v))
        dbias = None
        if call.bias is not None:
            dbias = torch.zeros(call.bias.shape, dtype=acc, device=q.device)
        for run in cut(call) if call.q_heads else []:
            rows, keys = (run.batch, slice(None), run.queries), (run.batch, slice(None), run.keys)
            parts = self._run_backward(
                mechanism,
                grad_out[rows],
                None if grad_lse is None else grad_lse[rows],
                q[rows],
                k[keys],
                v[keys],
                out[rows],
                lse[rows],
                run,
                call,
                dbias,
            )
            for total, index, grad in (
                (dq, rows, parts[0]),
                (dk, keys, parts[1]),
                (dv, keys, parts[2]),
            ):
                total[index] = grad.reshape(total[index].shape)
        return dq, dk, dv, dbias

    def _run_backward(
        self,
        mechanism: Any,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        run: Run,
        whole: AttentionCall,
        dbias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = run.subcall(whole)
        empty = lse == -torch.inf
        if bool(empty.any()):
            # A row that sees nothing passes nothing on, whatever its own gradient is.
            grad_out = grad_out.masked_fill(empty[..., None], 0.0)
            grad_lse = None if grad_lse is None else grad_lse.masked_fill(empty, 0.0)
        path, plan = _path(mechanism, call)
        if path in ("choices", "slabs"):
            group = (call.kv_heads, call.groups)
            g, s, q5, o, t = (
                None if x is None else x.unflatten(1, group)
                for x in (grad_out, grad_lse, q, out, lse)
            )
            if path == "choices":
                return choices.backward(mechanism, g, s, q5, k, v, o, t, call)  # type: ignore[arg-type]
            if dbias is not None:
                index = slice(None) if dbias.shape[0] == 1 else run.batch
                rows = slice(None) if dbias.shape[2] == 1 else run.queries
                dbias = dbias[index][:, :, rows][..., run.keys]
            return slabs.backward(mechanism, plan, g, s, q5, k, v, o, t, call, dbias)  # type: ignore[arg-type]
        if path == "blocks":
            q, k, v = _inert(plan, q, k, v)
        g, s, qg, o, t = (
            None if x is None else _grouped(x, call) for x in (grad_out, grad_lse, q, out, lse)
        )
        serve = pieces.backward if path == "pieces" else blocks.backward
        return serve(plan, g, s, qg, k.flatten(0, 1), v.flatten(0, 1), o, t, call.scale)  # type: ignore[arg-type]


KERNELS["softmax:torch"] = TorchKernel()
