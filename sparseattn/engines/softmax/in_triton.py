"""The softmax engine on a GPU: every pattern, forward and backward, in Triton kernels.

Kernels and their tables stand in `triton/`, which is imported with the first call that they serve.
Here: what they serve, and how a call becomes launches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import wide
from ...runs import cut
from ..op import KERNELS
from ..rows import rows_of
from ..triton_launch import (
    MOST_TOKENS,
    MOST_WIDTH,
    halves,
    launch,
    missing,
    reasons_against,
    target,
)
from . import few_in_triton, plan, selected_in_triton, specialised_backward, specialised_in_triton
from .launches import constants, numbers

if TYPE_CHECKING:
    from .triton.config import Tiles


def _pack(call: AttentionCall) -> int:
    """Query heads of a group that are rows of one tile: all of them, where tiles divide evenly."""
    return call.groups if call.groups in (1, 2, 4, 8, 16) else 1


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
        self.holes = any(run.holes is not None for run in self.runs)
        self.key_mask = self.q if call.key_mask is None else call.key_mask.view(torch.uint8)
        if not self.holes:
            self.key_mask = self.q  # a pointer to something
        elif q.dtype == torch.float64:
            # Triton 3.6 makes no products of float64 beside loads of bytes.
            self.key_mask = self.key_mask.to(torch.int32)
        elif self.key_mask.stride(-1) != 1:
            self.key_mask = self.key_mask.contiguous()
        self.target = target(q.device)
        self.pack = _pack(call)

    def whole(self, queries: bool = True) -> bool:
        """Whether one run has every query of the call, or every key."""
        if len(self.runs) != 1 or self.runs[0].batch != slice(0, self.call.batch):
            return False
        run = self.runs[0]
        return run.n == self.call.n if queries else run.m == self.call.m

    def numbers(self) -> tuple[float, ...]:
        return numbers(self.call)

    def constants(self, tiles: Tiles, band: bool) -> dict[str, Any]:
        shared = constants(self.target, self.q.dtype, self.call)
        widths = (self.call.head_dim, self.call.value_dim)
        return {
            **shared,
            "BAND": band,
            "HOLES": self.holes,
            "PACK": self.pack,
            "ROWS": tiles.rows,
            "KEYS": tiles.keys,
            "EVEN": (shared["D"], shared["DV"]) == widths,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    def tiles(self, kernel: str) -> Tiles:
        from .triton import config

        width = max(self.call.head_dim, self.call.value_dim)
        causal = self.call.causal
        narrow = any(plan.narrow(self.mechanism, run, causal, config.NARROW) for run in self.runs)
        return config.tiles(self.target, self.q.dtype, width, kernel, narrow)

    def plan(self, tiles: Tiles, transposed: bool = False) -> Any:
        queries = tiles.rows if transposed else tiles.rows // self.pack
        return plan.make(self.mechanism, self.call, self.runs, queries, tiles.keys, transposed)

    def forward(self) -> tuple[Tensor, Tensor]:
        if self.mechanism.is_dynamic:
            return selected_in_triton.forward(self)
        from .triton.forward import forward

        call, q, k, v = self.call, self.q, self.k, self.v
        shape = (call.batch, call.q_heads, call.n)
        out = torch.empty((*shape, call.value_dim), dtype=q.dtype, device=q.device)
        lse = torch.empty(shape, dtype=wide(q.dtype), device=q.device)
        if not self.whole():  # queries in no run are empty rows
            out.zero_()
            lse.fill_(-torch.inf)
        if not self.runs:
            return out, lse
        if self.whole() and few_in_triton.serves(call):
            return self.few()
        special = specialised_in_triton.tiles(self)
        if special is not None:
            specialised_in_triton.forward(self, special, out, lse)
            return out, lse
        tiles = self.tiles("forward")
        made = self.plan(tiles)
        launch(
            forward,
            (len(made.tiles), call.q_heads // self.pack, self.batch),
            *(q, k, v, out, lse, *made[:5], self.key_mask),
            *(stride for x in (q, k, v, out) for stride in x.stride()[:3]),
            *(*lse.stride()[:2], self.key_mask.stride(0)),
            *(*self.numbers(), call.head_dim, call.value_dim, call.groups),
            **self.constants(tiles, made.band),
        )
        return out, lse

    def few(self) -> tuple[Tensor, Tensor]:
        """Few queries over many keys: cut along the keys, without a table."""
        run = self.runs[0]
        keys = (slice(None), slice(None), run.keys)
        call = run.subcall(self.call)
        inputs = (self.q, self.k[keys], self.v[keys])
        ends = plan.band_ends(self.mechanism, run, call.causal)
        if ends is not None and not self.holes:
            return few_in_triton.attend(*inputs, call, ends)
        return few_in_triton.attend_masked(*inputs, self.mechanism.mask(call), call)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, out, lse = rows_of(grad_out), rows_of(out), lse.contiguous()
        if self.mechanism.is_dynamic:
            return selected_in_triton.backward(self, grad, grad_lse, out, lse)
        from .triton.backward import grad_keys, grad_queries

        call, q, k, v = self.call, self.q, self.k, self.v
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for x in (dq, dk, dv):
            if not self.whole(queries=x is dq):  # what is in no run has no gradient
                x.zero_()
        if not self.runs:
            return dq, dk, dv
        delta = torch.empty_like(lse)
        with_lse = grad_lse is not None
        grad_lse = lse if grad_lse is None else grad_lse.contiguous()
        special = specialised_backward.cuts(self, grad)
        scales = (*self.numbers(), *halves(call.scale))
        sizes = (call.head_dim, call.value_dim, call.groups)
        steps = (*lse.stride()[:2], self.key_mask.stride(0))
        if special is not None and special.queries is not None:
            specialised_backward.make_deltas(grad, out, grad_lse if with_lse else None, delta)
            specialised_backward.grad_queries(self, special.queries, grad, lse, delta, dq)
        else:
            tiles = self.tiles("grad_queries")
            made = self.plan(tiles)
            launch(
                grad_queries,
                (len(made.tiles), call.q_heads // self.pack, self.batch),
                *(grad, q, k, v, out, lse, grad_lse, delta, dq, *made[:5], self.key_mask),
                *(stride for x in (grad, q, k, v, out, dq) for stride in x.stride()[:3]),
                *(*steps, *scales, *sizes),
                LSE_GRAD=with_lse,
                **self.constants(tiles, made.band),
            )
        if special is not None and special.keys is not None:
            specialised_backward.grad_keys(self, special.keys, grad, lse, delta, dk, dv)
            return dq, dk, dv
        tiles = self.tiles("grad_keys")
        made = self.plan(tiles, transposed=True)
        constant = self.constants(tiles, made.band)
        del constant["PACK"]  # its tiles have rows of one head
        launch(
            grad_keys,
            (len(made.tiles), call.kv_heads, self.batch),
            *(grad, q, k, v, lse, delta, dk, dv, *made[:5], self.key_mask),
            *(stride for x in (grad, q, k, v, dk, dv) for stride in x.stride()[:3]),
            *(*steps, *scales, *sizes),
            **constant,
        )
        return dq, dk, dv


class TritonKernel:
    """See the module docstring; registered as `softmax:triton`."""

    def missing(self) -> list[str]:
        return missing()

    def supports(self, mechanism: Any, call: AttentionCall) -> list[str]:
        reasons = reasons_against(call.device)
        if reasons:
            return reasons
        if call.dtype == torch.float64:
            reasons.append("float64 is computed by torch")
        if call.bias is not None:
            reasons.append("a bias is N x M by nature, and computed by torch")
        if max(call.head_dim, call.value_dim) > MOST_WIDTH:
            widths = f"{call.head_dim} and {call.value_dim}"
            reasons.append(f"heads may be {MOST_WIDTH} wide, and these are {widths}")
        if max(call.n, call.m) >= MOST_TOKENS:
            reasons.append(f"it takes fewer than {MOST_TOKENS} queries and keys")
        return reasons

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
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        if call.value_dim == 0:
            grad_out, v, out = (x.new_zeros(*x.shape[:3], 1) for x in (grad_out, v, out))
            call = call.replace(value_dim=1)
            dq, dk, dv = _Launcher(mechanism, q, k, v, call).backward(grad_out, grad_lse, out, lse)
            return dq, dk, dv[..., :0], None
        launcher = _Launcher(mechanism, q, k, v, call)
        return *launcher.backward(grad_out, grad_lse, out, lse), None


KERNELS["softmax:triton"] = TritonKernel()
