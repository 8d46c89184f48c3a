"""The flash-attn library as an implementation: `impl="flash_attn"` of `full` and `windowed`.

It serves one band of keys at most: causal, a window, both or neither. It is imported with the first
call that it serves.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

import sparseattn as sa

_DTYPES = (torch.float16, torch.bfloat16)
_MOST_WIDTH = 256


@functools.lru_cache(maxsize=64)
def _band(
    mechanism: sa.MaskedSoftmax, n: int, m: int, causal: bool
) -> tuple[int | None, int | None] | None:
    return mechanism.clauses(sa.Grid(n, m, causal)).as_band()


def _window(mechanism: sa.Mechanism, call: sa.AttentionCall) -> tuple[int, int] | None:
    """`window_size` of a call: keys before and after the query, inclusive, -1 for all of them.

    None where what the mechanism uses is not one band around the query.
    """
    assert isinstance(mechanism, sa.MaskedSoftmax)
    band = _band(mechanism, call.n, call.m, call.causal)
    if band is None or any(end is not None and end < 0 for end in band):
        return None
    left, right = (-1 if end is None else end for end in band)
    return left, right


class FlashAttn(sa.Implementation):
    """`flash_attn.flash_attn_func`, whose masks stand bottom-right as those here do."""

    name = "flash_attn"
    on_request = True

    def missing(self) -> list[str]:
        if importlib.util.find_spec("flash_attn") is None:
            return ["flash-attn is not installed: pip install flash-attn"]
        return []

    def supports(self, mechanism: sa.Mechanism, call: sa.AttentionCall) -> list[str]:
        reasons = self.missing()
        if call.device.type != "cuda":
            reasons.append(f"flash-attn needs a GPU, and the tensors are on {call.device.type}")
        if call.dtype not in _DTYPES:
            reasons.append(f"flash-attn takes float16 and bfloat16, not {call.dtype}")
        if call.head_dim != call.value_dim or call.head_dim > _MOST_WIDTH:
            reasons.append(
                f"flash-attn takes heads of q, k and v that are alike and at most {_MOST_WIDTH} "
                f"wide, and these are {call.head_dim} and {call.value_dim}"
            )
        given = {
            "key_mask": call.key_mask,
            "segments": call.q_segments,
            "sink_logits": call.sink_logits,
            "bias": call.bias,
        }
        reasons += [f"it takes no {word}" for word, x in given.items() if x is not None]
        if call.needs_lse and call.needs_grad:
            reasons.append("flash-attn passes no gradient on through its lse")
        if isinstance(call.offset, Tensor) or call.offset != call.m - call.n:
            return [*reasons, "flash-attn places the queries bottom-right: it takes no q_offset"]
        sizes = (call.batch, call.q_heads, call.n, call.m, call.head_dim, call.value_dim)
        if not all(sizes):
            return [*reasons, "flash-attn takes no empty tensor"]
        if not isinstance(mechanism, sa.MaskedSoftmax) or mechanism.is_dynamic:
            return [*reasons, "flash-attn takes static patterns of softmax"]
        if _window(mechanism, call) is None:
            reasons.append("flash-attn takes one window around the query, without sinks")
        return reasons

    def run(
        self,
        mechanism: sa.Mechanism,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: sa.AttentionCall,
    ) -> tuple[Tensor, Tensor | None]:
        from flash_attn import flash_attn_func

        window = _window(mechanism, call)
        assert window is not None
        first, last = call.m - call.n, call.m - 1  # positions of the first and the last query
        left, right = (call.m + call.n if end < 0 else end for end in window)
        at = torch.arange(call.m, device=q.device)
        seen = (at >= first - left) & (at <= last + right)
        if first - left > 0:
            # Keys before every window: their weights are 0, but 0 * NaN is NaN.
            k, v = (x.masked_fill(~seen[:, None], 0) for x in (k, v))
        result: Any = flash_attn_func(
            *(x.transpose(1, 2) for x in (q, k, v)),
            softmax_scale=call.scale,
            causal=call.causal,
            window_size=window,
            softcap=0.0 if call.softcap is None else call.softcap,
            deterministic=call.needs_grad,
            return_attn_probs=call.needs_lse,
        )
        if not call.needs_lse:
            return result.transpose(1, 2), None
        out, lse, _ = result
        # flash-attn gives +inf to a query that sees no key: one before the first of them.
        i = torch.arange(first, last + 1, device=q.device)
        return out.transpose(1, 2), lse.masked_fill(i + right < 0, -torch.inf)


class Plugin:
    """The entry point's object."""

    sparseattn_api = 1

    @sa.hookimpl
    def register_implementations(self, register):  # type: ignore[no-untyped-def]
        for name in ("full", "windowed"):
            register(name, FlashAttn())
