"""How large an arithmetic error may be: derived from the dtype and the call, never picked by hand.

The rule is `max|out - ref| <= 2 * max|naive - ref| + 2 * rounding`. `ref` is the definition in
float64, `naive` the same definition computed in the tested dtype, `rounding` what that dtype loses
on numbers of this size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Mechanism
from ..call import AttentionCall
from ..reference import evaluate, grouped_apply, make_inert, slab_rows

EPS64 = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps


def largest(x: Tensor) -> float:
    """max|x|, 0 for no elements; NaN if any is NaN."""
    return float(x.abs().max()) if x.numel() else 0.0


def rounding(ref: Tensor, dtype: torch.dtype) -> float:
    """`max|(ref + 0.3 - 0.3) - ref|`, computed in `dtype`."""
    rounded = ref.to(dtype)
    return largest(((rounded + 0.3) - 0.3 - rounded).to(torch.float64))


def row_mass(mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> float:
    """`max_i sum_j |W_ij| |v_j|` in float64: the size that float64 rounding errors scale with."""
    call = mechanism.with_selection(q, k, call).to_dtype(torch.float64)
    q, k, v = (x.to(torch.float64) for x in (q, k, v))
    greatest = 0.0
    step = slab_rows(call)
    for start in range(0, call.n, step):
        piece = slice(start, min(start + step, call.n))
        part = call.take_rows(piece)
        inert = make_inert(q[:, :, piece], k, v, mechanism.mask(part), part.groups)
        weights, _ = mechanism.definition(inert[0], inert[1], part)
        greatest = max(greatest, largest(grouped_apply(weights.abs(), inert[2].abs())))
    return greatest


def output_budget(
    mechanism: Mechanism, ref: Tensor, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> float:
    """The budget of an output.

    Args:
        ref: the definition in float64, `[B, Hq, N, Dv]`.
        q, k, v: the inputs as given, in `call.dtype`. `call` bears the selection, if any.
    """
    if call.dtype == torch.float64:
        return 64 * EPS64 * row_mass(mechanism, q, k, v, call)
    naive, _ = evaluate(mechanism, q, k, v, call, dtype=call.dtype)
    if not torch.isfinite(naive).all():
        naive = evaluate(mechanism, q, k, v, call, dtype=torch.float32)[0].to(call.dtype)
    return 2 * largest(naive.to(torch.float64) - ref) + 2 * rounding(ref, call.dtype)


def gradients(
    mechanism: Mechanism,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of the definition, computed in `dtype`; a selection counts as constant.

    Args:
        grad: gradient of the output, `[B, Hq, N, Dv]`.
    """
    call = mechanism.with_selection(q, k, call).replace(needs_grad=True)
    with torch.enable_grad():
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out, _ = evaluate(mechanism, *leaves, call, dtype=dtype)  # type: ignore[misc]
        if not out.requires_grad:
            found: tuple[Tensor | None, ...] = (None, None, None)
        else:
            found = torch.autograd.grad(out, leaves, grad.to(dtype), allow_unused=True)
    filled = (torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))
    return tuple(g.detach() for g in filled)  # type: ignore[return-value]


def gradient_budgets(
    mechanism: Mechanism,
    refs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
) -> list[float]:
    """The budgets of dq, dk and dv, by the rule for outputs.

    float64 has no wider type to be judged by and gradients have no bound as simple as that of the
    output: the rule is taken in float32 and scaled by the ratio of the two precisions, twice, as
    tested and reference are both computed in float64.
    """
    tested = torch.float32 if call.dtype == torch.float64 else call.dtype
    factor = 2 * EPS64 / EPS32 if call.dtype == torch.float64 else 1.0
    naive = gradients(mechanism, grad, q, k, v, call, dtype=tested)
    if not all(torch.isfinite(g).all() for g in naive):
        wide = gradients(mechanism, grad, q, k, v, call, dtype=torch.float32)
        naive = tuple(g.to(tested) for g in wide)  # type: ignore[assignment]
    return [
        factor * (2 * largest(g.to(torch.float64) - ref) + 2 * rounding(ref, tested))
        for g, ref in zip(naive, refs, strict=True)
    ]
