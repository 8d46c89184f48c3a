"""The linear engine on a GPU: every mechanism, forward and backward, in Triton kernels.

Kernels and their tables stand in `triton/`, which is imported with the first call that they serve.

- `triton_launcher.py`: how kernels are launched over some runs; `triton_carried.py`: those that
  carry a state in registers, which serve half precision where registers hold it;
- `triton_pieces.py`: a call cut into pieces that are launched one after another: one, where the
  mechanism declares its feature maps (`fused_maps`) and kernels evaluate them;
- `triton_step.py`: one token of a decode;
- here: what is served, and rows whose sums no float32 holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import wide
from ...runs import cut
from ..op import KERNELS
from ..rows import rows_of
from ..triton_launch import MOST_TOKENS, MOST_WIDTH, missing, reasons_against
from .results import result, whole
from .scaled import out_of_range
from .sweeps import count_features
from .triton_pieces import pieces


class TritonKernel:
    """See the module docstring; registered as `linear:triton`."""

    def missing(self) -> list[str]:
        return missing()

    def supports(self, mechanism: Any, call: AttentionCall) -> list[str]:
        reasons = reasons_against(call.device)
        if reasons:
            return reasons
        if call.dtype == torch.float64:
            reasons.append("float64 is computed by torch")
        if not call.causal and mechanism.decay(call) is not None:
            reasons.append("a decay is served for causal calls only: pass causal=True")
        if max(call.head_dim, call.value_dim) > MOST_WIDTH:
            widths = f"{call.head_dim} and {call.value_dim}"
            reasons.append(f"heads may be {MOST_WIDTH} wide, and these are {widths}")
        if max(call.n, call.m) >= MOST_TOKENS:
            reasons.append(f"it takes fewer than {MOST_TOKENS} queries and keys")
        return reasons

    @torch.no_grad()
    def forward(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, None]:
        runs = cut(call)
        queries, _ = whole(runs, call)
        out = result((*q.shape[:3], call.value_dim), q, queries)
        length = _lengths(q, mechanism, queries)
        if out.numel():
            for piece in pieces(mechanism, q, k, v, call, runs):
                piece.forward(out, length)
        if _lost(mechanism, length, k, call):
            again, _ = KERNELS["linear:torch"].forward(mechanism, q, k, v, call)
            lost = out_of_range(length, count_features(mechanism, k, call))
            out = torch.where(lost[..., None], again, out)
        return out, None

    @torch.no_grad()
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
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        runs = cut(call) if out.numel() else []
        queries, keys = whole(runs, call)
        keys = keys and runs[0].holes is None  # a hole is written by no kernel
        dq, dk, dv = (
            result(q.shape, q, queries),
            result(k.shape, k, keys),
            result(v.shape, v, keys),
        )
        if not runs:
            return dq, dk, dv, None
        grad = rows_of(grad_out)
        length = _lengths(q, mechanism, queries)
        mean = torch.zeros_like(length)
        for piece in pieces(mechanism, q, k, v, call, runs, backward=True):
            piece.grad_queries(grad, length, mean, dq)
        if _lost(mechanism, length, k, call):
            dq, dk, dv, _ = KERNELS["linear:torch"].backward(
                mechanism, grad_out, grad_lse, q, k, v, out, lse, call
            )
            return dq, dk, dv, None
        for piece in pieces(mechanism, q, k, v, call, runs, backward=True, reverse=True):
            piece.grad_keys(grad, length, mean, dk, dv)
        return dq, dk, dv, None


def _lengths(q: Tensor, mechanism: Any, whole: bool) -> Tensor:
    """Where row sums are written, `[B, Hq, N]`: 1 where none is."""
    make = torch.empty if whole and mechanism.normalize else torch.ones
    return make(q.shape[:3], dtype=wide(q.dtype), device=q.device)


def _lost(mechanism: Any, length: Tensor, k: Tensor, call: AttentionCall) -> bool:
    """Whether some row sum is out of the range of its dtype.

    Those rows are evaluated by torch, each key in a scale of its own. Asked only of maps that may
    underflow; the host waits for the answer.
    """
    if not hasattr(mechanism, "scaled_map") or not k.numel():
        return False
    return bool(out_of_range(length, count_features(mechanism, k, call)).any())


KERNELS["linear:triton"] = TritonKernel()
