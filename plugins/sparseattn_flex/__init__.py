"""torch's FlexAttention as an implementation: `impl="flex"` of every static pattern.

A pattern goes to it as lists of blocks, lowered from the pattern's clauses, and as a `mask_mod`
that evaluates the same clauses within partial blocks. Nothing of size N x M is made. FlexAttention
is always compiled: eagerly it would form all scores. It is imported with the first call that it
serves.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

import torch
from torch import Tensor

import sparseattn as sa

from . import plan
from .clauses import depends_on_distance_only, reasons_against

_LEAST_WIDTH_ON_CUDA = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MECHANISMS = (
    *("full", "windowed", "dilated", "chunked", "longformer", "strided"),
    *("bigbird", "block_sparse"),
)


@functools.cache
def _missing(device: str, compiler: str) -> list[str]:
    """What the machine lacks to compile for a device."""
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            return ["it is compiled with triton, which is not installed: pip install triton"]
        return []
    if device != "cpu":
        return [f"it is served on cpu and cuda, not on {device}"]
    reasons = []
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        reasons.append("on the CPU FlexAttention needs AVX2")
    if shutil.which(compiler) is None:
        reasons.append(
            f"on the CPU it is compiled with {compiler}, which is not on PATH: install a C++ "
            "compiler, or name one in CXX"
        )
    return reasons


def _reasons_of_device(call: sa.AttentionCall) -> list[str]:
    reasons = list(_missing(call.device.type, os.environ.get("CXX", "g++")))
    if call.device.type == "cpu":
        if call.needs_grad:
            reasons.append("FlexAttention has no backward on the CPU")
        if call.needs_lse:
            reasons.append("FlexAttention returns no lse on the CPU")
        if call.sink_logits is not None:
            reasons.append("sink_logits need the lse, which FlexAttention lacks on the CPU")
    elif min(call.head_dim, call.value_dim) < _LEAST_WIDTH_ON_CUDA:
        reasons.append(
            f"FlexAttention takes heads of at least {_LEAST_WIDTH_ON_CUDA} on a GPU, and these are "
            f"{call.head_dim} and {call.value_dim} wide"
        )
    return reasons


def _reasons_of_masks(mechanism: sa.MaskedSoftmax, call: sa.AttentionCall) -> list[str]:
    masked = {"key_mask": call.key_mask, "segments": call.q_segments}
    given = " and ".join(word for word, x in masked.items() if x is not None)
    if not given:
        return []
    layout = plan.layout_of(mechanism, call)
    if not depends_on_distance_only(layout):
        return [f"{given} would move the positions from which its pattern counts"]
    if call.q_segments is None:
        return []
    if call.q_segments is not call.kv_segments:
        return ["documents with other lengths of queries than of keys are not placed by it"]
    near = torch.zeros((), dtype=torch.int64)
    if not layout.contains(near, near):
        return ["segments: its pattern leaves out the query's own key"]
    return []


class Flex(sa.Implementation):
    """`torch.nn.attention.flex_attention` over the blocks of a static pattern."""

    name = "flex"
    on_request = True
    compiles = True

    def missing(self) -> list[str]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return list(_missing(device, os.environ.get("CXX", "g++")))

    def supports(self, mechanism: sa.Mechanism, call: sa.AttentionCall) -> list[str]:
        if torch.compiler.is_compiling():
            return ["it compiles FlexAttention itself, so it takes no call that is being compiled"]
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return ["it compiles FlexAttention, which does not run under torch.func (vmap, grad)"]
        if not isinstance(mechanism, sa.MaskedSoftmax):
            return ["FlexAttention is a softmax, and this mechanism is not"]
        if mechanism.is_dynamic:
            return ["it takes static patterns, and this one depends on q and k"]
        reasons = _reasons_of_device(call)
        if call.dtype not in _DTYPES:
            reasons.append(f"FlexAttention takes float32, bfloat16 and float16, not {call.dtype}")
        if call.bias is not None:
            reasons.append("a bias is N x M by nature; it takes none")
        if isinstance(call.q_offset, Tensor):
            return [*reasons, "one list of blocks serves the batch, so q_offset must be an int"]
        sizes = (call.batch, call.q_heads, call.n, call.m, call.head_dim, call.value_dim)
        if not all(sizes):
            return [*reasons, "FlexAttention takes no empty tensor"]
        against = reasons_against(plan.layout_of(mechanism, call))
        return reasons + (against or _reasons_of_masks(mechanism, call))

    def run(
        self,
        mechanism: sa.Mechanism,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: sa.AttentionCall,
    ) -> tuple[Tensor, Tensor | None]:
        from .compiled import attend

        return attend(plan.make(mechanism, call), q, k, v, call)


class Plugin:
    """The entry point's object."""

    sparseattn_api = 1

    @sa.hookimpl
    def register_implementations(self, register):  # type: ignore[no-untyped-def]
        for name in MECHANISMS:
            register(name, Flex())
