"""The softmax engine on a CPU, in C++: every pattern, forward and backward, float32 and bfloat16.

The kernels stand in `engines/native/source`; a call reaches them as one packed block of numbers and
the tables of its plan. Here: what they serve, and how a call becomes such a block.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...runs import Run, cut
from ..native import library
from ..op import FEW_PAIRS, FEW_PAIRS_BACKWARD, KERNELS
from ..rows import rows_of
from . import plan

MOST_WIDTH = 256  # of a head, for keys and for values
MOST_TOKENS = 2**29  # sums of positions stay within int32
ROWS, KEYS = 32, 64  # queries in a tile, keys in a block: ROWS and KEYS of source/call.h
# `Call` of source/call.h: eight tensors of four numbers, 23 more, and two float64.
_BLOCK = struct.Struct("=55q2d")
_NONE = (0, 0, 0, 0)
# Of so few queries a tile would be mostly empty: rows are served one by one.
_FEW_QUERIES = 8


def _place(x: Tensor) -> tuple[int, ...]:
    """Where the rows of x [B, H, n, width] lie: its address and the strides before the last."""
    return (x.data_ptr(), *x.stride()[:3])


def is_exact(call: AttentionCall, backward: bool = False) -> bool:
    """Whether so few pairs are computed that the rounding of single numbers would show: then rows
    are computed in float64, and gradients measure their weights anew. The pairs of one row of the
    batch count, so that its bits are the same in any batch.
    """
    most = FEW_PAIRS_BACKWARD if backward else FEW_PAIRS
    return call.dtype == torch.float32 and call.q_heads * call.n * call.m < most


def pack(
    call: AttentionCall,
    made: plan.Plan,
    batch: int,
    tensors: tuple[Tensor, ...],
    lse: Tensor,
    grad_lse: Tensor | None = None,
    mask: tuple[int, ...] = (0, 0, 0),
) -> bytes:
    """A call as kernels take it; all that it points to must outlive the call.

    Args:
        batch: rows of the batch that share the plan's runs.
        tensors: q, k, v, out and, backward, the gradients of out, q, k and v.
        mask: address and steps, from row to row and from query to query, of allowed keys.
    """
    exact = int(is_exact(call, len(tensors) > 4))
    if exact and call.sink_logits is not None:
        exact = 2  # WITH_SINKS of source/call.h
    places = [_place(x) for x in tensors] + [_NONE] * (8 - len(tensors))
    return _BLOCK.pack(
        *(number for place in places for number in place),
        lse.data_ptr(),
        0 if grad_lse is None else grad_lse.data_ptr(),
        *(x.data_ptr() for x in made[:5]),
        *mask,
        *(len(made.tiles), batch, call.batch, call.q_heads, call.kv_heads, call.n, call.m),
        *(call.head_dim, call.value_dim),
        *(made.band, call.dtype == torch.bfloat16, exact, torch.get_num_threads()),
        *(call.scale, call.softcap or 0.0),
    )


class _Launcher:
    """What the launches of one call share."""

    def __init__(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> None:
        self.mechanism, self.call = mechanism, call
        self.q, self.k, self.v = (rows_of(x) for x in (q, k, v))
        self.runs = cut(call)
        self.batch = 1
        if len(self.runs) == 1:
            self.batch = self.runs[0].batch.stop - self.runs[0].batch.start
        self.key_mask = call.key_mask
        if not any(run.holes is not None for run in self.runs):
            self.key_mask = None
        elif self.key_mask is not None and self.key_mask.stride(-1) != 1:
            self.key_mask = self.key_mask.contiguous()

    def whole(self, queries: bool = True) -> bool:
        """Whether one run has every query of the call, or every key."""
        if len(self.runs) != 1 or self.runs[0].batch != slice(0, self.call.batch):
            return False
        run: Run = self.runs[0]
        return run.n == self.call.n if queries else run.m == self.call.m

    def block(
        self, made: plan.Plan, tensors: tuple[Tensor, ...], lse: Tensor, slope: Tensor | None = None
    ) -> bytes:
        mask = self.key_mask
        place = (0, 0, 0) if mask is None else (mask.data_ptr(), mask.stride(0), 0)
        given = (self.q, self.k, self.v, *tensors)
        return pack(self.call, made, self.batch, given, lse, slope, place)

    def plan(self) -> plan.Plan:
        return plan.make(self.mechanism, self.call, self.runs, ROWS, KEYS)

    def forward(self) -> tuple[Tensor, Tensor]:
        call, q = self.call, self.q
        shape = (call.batch, call.q_heads, call.n)
        whole = self.whole()  # queries in no run are empty rows
        out = (q.new_empty if whole else q.new_zeros)((*shape, call.value_dim))
        lse = torch.empty(shape, dtype=torch.float64)
        if not whole:
            lse.fill_(-torch.inf)
        if self.runs and call.q_heads:
            made = self.plan()  # its tables must outlive the call
            few = call.n <= _FEW_QUERIES or is_exact(call)
            kernel = "sparseattn_softmax_rows" if few else "sparseattn_softmax_forward"
            library.call(kernel, self.block(made, (out,), lse))
        return out, lse

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = self.call
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (self.q, self.k, self.v))
        if self.runs and call.q_heads:
            made, lse, out = self.plan(), lse.contiguous(), rows_of(out)
            tensors = (out, rows_of(grad_out), dq, dk, dv)
            slope = None if grad_lse is None else grad_lse.float().contiguous()
            library.call("sparseattn_softmax_backward", self.block(made, tensors, lse, slope))
        return dq, dk, dv


class NativeKernel:
    """See the module docstring; registered as `softmax:native`."""

    def missing(self) -> list[str]:
        return library.missing()

    def supports(self, mechanism: Any, call: AttentionCall) -> list[str]:
        reasons = []
        if call.device.type != "cpu":
            reasons.append(f"its kernels run on the CPU, and this call is on {call.device.type}")
        if call.dtype not in (torch.float32, torch.bfloat16):
            reasons.append(f"{str(call.dtype)[6:]} is computed by torch")
        if call.bias is not None:
            reasons.append("a bias is N x M by nature, and computed by torch")
        if max(call.head_dim, call.value_dim) > MOST_WIDTH:
            widths = f"{call.head_dim} and {call.value_dim}"
            reasons.append(f"heads may be {MOST_WIDTH} wide, and these are {widths}")
        if max(call.n, call.m) >= MOST_TOKENS:
            reasons.append(f"it takes fewer than {MOST_TOKENS} queries and keys")
        return reasons or self.missing()

    def forward(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor]:
        if call.value_dim == 0:
            # Nothing to weigh, but lse is still defined: lend the values a column of zeros.
            padded = v.new_zeros(*v.shape[:3], 1)
            out, lse = self.forward(mechanism, q, k, padded, call.replace(value_dim=1))
            return out[..., :0], lse
        return _Launcher(mechanism, q, k, v, call).forward()

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
            call = call.replace(value_dim=1)
            dq, dk, dv = _Launcher(mechanism, q, k, v, call).backward(grad_out, grad_lse, out, lse)
            return dq, dk, dv[..., :0], None
        launcher = _Launcher(mechanism, q, k, v, call)
        return *launcher.backward(grad_out, grad_lse, out, lse), None


KERNELS["softmax:native"] = NativeKernel()
