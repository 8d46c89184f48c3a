"""A mechanism's pattern as a dense mask, straight from its definition: for oracles and pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall


def dense(mechanism: Any, call: AttentionCall) -> Tensor:
    """Which pairs the pattern uses, whatever the call's own masks: bool `[B or 1, Hq or 1, N, M]`.

    A dynamic mechanism needs `call.selection`.
    """
    place = call.placement()
    if mechanism.is_dynamic:
        assert call.selection is not None
        blocks = torch.div(place.k, mechanism.block, rounding_mode="floor")
        return selected_keys(call.selection, blocks)
    i, j = place.q[:, None, :, None], place.k[:, None, None, :]
    mask = mechanism.visible_in(i, j, place.extent[:, None, :, None], call.causal)
    return mask.expand(mask.shape[0], 1, call.n, call.m)


def selected_keys(selection: Tensor, key_blocks: Tensor) -> Tensor:
    """Which keys a selection names: bool `[B, Hq, N, M]`.

    Args:
        selection: int32 `[B, Hq, N, S]`, block ids, -1 pads.
        key_blocks: int64 `[B or 1, M]`, the block of each key.
    """
    b, h, n, _ = selection.shape
    m = key_blocks.shape[1]
    # Ids past the last key's block name no key; -1 and they share the slot that is never read.
    count = (m + 1) if m == 0 else m
    ids = selection.to(torch.int64)
    ids = torch.where((ids < 0) | (ids >= count), count, ids)
    named = torch.zeros(b, h, n, count + 1, dtype=torch.bool, device=selection.device)
    # Out of place: under vmap `named` has no mapped dimension.
    named = named.scatter(3, ids, True)
    named[..., count] = False
    at = torch.where((key_blocks < 0) | (key_blocks >= count), count, key_blocks)
    return named.gather(3, at[:, None, None, :].expand(b, h, n, m))
