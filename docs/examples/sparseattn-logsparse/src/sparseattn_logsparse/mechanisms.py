"""Two mechanisms: a static pattern, and a feature map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import sparseattn as sa

_FARTHEST = 2**30  # a run has fewer than 2**31 tokens


@dataclass(frozen=True)
class LogSparse(sa.MaskedSoftmax):
    """The near keys, and those at distances that are powers of two.

    `abs(i - j) < near`, or `abs(i - j)` is 0, 1, 2, 4, 8, ..., 2**30: each query sees
    O(near + log N) keys, and any key is reached in O(log N) layers.

    Attributes:
        near: keys at a smaller distance are all seen.
    """

    name = "logsparse"
    source = "Li et al. 2019, LogSparse Transformer, section 4.2 (arXiv:1907.00235)"

    near: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.near, bool) or not 1 <= self.near < 2**31:
            raise sa.InvalidInputError(
                f"{self.name}: option near got {self.near!r:.80}, expected an int from 1 to "
                f"{2**31 - 1}"
            )

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        distance = (i - j).abs()
        # A power of two shares no bit with the number before it; nor does 0.
        power = (distance & (distance - 1) == 0) & (distance <= _FARTHEST)
        return (distance < self.near) | power

    def layout(self, grid: sa.Grid) -> sa.Layout:
        found = grid.band(self.near - 1, self.near - 1)
        # No distance is greater: query 0 stands at `offset`, key 0 at position 0.
        longest = abs(int(grid.offset or 0)) + grid.n + grid.m
        distance = 1
        while distance <= min(longest, _FARTHEST):
            # A band one key wide: `j - i == -distance`, and its mirror image.
            found = found | grid.band(distance, -distance) | grid.band(-distance, distance)
            distance *= 2
        return found


@dataclass(frozen=True)
class MirroredSoftmax(sa.KernelizedLinear):
    """Linear attention with the features `[softmax(x), softmax(-x)]`.

    All features are positive, and the mirror image keeps what a softmax alone would lose: the
    entries of x far below the others. The paper puts a trained projection before the map.
    """

    name = "mirrored_softmax"
    nature = "different_function"
    source = "Zhang et al. 2024, Hedgehog, section 4.2 (arXiv:2402.04347)"

    def feature_map(self, x: Tensor, positions: Tensor, call: sa.AttentionCall) -> Tensor:
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)
