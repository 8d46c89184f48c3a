"""What a dense attention mask says, in the words of a call.

Models hand over masks that were built dense. Most of them say no more than "causal" and "this is
padding", and a mechanism that is told so is faster, and may serve where it takes no bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def read(mask: Tensor, batch: int, n: int, m: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `attention` that mean the same as a mask.

    Args:
        mask: `[B or 1, H or 1, N or 1, M]`, bool (True may be seen) or float (added to the logits;
            at most half the dtype's minimum counts as hidden).

    Returns:
        some of `causal`, `key_mask` and `bias`.
    """
    if mask.dtype == torch.bool:
        allowed = mask
    else:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((hidden | (mask == 0)).all()):
            return {"bias": mask.masked_fill(hidden, float("-inf")).to(dtype)}
        allowed = ~hidden
    if bool(allowed.all()):
        return {}
    if bool((allowed[:, :1] == allowed).all()):
        found = _read_shared(allowed[:, 0].expand(batch, -1, -1), n, m)
        if found is not None:
            return found
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return {"bias": zeros.masked_fill_(~allowed, float("-inf"))}


def _read_shared(allowed: Tensor, n: int, m: int) -> dict[str, Any] | None:
    """Of a mask `[B, N or 1, M]` that all heads share; None where it says something else."""
    rows, keys = allowed.shape[1], allowed.any(1)
    if not bool(keys.any()) or (n > 1 and bool((allowed == keys[:, None]).all())):
        return {"key_mask": keys}
    if rows != n:
        return None
    # The last query stands at the last key that it sees, and keys beyond are the unwritten room of
    # a static cache; or it stands at the last key of all, which is padding in every row.
    last = int((allowed[:, -1] * torch.arange(1, m + 1, device=allowed.device)).max()) - 1
    for offset in dict.fromkeys((last - (n - 1), m - n)):
        causal = torch.ones(n, m, dtype=torch.bool, device=allowed.device).tril(offset)
        if bool((allowed == (causal & keys[:, None])).all()):
            if offset == m - n and bool(keys.all()):
                return {"causal": True}
            # Where the queries stand is said outright: padding on the right moves nobody.
            return {"causal": True, "key_mask": keys, "q_offset": offset}
    return None
