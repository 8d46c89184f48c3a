"""The public calls: `attention`, `attention_weights` and `explain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import registry
from .arguments import describe
from .base import Mechanism
from .cache import Cache
from .call import AttentionCall
from .choice import candidates, choose, reasons_against
from .engines import intern
from .engines.op import without_autocast
from .errors import InvalidInputError, UnsupportedCallError
from .implementation import Implementation


@dataclass(frozen=True)
class Explanation:
    """What `attention` would do with a call, and why; `print` it.

    Attributes:
        mechanism: the spec. nature: of the mechanism.
        impl: the implementation chosen, or None where none serves.
        refusals: why the mechanism itself cannot serve the call; empty when it can.
        rejected: for each other implementation, why it was not taken.
        call: the validated request.
    """

    mechanism: str
    nature: str
    impl: str | None
    refusals: tuple[str, ...]
    rejected: dict[str, tuple[str, ...]]
    call: AttentionCall

    def __str__(self) -> str:
        call = self.call
        lines = [
            f"mechanism       {self.mechanism} ({self.nature})",
            f"call            q [{call.batch}, {call.q_heads}, {call.n}, {call.head_dim}], "
            f"k [{call.batch}, {call.kv_heads}, {call.m}, {call.head_dim}], {call.dtype}, "
            f"{call.device}, {'causal' if call.causal else 'not causal'}",
            f"implementation  {self.impl or 'none'}",
        ]
        lines += [f"  refused: {reason}" for reason in self.refusals]
        for name, reasons in self.rejected.items():
            lines += [f"  not {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


def _resolve(mechanism: str | Mechanism, options: dict[str, Any]) -> Mechanism:
    if isinstance(mechanism, Mechanism) and not options:
        return mechanism
    if torch.compiler.is_compiling():
        return intern.resolve(_named(mechanism, **options))
    return registry.mechanism(mechanism, **options)


@intern.constant
def _named(mechanism: str | Mechanism, /, **options: Any) -> str:
    # Parsing and the registry's lock are not for tracing: the same name means the same constant.
    return intern.key(registry.mechanism(mechanism, **options))


def _refuse(mechanism: Mechanism, call: AttentionCall) -> None:
    reasons = mechanism.refusals(call)
    if reasons:
        raise UnsupportedCallError.of(f"mechanism {mechanism!r}", reasons)


def autocast(q: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype, as torch's own attention does; float64 is left alone."""
    tensors = (q, *rest)
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors
    kind = q.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def checked_cache(cache: Any) -> Cache:
    if not all(hasattr(cache, word) for word in ("admit", "serves", "attend", "append")):
        raise InvalidInputError(
            f"cache must come from mechanism.new_cache(...), got {describe(cache)}"
        )
    return cache  # type: ignore[no-any-return]


def _check_result(
    impl: Implementation, mechanism: Mechanism, result: Any, call: AttentionCall
) -> tuple[Tensor, Tensor | None]:
    """Hold an implementation to its shapes: a wrong one must not travel on."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise UnsupportedCallError(
            f"implementation {impl.name!r} of {mechanism!r} returned {type(result).__name__}; "
            "expected (out, lse or None)"
        )
    out, lse = result
    shape = (call.batch, call.q_heads, call.n, call.value_dim)
    if not isinstance(out, Tensor) or tuple(out.shape) != shape or out.dtype != call.dtype:
        came = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise UnsupportedCallError(
            f"implementation {impl.name!r} of {mechanism!r} returned out {came}; expected "
            f"{call.dtype} {list(shape)}"
        )
    if call.needs_lse and (not isinstance(lse, Tensor) or tuple(lse.shape) != shape[:3]):
        raise UnsupportedCallError(
            f"implementation {impl.name!r} of {mechanism!r} returned no lse of shape "
            f'{list(shape[:3])}; take another with impl=, such as "reference"'
        )
    return out, lse


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Any = ...,
    *,
    return_lse: Literal[False] = ...,
    **kw: Any,
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mechanism: Any = ..., *, return_lse: Literal[True], **kw: Any
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism = "full",
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | None = None,
    cache: Any = None,
    impl: str = "auto",
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by any mechanism: `out = W(q, k) @ v`.

    Args:
        q: queries `[B, Hq, N, D]`; float64, float32, bfloat16 or float16.
        k: keys `[B, Hkv, M, D]`; query head h reads key-value head `h // (Hq / Hkv)`.
        v: values `[B, Hkv, M, Dv]`.
        mechanism: a name (`"windowed"`, with its `options` as keywords), a spec string
            (`"windowed(window=256, sinks=4)"`) or an instance from `sa.mechanism`.
        causal: query i sees keys up to its own position, bottom-right aligned:

            N=2, M=4    1 1 1 0        N=4, M=2    0 0
                        1 1 1 1                    0 0
                                                   1 0
                                                   1 1
        scale: multiplies `q . k`; default `D ** -0.5`.
        key_mask: bool `[B, M]`, True where a key may be seen.
        q_segments, kv_segments: int `[B, N]`, `[B, M]`: attend only where equal (packing). One
            alone serves both when N == M.
        q_offset: position of query 0 in key coordinates (int, or int tensor `[B]`) instead of
            `M - N`.
        softcap: `cap * tanh(logit / cap)` before masking.
        sink_logits: `[Hq]`, one extra logit a head that takes weight and has no value.
        bias: `[B or 1, Hq or 1, N or 1, M]`, added to the logits after softcap; differentiable.
        cache: from `mechanism.new_cache`. q, k, v and key_mask are then those of the new tokens
            alone, which see all tokens before them and are remembered. Needs causal=True; takes
            no segments, q_offset or inputs that require gradients. A call that fails leaves it as
            it was.
        impl: an implementation's name, or "auto" for the first that supports the call.
        return_lse: also return the log normaliser (natural log), softmax natures only.

    Returns:
        out `[B, Hq, N, Dv]` in q's dtype; with `return_lse`, `(out, lse [B, Hq, N])`, lse in
        float32 (float64 for float64). A query that sees no key gets 0 and lse -inf.

    Raises:
        InvalidInputError: an argument is malformed.
        UnsupportedCallError: the mechanism or implementation cannot serve the call.
        UnknownMechanismError, UnknownOptionError: no such name or option.
    """
    out, lse, _ = serve(
        _resolve(mechanism, options),
        q,
        k,
        v,
        impl=impl,
        cache=cache,
        bias=bias,
        causal=causal,
        scale=scale,
        key_mask=key_mask,
        q_segments=q_segments,
        kv_segments=kv_segments,
        q_offset=q_offset,
        softcap=softcap,
        sink_logits=sink_logits,
        needs_lse=return_lse,
    )
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def serve(
    mech: Mechanism,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    impl: str = "auto",
    cache: Any = None,
    bias: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None, str]:
    """`attention` of a mechanism at hand, and the name of the implementation that served it.

    Args:
        arguments: of `AttentionCall.make`.

    Returns:
        out, lse (or None where it was not asked for), and the implementation's name.
    """
    q, k, v = autocast(q, k, v)
    if cache is None:
        call = AttentionCall.make(q, k, v, bias=bias, **arguments)
    else:
        call = AttentionCall.make(q, k, v, cached=True, **arguments)
        call = checked_cache(cache).admit(mech, call, bias)
    _refuse(mech, call)
    chosen = choose(mech, call, impl, cache)
    with without_autocast(q.device.type):
        if cache is None:
            result = chosen.run(mech, q, k, v, call)
        else:
            result = chosen.step(mech, q, k, v, cache, call)
    out, lse = _check_result(chosen, mech, result, call)
    if cache is not None:
        cache.append(k, v, call)
    return out, lse, chosen.name


def attention_weights(
    q: Tensor,
    k: Tensor,
    mechanism: str | Mechanism = "full",
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The dense attention map of a mechanism, from its definition in float64: for small N.

    Args:
        q: `[B, Hq, N, D]`, k: `[B, Hkv, M, D]`; the rest as in `attention`.

    Returns:
        W `[B, Hq, N, M]` in q's dtype; `W @ v` is the attention. Memory is N x M by nature.
    """
    mech = _resolve(mechanism, options)
    q, k = autocast(q, k)
    call = AttentionCall.make(
        q,
        k,
        k,
        causal=causal,
        scale=scale,
        key_mask=key_mask,
        q_segments=q_segments,
        kv_segments=kv_segments,
        q_offset=q_offset,
        softcap=softcap,
        sink_logits=sink_logits,
        bias=bias,
    )
    _refuse(mech, call)
    return _dense_map(mech, q, k, call)


def _dense_map(mech: Mechanism, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
    from .reference import make_inert

    call = mech.with_selection(q, k, call).to_dtype(torch.float64)
    wide_q, wide_k = q.to(torch.float64), k.to(torch.float64)
    wide_q, wide_k, _ = make_inert(wide_q, wide_k, wide_k, mech.mask(call), call.groups)
    return mech.weights(wide_q, wide_k, call).to(q.dtype)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism = "full",
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | None = None,
    cache: Any = None,
    impl: str = "auto",
    return_lse: bool = False,
    **options: Any,
) -> Explanation:
    """Which implementation `attention` would take for the same arguments, and why no other.

    Nothing is computed. Arguments as in `attention`; a malformed one raises as it would there.
    """
    mech = _resolve(mechanism, options)
    q, k, v = autocast(q, k, v)
    call = AttentionCall.make(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        key_mask=key_mask,
        q_segments=q_segments,
        kv_segments=kv_segments,
        q_offset=q_offset,
        softcap=softcap,
        sink_logits=sink_logits,
        bias=None if cache is not None else bias,
        needs_lse=return_lse,
        cached=cache is not None,
    )
    refusals: list[str] = []
    if cache is not None:
        try:
            call = checked_cache(cache).admit(mech, call, bias)
        except UnsupportedCallError as error:
            refusals = list(error.reasons)
    refusals += mech.refusals(call)
    rejected: dict[str, tuple[str, ...]] = {}
    taken: str | None = None
    found = candidates(mech)
    if impl != "auto" and impl not in [one.name for one in found]:
        choose(mech, call, impl)  # raises, with the names that there are
    for one in found:
        reasons = reasons_against(one, mech, call, cache)
        if impl != "auto" and one.name != impl:
            reasons.append(f"impl={impl!r} was asked for")
        elif not reasons and taken is not None:
            reasons.append(f"{taken} comes first")
        if reasons or refusals:
            rejected[one.name] = tuple(reasons or ["the mechanism refuses the call"])
        else:
            taken = one.name
    return Explanation(repr(mech), mech.nature, taken, tuple(refusals), rejected, call)
