"""Exact softmax attention, as a plugin like any other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import sparseattn as sa


@dataclass(frozen=True)
class Full(sa.MaskedSoftmax):
    """Exact softmax attention: every query sees every key that the call allows.

    `W[i, j] = exp(s_ij) / sum_j' exp(s_ij')` with `s = scale * q . k`, over the visible pairs. All
    else is measured against it.

    Refuses: nothing. Cost: O(N M (D + Dv)) time, O(N) memory beside the inputs.
    """

    name = "full"
    nature = "exact"
    source = "Vaswani et al. 2017, Attention Is All You Need, eq. 1 (arXiv:1706.03762)"

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(i.shape, j.shape)
        return torch.ones(shape, dtype=torch.bool, device=i.device)

    def layout(self, grid: sa.Grid) -> sa.Layout:
        return grid.everything()


class Plugin:
    """The entry point's object."""

    sparseattn_api = 1

    @sa.hookimpl
    def register_mechanisms(self, register):  # type: ignore[no-untyped-def]
        register(Full)
