"""The linear engine in torch alone: any device, no compiler.

`out_i = sum_j W_ij v_j` with `W_ij = gamma ** (i - j) phi(q_i) . phi(k_j)` over the keys that query
i sees, divided by the sum of row i of W unless the mechanism says otherwise.

- `plan.py`: in which steps a run is swept;
- `sweeps.py`: the sweeps themselves, forward and backward, and `state.py` what they carry along;
- `scaled.py`: sweeps over features that underflow;
- `direct.py`: pairs weighed one by one, while that costs less;
- here: a call cut into runs, and what a run may not see taken out of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import widest
from ...runs import Run, cut, trim_future
from ..op import KERNELS
from .direct import Direct, is_cheaper
from .plan import exactly, state_elements
from .results import result, whole
from .scaled import Guarded
from .state import without_later
from .sweeps import Sweeps, count_features


def _put_back(x: Tensor, later: Tensor | None, call: AttentionCall) -> None:
    """NaN in the rows of x `[b, Hq, n, Dv]` that see what `without_later` took out."""
    if later is None:
        return
    offset = int(call.offset)
    rows = slice(max(0, -offset), None)
    seen = torch.arange(offset, offset + call.n)[rows].clamp(max=later.shape[2] - 1)
    x = x[:, :, rows].unflatten(1, (call.kv_heads, call.groups))
    x.masked_fill_(later[:, :, None, seen], torch.nan)


def _pieces(
    mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, runs: list[Run]
) -> Iterator[tuple[Run, Sweeps | Direct, Tensor | None]]:
    """The runs of a call, few enough rows of the batch at once for their states to stay cached.

    The third is what `_put_back` takes.
    """
    for run in runs:
        features = count_features(mechanism, k[run.batch], run.subcall(call))
        size = call.q_heads * features * (call.value_dim + 1)
        most = max(1, state_elements(q.device) // size)
        for start in range(run.batch.start, run.batch.stop, most):
            batch = slice(start, min(start + most, run.batch.stop))
            own = slice(batch.start - run.batch.start, batch.stop - run.batch.start)
            holes = None if run.holes is None else run.holes[own]
            piece = run._replace(batch=batch, holes=holes)
            q_run, k_run, v_run = (
                q[batch, :, run.queries],
                k[batch, :, run.keys],
                v[batch, :, run.keys],
            )
            if holes is not None:
                hidden = ~holes[:, None, :, None]
                k_run, v_run = k_run.masked_fill(hidden, 0.0), v_run.masked_fill(hidden, 0.0)
            alone = piece.subcall(call)
            reach = trim_future(alone)
            k_run, v_run, later = k_run[:, :, :reach], v_run[:, :, :reach], None
            # Elsewhere than on the CPU the host would wait for the device.
            if alone.causal and q.device.type == "cpu":
                k_run, v_run, later = without_later(k_run, v_run)
            yield piece, _method(mechanism, q_run, k_run, v_run, alone, features), later


def _method(
    mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, features: int
) -> Sweeps | Direct:
    """How a run is evaluated: chosen from static facts, and not from the size of the batch."""
    direct = is_cheaper(mechanism, call, features)
    expanded = hasattr(mechanism, "dot_weight") and not direct  # see `direct.py`
    if exactly(call) or (expanded and call.dtype == torch.float32):
        call = call.to_dtype(widest(q.device))
    if direct:
        return Direct(mechanism, q, k, v, call)
    if hasattr(mechanism, "scaled_map"):
        return Guarded(mechanism, q, k, v, call)
    return Sweeps(mechanism, q, k, v, call)


class TorchKernel:
    """See the module docstring; registered as `linear:torch`."""

    def missing(self) -> list[str]:
        return []

    def supports(self, mechanism: Any, call: AttentionCall) -> list[str]:
        if not call.causal and mechanism.decay(call) is not None:
            return ["a decay is served for causal calls only: pass causal=True"]
        return []

    @torch.no_grad()
    def forward(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, None]:
        runs = cut(call)
        out = result((*q.shape[:3], call.value_dim), q, whole(runs, call)[0])
        if out.numel() == 0:
            return out, None
        for run, sweeps, later in _pieces(mechanism, q, k, v, call, runs):
            own = out[run.batch, :, run.queries]
            sweeps.forward(own)
            _put_back(own, later, sweeps.call)
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
        for run, sweeps, later in _pieces(mechanism, q, k, v, call, runs):
            g, d = (x[run.batch, :, run.queries] for x in (grad_out, dq))
            if later is not None:
                g = g.clone()
                _put_back(g, later, sweeps.call)
            d_k, d_v = (x[run.batch, :, run.keys] for x in (dk, dv))
            sweeps.backward(g, d, d_k, d_v)
        return dq, dk, dv, None


KERNELS["linear:torch"] = TorchKernel()
