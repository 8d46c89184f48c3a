"""The linear engine on a CPU, in C++: forward and backward, float32 and bfloat16.

It serves mechanisms that say what their feature maps are (`fused_maps`), which kernels evaluate on
the way, a chunk at a time. The kernels stand in `engines/native/source`; a call reaches them as one
packed block of numbers and a table of its runs. Here: what they serve, in which digits, and rows
whose sums no float32 holds.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import all_finite
from ...runs import Run, cut, trim_future
from ..native import library
from ..op import KERNELS
from ..rows import rows_of
from .maps import FusedMap, in_words
from .plan import exactly, finely
from .results import result, whole
from .scaled import out_of_range

MOST_WIDTH = 256  # of a head, for keys and for values
MOST_TOKENS = 2**40  # positions, and sums of them, stay within int64
# `LinearCall` of source/linear_call.h: eight tensors of four numbers, 23 more, and five float64.
_BLOCK = struct.Struct("=55q5d")
_NONE = (0, 0, 0, 0)
_FUNCTIONS = {"identity": 0, "elu_plus_one": 1, "relu": 2, "exp": 3}


def _place(x: Tensor) -> tuple[int, ...]:
    """Where the rows of x [B, H, n, width] lie: its address and the strides before the last."""
    return (x.data_ptr(), *x.stride()[:3])


class _Group(NamedTuple):
    """Runs that are computed in the same digits."""

    runs: list[Run]
    wide: bool


def _groups(call: AttentionCall, runs: list[Run], backward: bool = False) -> list[_Group]:
    """The runs of a call that see any key: by their sizes alone, in float64 or not.

    Where every query sees many keys, the forward kernel takes only products with the state in
    float64.
    """
    exact: list[Run] = []
    fast: list[Run] = []
    for run in runs:
        alone = run.subcall(call)
        if trim_future(alone):
            fine = finely(alone) == torch.float64 and (backward or call.causal)
            wide = call.dtype == torch.float64 or exactly(alone) or fine
            (exact if wide else fast).append(run)
    return [_Group(some, some is exact) for some in (exact, fast) if some]


def _finite(run: Run, k: Tensor, v: Tensor, call: AttentionCall) -> bool:
    """Whether the keys and values that a run's queries see are finite."""
    reach = trim_future(run.subcall(call))
    seen = [x[run.batch, :, run.keys][:, :, :reach] for x in (k, v)]
    if run.holes is not None:
        seen = [x.masked_fill(~run.holes[:, None, :reach, None], 0.0) for x in seen]
    return all_finite(*seen)


class _Launcher:
    """The launches over one group of runs."""

    def __init__(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, group: _Group
    ) -> None:
        self.mechanism, self.call, self.group = mechanism, call, group
        self.number = torch.float64 if group.wide else torch.float32
        self.q, self.k, self.v = (self.held(x) for x in (q, k, v))
        maps = in_words(mechanism, call.to_dtype(self.number))
        assert maps is not None
        self.maps: tuple[FusedMap, FusedMap] = maps
        self.projection = None
        if maps[0].projection is not None:
            self.projection = maps[0].projection.to(self.number).contiguous()
        gamma = mechanism.decay(call)
        self.gamma = None if gamma is None else gamma.detach().to("cpu", torch.float64).contiguous()
        self.mask = None
        if any(run.holes is not None for run in group.runs):
            assert call.key_mask is not None
            self.mask = rows_of(call.key_mask)
        rows = []
        for run in group.runs:
            batches, reach = run.batch.stop - run.batch.start, trim_future(run.subcall(call))
            rows += [run.batch.start, batches, run.queries.start, run.n, run.keys.start, reach]
            rows += [run.offset, run.holes is not None]
        self.table = torch.tensor(rows, dtype=torch.int64)

    def held(self, x: Tensor) -> Tensor:
        """x as kernels read it: widened where they compute in float64."""
        return rows_of(x.to(self.number) if self.group.wide else x)

    def written(self, *results: Tensor) -> Any:
        """Where to write results: themselves, or what `take` has to round."""
        if self.number == results[0].dtype or not self.group.wide:
            return results
        return tuple(torch.zeros_like(x, dtype=self.number) for x in results)

    def take(self, written: tuple[Tensor, ...], *results: Tensor) -> None:
        """Round what was written into results, in the rows of these runs."""
        for k, (made, x) in enumerate(zip(written, results, strict=True)):
            if made is x:
                continue
            for run in self.group.runs:
                rows = run.keys if k and len(results) > 1 else run.queries
                x[run.batch, :, rows] = made[run.batch, :, rows].to(x.dtype)

    def launch(
        self,
        kernel: str,
        tensors: tuple[Tensor | None, ...],
        length: Tensor | None,
        mean: Tensor | None = None,
    ) -> None:
        """Run a kernel; `tensors` are out, grad, dq, dk, dv, as far as it reads or writes them."""
        call, (own, other) = self.call, self.maps
        places = [_place(x) for x in (self.q, self.k, self.v)]
        places += [_NONE if x is None else _place(x) for x in tensors]
        features = self.q.shape[-1] if self.projection is None else self.projection.shape[0]
        half = self.q.dtype == torch.bfloat16
        block = _BLOCK.pack(
            *(number for place in places for number in place),
            *(0 if x is None else x.data_ptr() for x in (length, mean)),
            *(self.table.data_ptr(), len(self.group.runs)),
            *((0, 0) if self.mask is None else (self.mask.data_ptr(), self.mask.stride(0))),
            *(0 if x is None else x.data_ptr() for x in (self.projection, self.gamma)),
            *(call.q_heads, call.kv_heads, call.n, call.head_dim, call.value_dim, features),
            *(_FUNCTIONS[own.function], own.turn is not None),
            *(own.lowered == "most", other.lowered == "most"),
            *(self.mechanism.normalize, call.causal),
            *(half, self.group.wide, torch.get_num_threads()),
            *(own.scale, other.scale, own.turn or 0.0, own.drop, other.drop),
        )
        library.call(f"{kernel}_{'double' if self.group.wide else 'float'}", block)

    def lost(self, length: Tensor) -> Tensor | None:
        """Which rows have sums that their numbers do not hold, of length `[B, Hq, N]`; None for
        none. Asked only of maps that may underflow."""
        if not hasattr(self.mechanism, "scaled_map"):
            return None
        features = self.q.shape[-1] if self.projection is None else self.projection.shape[0]
        # A sum in float64 may lie beyond what float32 holds, and is none the worse for it.
        lost = out_of_range(length.to(self.number), features)
        return lost if bool(lost.any()) else None


class NativeKernel:
    """See the module docstring; registered as `linear:native`."""

    def missing(self) -> list[str]:
        return library.missing()

    def supports(self, mechanism: Any, call: AttentionCall) -> list[str]:
        reasons = []
        if call.device.type != "cpu":
            reasons.append(f"its kernels run on the CPU, and this call is on {call.device.type}")
        if call.dtype not in (torch.float32, torch.bfloat16):
            reasons.append(f"{str(call.dtype)[6:]} is computed by torch")
        if not call.causal and mechanism.decay(call) is not None:
            reasons.append("a decay is served for causal calls only: pass causal=True")
        if max(call.head_dim, call.value_dim) > MOST_WIDTH:
            widths = f"{call.head_dim} and {call.value_dim}"
            reasons.append(f"heads may be {MOST_WIDTH} wide, and these are {widths}")
        if not reasons and in_words(mechanism, call) is None:
            reasons.append("it evaluates feature maps that fused_maps() says in words")
        if max(call.n, call.m) >= MOST_TOKENS:
            reasons.append(f"it takes fewer than {MOST_TOKENS} queries and keys")
        return reasons or self.missing()

    @torch.no_grad()
    def forward(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, None]:
        runs = cut(call)
        out = result((*q.shape[:3], call.value_dim), q, whole(runs, call)[0])
        if out.numel() == 0:
            return out, None
        again = None
        for group in _groups(call, runs):
            on = _Launcher(mechanism, q, k, v, call, group)
            length = None
            if hasattr(mechanism, "scaled_map"):
                length = torch.ones(q.shape[:3], dtype=torch.float64)
            written = on.written(out)
            on.launch("sparseattn_linear_forward", (*written, None, None, None, None), length)
            on.take(written, out)
            lost = None if length is None else on.lost(length)
            if lost is not None:
                if again is None:
                    again, _ = KERNELS["linear:torch"].forward(mechanism, q, k, v, call)
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
        dq, dk, dv = (
            result(q.shape, q, queries),
            result(k.shape, k, keys),
            result(v.shape, v, keys),
        )
        # A NaN among the keys would reach the rows before it, in its chunk; torch keeps it apart.
        lost = call.causal and not all(_finite(run, k, v, call) for run in runs)
        for group in [] if lost else _groups(call, runs, backward=True):
            on = _Launcher(mechanism, q, k, v, call, group)
            length, mean = (torch.ones(q.shape[:3], dtype=torch.float64) for _ in range(2))
            written, given_grad = on.written(dq, dk, dv), on.held(grad_out)
            on.launch("sparseattn_linear_backward", (None, given_grad, *written), length, mean)
            on.take(written, dq, dk, dv)
            lost = lost or on.lost(length) is not None
        if lost:
            dq, dk, dv, _ = KERNELS["linear:torch"].backward(
                mechanism, grad_out, grad_lse, q, k, v, out, lse, call
            )
        return dq, dk, dv, None


KERNELS["linear:native"] = NativeKernel()
