"""What `torch.nn.MultiheadAttention` takes, in the contract's words: inputs checked, masks read.

In torch's masks True means *ignored*, and a mask may be float, added to the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import DTYPES, describe, is_readable
from .base import Mechanism
from .errors import InvalidInputError, UnsupportedCallError

Inputs = tuple[Tensor, Tensor, Tensor]


def check_inputs(
    inputs: Inputs, widths: tuple[int, int, int], dtype: torch.dtype, batch_first: bool
) -> None:
    """Hold query, key and value to each other and to the parameters' dtype.

    Args:
        inputs: each `[N, E]`, `[B, N, E]` with batch_first, or `[N, B, E]`; or one nested tensor.
        widths: E of each.

    Raises:
        InvalidInputError, UnsupportedCallError: see the messages.
    """
    query, key, value = inputs
    for name, x, width in zip(("query", "key", "value"), inputs, widths, strict=True):
        if not isinstance(x, Tensor) or x.dim() not in (2, 3) or x.dim() != query.dim():
            raise InvalidInputError(
                f"{name} must be a tensor [N, E], [B, N, E] (batch_first) or [N, B, E], as all "
                f"three are, got {describe(x)}"
            )
        if (x.is_nested or query.is_nested) and x is not query:
            raise UnsupportedCallError(
                "nested tensors are taken for self-attention alone (query is key is value); pad "
                "them and give key_padding_mask"
            )
        if x.size(-1) != width:
            raise InvalidInputError(
                f"{name} has width {x.size(-1)}, expected {width}: {describe(x)}"
            )
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise InvalidInputError(
                f"{name} has dtype {x.dtype} but the parameters have {dtype}; cast one with .to(), "
                "or use autocast"
            )
    if query.is_nested:
        return
    at = 0 if batch_first else 1
    same_batch = query.dim() == 2 or key.shape[at] == query.shape[at]
    if key.shape[:-1] != value.shape[:-1] or not same_batch:
        shapes = ", ".join(str(list(x.shape)) for x in inputs)
        raise InvalidInputError(
            "query, key and value must share their batch, and key and value their length, got "
            f"{shapes} with batch_first={batch_first}"
        )


def read_nested(x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """A nested tensor as `[B, N, E]`, key_padding_mask `[B, N]`, and the length of each row."""
    if x.layout != torch.strided:
        raise UnsupportedCallError(
            f"a nested tensor must be of strided layout, got {x.layout}: pad it and give "
            "key_padding_mask"
        )
    lengths = [len(row) for row in x.unbind()]
    padded = torch.nested.to_padded_tensor(x, 0.0)
    own = torch.tensor(lengths, device=x.device)[:, None]
    return padded, torch.arange(padded.shape[1], device=x.device) >= own, lengths


def read_padding(mask: Tensor | None, k: Tensor) -> Tensor | None:
    """`key_padding_mask` `[B, M]` as a key_mask: True where a key may be seen."""
    if mask is None:
        return None
    _check_mask("key_padding_mask", mask, ([k.shape[0], k.shape[2]],), k)
    if mask.dtype == torch.bool:
        return ~mask
    # nn.TransformerEncoderLayer makes such of bool ones.
    seen = mask == 0
    _insist(
        (seen | (mask == -torch.inf)).all(),
        "key_padding_mask is a float tensor with other numbers than 0 and -inf; give a bool one, "
        "True where a key is ignored, or add the numbers as attn_mask",
    )
    return seen


def read_bias(mask: Tensor, mechanism: Mechanism, q: Tensor, m: int) -> Tensor:
    """`attn_mask` `[N, M]` or `[B * Hq, N, M]` as a bias `[B or 1, Hq or 1, N, M]`.

    Raises:
        UnsupportedCallError: the mechanism cannot honour it.
    """
    batch, heads, n, _ = q.shape
    _check_mask("attn_mask", mask, ([n, m], [batch * heads, n, m]), q)
    reason = ""
    if "bias" not in mechanism.honours:
        reason = "its definition has no bias, which is what attn_mask becomes"
    elif getattr(mechanism, "is_dynamic", False):
        reason = "it chooses keys, and what attn_mask hides would have a part in the choice"
    if reason:
        raise UnsupportedCallError.of(
            f"mechanism {mechanism!r}",
            [reason],
            "Say a causal mask with is_causal=True, padding with key_padding_mask, documents with "
            "q_segments",
        )
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
    return mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, heads))


def check_causal(mask: Tensor, q: Tensor, m: int) -> None:
    """is_causal=True says that attn_mask is the causal mask: hold it to that."""
    batch, heads, n, _ = q.shape
    _check_mask("attn_mask", mask, ([n, m], [batch * heads, n, m]), q)
    hidden = torch.ones(n, m, dtype=torch.bool, device=mask.device).triu(1 + m - n)
    expected = hidden
    if mask.dtype != torch.bool:
        expected = torch.zeros_like(mask).masked_fill(hidden, -torch.inf)
    _insist(
        (mask == expected).all(),
        f"is_causal=True came with an attn_mask that is not the causal mask of {n} queries and {m} "
        "keys (bottom-right: query i sees keys up to i + M - N); leave is_causal out to have the "
        "mask added to the logits",
    )


def _check_mask(name: str, mask: object, shapes: tuple[list[int], ...], like: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, *DTYPES):
        raise InvalidInputError(
            f"{name} must be a bool tensor, True where ignored, or a float one, got "
            f"{describe(mask)}"
        )
    if list(mask.shape) not in shapes:
        raise InvalidInputError(
            f"{name} must have shape {' or '.join(map(str, shapes))}, got {list(mask.shape)}"
        )
    if mask.device != like.device:
        raise InvalidInputError(f"{name} is on {mask.device} but query is on {like.device}")


def _insist(holds: Tensor, message: str) -> None:
    """Raise unless a bool tensor `[]` is True: now, or when traced code runs."""
    if not is_readable(holds):
        torch._assert_async(holds, message)
    elif not holds:
        raise InvalidInputError(message)
