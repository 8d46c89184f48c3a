"""What the blocks of a layout look like: full, or one of a few distinct tiles that they share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...layout import BlockCSR

FULL = -1  # the look of a block that is visible throughout
_AT_ONCE = 256  # partial blocks


class Looks(NamedTuple):
    """A lowered layout without the entries that show nothing.

    Attributes:
        indptr: int64 `[rows + 1]`. cols, look: int64 `[nnz]`, the columns and what they look like,
            the full ones of a row first, then by tile.
        tiles: bool `[U, row block, column block]`, the distinct masks; None where there are too
            many.
    """

    indptr: NDArray[np.int64]
    cols: NDArray[np.int64]
    look: NDArray[np.int64]
    tiles: Tensor | None


def look_at(csr: BlockCSR, most_partial: int | None = None, most_tiles: int | None = None) -> Looks:
    """The looks of all entries.

    Positions past the last key show nothing, so blocks that hold some are never full; rows past the
    last query, and keys where the layout is transposed, are left to the caller.

    Args:
        most_partial, most_tiles: partial blocks, and distinct ones, up to which they are looked at.
    """
    partial = ~csr.full
    if not csr.transposed and csr.frame.m % csr.frame.key_block:
        partial = partial | (csr.indices == csr.shape[1] - 1)
    where, cols = np.flatnonzero(partial), csr.indices.astype(np.int64)
    look = np.where(partial, 0, FULL)
    if most_partial is not None and len(where) > most_partial:
        return Looks(csr.indptr, cols, look, None)
    rows = csr.row_ids()
    known: dict[bytes, int] = {}
    kept: list[Tensor] = []
    for start in range(0, len(where), _AT_ONCE):
        at = where[start : start + _AT_ONCE]
        masks = csr.entry_masks(rows[at], cols[at, None])
        for entry, mask, bits in zip(at, masks, np.packbits(masks.numpy(), axis=-1), strict=True):
            content = bits.tobytes()
            if content not in known:
                if most_tiles is not None and len(kept) == most_tiles:
                    return Looks(csr.indptr, cols, np.where(partial, 0, FULL), None)
                known[content] = len(kept)
                kept.append(mask)
            look[entry] = known[content]
    sides = (csr.frame.query_block, csr.frame.key_block)
    sides = sides[::-1] if csr.transposed else sides
    tiles = torch.stack(kept) if kept else torch.zeros(0, *sides, dtype=torch.bool)
    some = np.ones(len(tiles) + 1, dtype=bool)  # the last one stands for FULL
    some[:-1] = tiles.flatten(1).any(1).numpy()
    live = some[look]
    rows, cols, look = rows[live], cols[live], look[live]
    order = np.lexsort((cols, look, rows))
    counts = np.bincount(rows, minlength=csr.shape[0])
    indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    return Looks(indptr, cols[order], look[order], tiles)
