"""Exact attention on one rectangle of queries and keys: what every plan is made of.

Two versions with one meaning. `flash_*` is torch's fused CPU kernel, guarded where it is known to
be wrong; `math_*` is plain torch on any device and serves softcap, bias and per-head masks. Both
take and return 4-D tensors `[Z, H, R, D]` (queries) against `[Z, H, L, D]` (keys), and are made to
be summed: the backward of a part takes the *total* lse and output of its rows, so that disjoint
sets of keys add up (FlashAttention-2, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...digits import wide

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as a float one: 0 where visible, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _unit_stride(x: Tensor) -> Tensor:
    # With another stride torch silently takes its slow path, or refuses.
    return x if x.stride(-1) == 1 else x.contiguous()


def _pad_width(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a positive scale with the same logits as `scale <= 0` (NaN stays NaN)."""
    return (q * 0.0, 1.0) if scale == 0 else (-q, -scale)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """torch's CPU kernel on one rectangle.

    Args:
        q, k, v: `[Z, H, R, D]`, `[Z, H, L, D]`, `[Z, H, L, Dv]`; overlapping strides are fine.
        mask: additive, q's dtype, broadcastable to `[Z, H, R, L]`; -inf where invisible.
        causal: key j is visible to query i where `j <= i` (only with R == L).

    Returns:
        out `[Z, H, R, Dv]` in q's dtype and lse `[Z, H, R]`, wide; 0 and -inf in empty rows.
    """
    if scale <= 0:
        # The kernel scales after it masked: -inf * 0 is NaN, and -inf * -1 the greatest logit.
        q, scale = _positive(q, scale)
    value_dim = v.shape[-1]
    width = max(q.shape[-1], value_dim)
    qp, kp, vp = (_unit_stride(_pad_width(x, width)) for x in (q, k, v))
    out, lse = _FLASH(qp, kp, vp, 0.0, causal, attn_mask=mask, scale=scale)
    out = out if width == value_dim else out[..., :value_dim]
    # The kernel reports lse = 0 both for a row that sees no key and, at short lengths, for one
    # whose logits are all NaN, which it turns into zeros. Only these rows are computed again.
    odd = lse == 0
    if bool(odd.any()):
        visible = None if mask is None else mask == 0
        if causal:
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        out, lse = out.clone(), lse.clone()
        for z, h in odd.any(-1).nonzero().tolist():
            rows = odd[z, h].nonzero()[:, 0]
            seen = None
            if visible is not None:
                seen = visible.expand(*q.shape[:3], k.shape[2])[z, h, rows]
            o, s = math_forward(
                q[z, h, rows][None, None],
                k[z : z + 1, h : h + 1],
                v[z : z + 1, h : h + 1],
                scale,
                seen,
            )
            out[z, h, rows] = o[0, 0].to(out.dtype)
            lse[z, h, rows] = s[0, 0]
    return out, lse


def flash_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v of one rectangle, given the total out and lse of its rows."""
    if scale <= 0:
        turned, one = _positive(q, scale)
        dq, dk, dv = flash_backward(grad_out, grad_lse, turned, k, v, out, lse, one, mask, causal)
        return _positive(dq, scale)[0], dk, dv
    value_dim = v.shape[-1]
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # exp(-inf - 0) = 0, and -inf - -inf is NaN
    if grad_lse is not None:
        # One more column: v gets 1, out 0 and grad the gradient of lse, so that
        # dS = P * (grad . v + dlse - grad . out) needs no kernel of its own.
        grad_out = torch.cat([grad_out, grad_lse[..., None].to(grad_out.dtype)], dim=-1)
        out = torch.nn.functional.pad(out, (0, 1))
        v = torch.nn.functional.pad(v, (0, 1), value=1.0)
    width = max(q.shape[-1], v.shape[-1])
    args = (_unit_stride(_pad_width(x, width)) for x in (grad_out, q, k, v, out))
    dq, dk, dv = _FLASH_BACKWARD(*args, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return dq[..., : q.shape[-1]], dk[..., : q.shape[-1]], dv[..., :value_dim]


def _logits(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    scores = q @ k.transpose(-1, -2)
    scores *= scale
    slope = None
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh * tanh
    if bias is not None:
        scores = scores + bias
    return scores, slope


def math_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain torch on one rectangle, accumulated in the wide dtype, which the results keep.

    Args:
        q, k, v: as `flash_forward`.
        mask: bool, broadcastable to `[Z, H, R, L]`, True where visible.
        bias: wide, broadcastable to `[Z, H, R, L]`.
    """
    dtype = wide(q.dtype)
    scores, _ = _logits(q.to(dtype), k.to(dtype), scale, softcap, bias)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf)
    if scores.shape[-1] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3], dtype=dtype), q.new_full(
            q.shape[:3], -torch.inf, dtype=dtype
        )
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill_(top == -torch.inf, 0.0)
    powers = scores.sub_(top).exp_()
    total = powers.sum(-1, keepdim=True)
    out = (powers @ v.to(dtype)) / total.masked_fill(total == 0, 1.0)
    return out, (total.log() + top).squeeze(-1)  # log(0) = -inf: an empty row


def math_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the logits before softcap's slope (that of bias), all wide."""
    dtype = wide(q.dtype)
    q, k, v, out, grad_out = (x.to(dtype) for x in (q, k, v, out, grad_out))
    scores, slope = _logits(q, k, scale, softcap, bias)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    powers = scores.sub_(lse).exp_()
    if mask is not None:
        # An invisible logit may exceed every visible one: its power may be inf, never 0 * inf.
        powers = powers.masked_fill_(~mask, 0.0)
    delta = (grad_out * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None].to(dtype)
    d_scores = powers * ((grad_out @ v.transpose(-1, -2)).sub_(delta))
    d_bias = d_scores
    if slope is not None:
        d_scores = d_scores * slope
    dq = (d_scores @ k).mul_(scale)
    dk = (d_scores.transpose(-1, -2) @ q).mul_(scale)
    return dq, dk, powers.transpose(-1, -2) @ grad_out, d_bias


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add the part `more` to `out` in place: `[..., R, Dv]` and lse `[..., R]` of disjoint keys."""
    total = torch.logaddexp(lse, more_lse)
    base = total.masked_fill(total == -torch.inf, 0.0)
    old, new = (lse - base).exp()[..., None], (more_lse - base).exp()[..., None]
    out.copy_(out * old + more * new)
    lse.copy_(total)


def weighted_sums(starts: Tensor, index: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
    """Sums of `weights * x[index]` from one start to the next: `[len(starts) - 1, D]`."""
    if len(index) == 0:
        return x.new_zeros(len(starts) - 1, x.shape[1])
    return torch.ops.aten._embedding_bag_forward_only(
        x, index, starts, False, 0, False, weights, True, -1
    )[0]
