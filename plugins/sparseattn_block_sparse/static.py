"""Static patterns of blocks: BigBird, and any list of blocks that the user made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import sparseattn as sa

from .options import check_count, refuse

# A grid whose last query block lies beyond this gets the definition instead of a list of blocks:
# the list is indexed by absolute block row, and such offsets mean queries far past every key.
_MOST_ROWS = 2**24

_Ints = TypeVar("_Ints", int, Tensor, np.ndarray)
_WORD = 2**32 - 1


def _mix(x: _Ints) -> _Ints:
    """Scramble 32-bit words, one to one: a multiply-xorshift hash of low bias."""
    # Both constants are below 2**31, so that no product leaves int64: torch on any device, numpy
    # and plain Python ints give the same numbers without relying on wraparound.
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _WORD
    return x ^ (x >> 15)


def draw_block(seed: int, row: _Ints, draw: int, count: _Ints) -> _Ints:
    """Draw number `draw` of query block `row`: a block from 0 to `count - 1`.

    A counter-based generator: the number depends on (seed, row, draw) and on nothing else, so no
    state, length, batch or device can change it. Seed and row enter as two 32-bit words each, then
    the draw, each word added to the state with the golden ratio's bits and mixed; the last state is
    taken modulo `count`.

    Args:
        seed: 0 to 2**64 - 1.
        row: query blocks, int64 and >= 0.
        draw: 0 to 2**32 - 1.
        count: blocks to choose from, int64 and >= 1; broadcasts with `row`.
    """
    state: Any = 0
    for word in (seed & _WORD, seed >> 32, row & _WORD, row >> 32, draw):
        state = _mix((state + word + 0x9E3779B9) & _WORD)
    return state % count


@dataclass(frozen=True)
class BigBird(sa.MaskedSoftmax):
    """Blocks near the query, global blocks, and a few blocks drawn at random.

    With `I = i // block` and `J = j // block`: `abs(I - J) <= window_blocks // 2`, or
    `J < global_blocks`, or `I < global_blocks`, or J is one of `random_blocks` draws of a hash of
    (seed, I, draw) (see `draw_block`), modulo I + 1 under causal and the number of key blocks
    otherwise. Draws may repeat or fall on blocks that are visible already, so a row sees at most
    `random_blocks` blocks more. Queries before position 0 draw nothing.

    Refuses: nothing. Cost: O(N (window_blocks + global_blocks + random_blocks) block) time.

    Attributes:
        block: positions in a block.
        window_blocks: blocks in the window, the query's own in the middle; an even number counts as
            the next odd one.
        global_blocks: the first blocks of a document, which see and are seen by everything.
        random_blocks: draws for each query block.
        seed: of the draws, 0 to 2**64 - 1.
    """

    name = "bigbird"
    source = "Zaheer et al. 2020, Big Bird, section 2 (arXiv:2007.14062)"

    block: int = 64
    window_blocks: int = 3
    global_blocks: int = 1
    random_blocks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self, "block", 1)
        check_count(self, "window_blocks", 1)
        check_count(self, "global_blocks", 0)
        check_count(self, "random_blocks", 0)
        check_count(self, "seed", 0, 2**64 - 1)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """The causal form; without causality the draws also need the number of keys."""
        return self.visible_in(i, j, torch.zeros_like(i), causal=True)

    def visible_in(self, i: Tensor, j: Tensor, extent: Tensor, causal: bool) -> Tensor:
        row, column = i // self.block, j // self.block
        seen = (row - column).abs() <= self.window_blocks // 2
        seen = seen | (column < self.global_blocks) | (row < self.global_blocks)
        blocks = row + 1 if causal else (extent + self.block - 1) // self.block
        for draw in range(self.random_blocks):
            drawn = draw_block(self.seed, row.clamp(min=0), draw, blocks.clamp(min=1))
            seen = seen | ((column == drawn) & (row >= 0))
        return seen

    def layout(self, grid: sa.Grid) -> sa.Layout:
        offset = int(grid.offset or 0)
        first, last = max(offset // self.block, 0), (offset + grid.n - 1) // self.block
        if last >= _MOST_ROWS:
            return super().layout(grid)
        near = self.window_blocks // 2
        rows = np.arange(first, last + 1)
        blocks = -(-grid.m // self.block)
        count = rows + 1 if grid.causal else np.full_like(rows, max(blocks, 1))
        # The band holds every pair less than `near` blocks apart and none more than `near`: the two
        # outermost blocks of the window complete it, however wide it is.
        columns = [rows - near, rows + near]
        columns += [draw_block(self.seed, rows, x, count) for x in range(self.random_blocks)]
        listed = np.stack(columns, axis=1)
        most = np.minimum(rows + 1, blocks) if grid.causal else np.full_like(rows, blocks)
        real = (listed >= 0) & (listed < most[:, None])
        indptr = np.concatenate((np.zeros(first + 1, np.int64), np.cumsum(real.sum(1))))
        reach, edge = near * self.block, self.global_blocks * self.block
        return (
            grid.band(reach, reach)
            | grid.blocks(indptr, listed[real], self.block)
            | grid.first_keys(edge)
            | grid.first_queries(edge)
        )


@dataclass(frozen=True)
class BlockSparse(sa.MaskedSoftmax):
    """The blocks that a `BlockLayout` lists, or a file of one.

    Query position i sees key position j where block `j // block` is listed in row `i // block` of
    the layout. Positions are absolute: queries before position 0 or past the last row see nothing.
    The list belongs to every head.

    Refuses, when it is made, a file that cannot be read or that `BlockLayout.save` did not write
    (InvalidInputError). Cost: O(listed blocks) time and memory.

    Attributes:
        layout: a `BlockLayout`, or the path of a file written by `BlockLayout.save`. The file is
            read once, when the mechanism is made; two mechanisms are equal where both the option
            and the blocks are.
    """

    name = "block_sparse"
    source = "any list of blocks; Child et al. 2019, Sparse Transformers (arXiv:1904.10509)"

    # field() without a default: a bare annotation would take the inherited method as its default.
    layout: sa.BlockLayout | str = dataclasses.field()  # type: ignore[assignment]

    def __post_init__(self) -> None:
        pattern: Any = self.layout
        if isinstance(pattern, str):
            try:
                pattern = sa.BlockLayout.load(pattern)
            except OSError as error:
                raise sa.InvalidInputError(
                    f"block_sparse: option layout got {self.layout!r:.200}, expected the path of a "
                    f"file written by BlockLayout.save: {error.strerror or error}"
                ) from error
        elif not isinstance(pattern, sa.BlockLayout):
            refuse(self, "layout", pattern, "a BlockLayout, or the path of a file of one as a str")
        object.__setattr__(self, "_pattern", pattern)

    @property
    def pattern(self) -> sa.BlockLayout:
        """The list of blocks."""
        return self._pattern  # type: ignore[attr-defined,no-any-return]

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return self.pattern.contains(i, j)

    def clauses(self, grid: sa.Grid) -> sa.Layout:
        return grid.blocks(self.pattern.indptr, self.pattern.indices, self.pattern.block)

    # A path says where the blocks were, not which: content counts too.
    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, BlockSparse)
        return (self.layout, self.pattern) == (other.layout, other.pattern)

    def __hash__(self) -> int:
        return hash((type(self), self.layout, self.pattern))
