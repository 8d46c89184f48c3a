"""flash-linear-attention's chunked kernels: `impl="fla"` of `linear` and `retention`.

The library is imported with the first call that it serves.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

import sparseattn as sa

_DTYPES = (torch.float16, torch.bfloat16)


def _masked(x: Tensor, call: sa.AttentionCall) -> Tensor:
    """Keys or values with 0 for those that are hidden, which then weigh nothing."""
    return x if call.key_mask is None else x.masked_fill(~call.key_mask[:, None, :, None], 0)


class _Chunked(sa.Implementation):
    """What holds for both kernels."""

    name = "fla"
    on_request = True
    compiles = True

    def missing(self) -> list[str]:
        if importlib.util.find_spec("fla") is None:
            return ["flash-linear-attention is not installed: pip install flash-linear-attention"]
        return []

    def supports(self, mechanism: sa.Mechanism, call: sa.AttentionCall) -> list[str]:
        reasons = self.missing()
        if call.device.type != "cuda":
            reasons.append(f"fla's kernels need a GPU, and the tensors are on {call.device.type}")
        if call.dtype not in _DTYPES:
            reasons.append(
                f"fla's chunked kernels take float16 and bfloat16, and round the products of "
                f"float32 to TF32: not {call.dtype}"
            )
        if not call.causal:
            reasons.append("fla's chunked kernels are causal: pass causal=True")
        if isinstance(call.offset, Tensor) or call.n != call.m or call.offset != 0:
            reasons.append("fla's chunked kernels take as many keys as queries, and no q_offset")
        if call.q_heads != call.kv_heads:
            reasons.append(
                f"fla's chunked kernels take as many heads of keys as of queries, not "
                f"{call.kv_heads} for {call.q_heads}"
            )
        if call.q_segments is not None:
            reasons.append("it takes no segments")
        sizes = (call.batch, call.q_heads, call.n, call.head_dim, call.value_dim)
        if not all(sizes):
            reasons.append("fla takes no empty tensor")
        return reasons


class ChunkedLinear(_Chunked):
    """`fla.ops.linear_attn.chunk_linear_attn`, with features and normaliser made by torch."""

    def run(
        self,
        mechanism: sa.Mechanism,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: sa.AttentionCall,
    ) -> tuple[Tensor, None]:
        from fla.ops.linear_attn import chunk_linear_attn

        assert isinstance(mechanism, sa.KernelizedLinear)
        positions = torch.arange(call.n, device=q.device)[None, None]
        keys = _masked(mechanism.feature_map(k.float(), positions, call), call)
        queries = mechanism.query_map(q.float(), positions, call)
        # fla's own normaliser sums in the keys' dtype, and adds 1e-10 to what it divides by.
        total = (queries * keys.cumsum(2)).sum(-1, keepdim=True)
        out, _ = chunk_linear_attn(
            *(x.to(q.dtype).transpose(1, 2) for x in (queries, keys, _masked(v, call))),
            scale=1.0,
            normalize=False,
        )
        out = out.transpose(1, 2).float() / total.masked_fill(total == 0, 1.0)
        return out.to(q.dtype), None


class ChunkedRetention(_Chunked):
    """`fla.ops.retention.chunk_retention`: the same decay a head, `1 - 2 ** (-5 - h)`."""

    def run(
        self,
        mechanism: sa.Mechanism,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: sa.AttentionCall,
    ) -> tuple[Tensor, None]:
        from fla.ops.retention import chunk_retention

        inputs: Any = (x.transpose(1, 2) for x in (q, _masked(k, call), _masked(v, call)))
        out, _ = chunk_retention(*inputs, scale=call.scale)
        return out.transpose(1, 2).to(q.dtype), None


class Plugin:
    """The entry point's object."""

    sparseattn_api = 1

    @sa.hookimpl
    def register_implementations(self, register):  # type: ignore[no-untyped-def]
        register("linear", ChunkedLinear())
        register("retention", ChunkedRetention())
