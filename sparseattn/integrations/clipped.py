"""A pattern cut to what a model's own layers see: a sliding window, or chunks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..base import MaskedSoftmax, Mechanism
from ..clauses import Band
from ..layout import Grid, Layout


class Clip(NamedTuple):
    """What a model's own layer sees of the past: `kind` is "causal_window" (distance < size),
    "window" (distance <= size, both sides) or "chunks" (of `size` keys)."""

    kind: str
    size: int

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        if self.kind == "chunks":
            return i // self.size == j // self.size
        if self.kind == "causal_window":
            return j > i - self.size
        return (i - j).abs() <= self.size

    def layout(self, grid: Grid) -> Layout:
        if self.kind == "chunks":
            return grid.chunks(self.size)
        right = None if self.kind == "causal_window" else self.size
        return grid.band(self.size - (self.kind == "causal_window"), right)

    def spares(self, keys: int) -> bool:
        """Whether it hides none of so many keys."""
        return keys <= self.size


@dataclass(frozen=True)
class Clipped(MaskedSoftmax):
    """The intersection of a static pattern and a model's own."""

    name = "clipped"
    inner: MaskedSoftmax
    clip: Clip

    def visible_in(self, i: Tensor, j: Tensor, extent: Tensor, causal: bool) -> Tensor:
        return self.inner.visible_in(i, j, extent, causal) & self.clip.visible(i, j)

    def layout(self, grid: Grid) -> Layout:
        return self.inner.clauses(grid) & self.clip.layout(grid)


class ClippedFixed(Clipped):
    """The same where the pattern does not depend on how many keys there are, so that a decode
    cache may hold the last of them alone."""

    visible_in = MaskedSoftmax.visible_in

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return self.inner.visible(i, j) & self.clip.visible(i, j)


@functools.lru_cache(maxsize=256)
def clipped(mechanism: Mechanism, clip: Clip) -> MaskedSoftmax | None:
    """The mechanism cut to a clip; None where it is no static pattern."""
    if not isinstance(mechanism, MaskedSoftmax) or mechanism.is_dynamic:
        return None
    fixed = type(mechanism).visible_in is MaskedSoftmax.visible_in
    return (ClippedFixed if fixed else Clipped)(mechanism, clip)


@functools.lru_cache(maxsize=256)
def is_relative(mechanism: Mechanism) -> bool:
    """Whether a pattern asks for the distance of query and key alone, not for where they stand."""
    if not isinstance(mechanism, MaskedSoftmax) or mechanism.is_dynamic:
        return False
    if type(mechanism).visible_in is not MaskedSoftmax.visible_in and not isinstance(
        mechanism, Clipped
    ):
        return False
    terms = mechanism.clauses(Grid(2**16, 2**16, True)).terms
    return all(isinstance(clause, Band) for term in terms for clause in term)


def describe(clip: Clip) -> str:
    words = {"causal_window": "sliding window", "window": "two-sided window", "chunks": "chunks"}
    return f"the model's own {words[clip.kind]} of {clip.size}"
