"""Which tiles a launch has: tables that a program reads its place from.

Built on the host, from a call's runs and its mechanism's layout, never from N x M. A plan for the
forward pass and for the gradients of queries cuts the queries (a tile is a block of queries, its
list the key blocks they see); a transposed one, for the gradients of keys and values, cuts the
keys. Plans of single runs are kept; those of packed documents are put together from kept lists.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...call import AttentionCall
from ...layout import Grid
from ...runs import Run
from ..held import Held
from .looks import FULL, look_at

_HELD_BYTES = 128 * 2**20


class Plan(NamedTuple):
    """Tables of one launch, on its device.

    Attributes:
        runs: int32 `[R, 8]`: batch row, first query, queries, first key, keys, low, high. The query
            r of a run sees the keys from `low + r` to `high + r` of its run; in a plan of lists
            both are 0.
        tiles: int32 `[T, 8]`: run, block of queries (transposed: of keys), and in a plan of lists
            where its entries start, where the partial ones do, and where they stop.
        cols, looks: int32 `[E]`: the other axis' blocks, and the mask tile of partial ones.
        masks: int32 `[U, row block + 1, column block / 32]`, bits, the lowest first; the last
            row of a tile is what any of its rows sees.
        band: whether it is a plan of bands, without lists.
    """

    runs: Tensor
    tiles: Tensor
    cols: Tensor
    looks: Tensor
    masks: Tensor
    band: bool

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self[:5])


class _Lists(NamedTuple):
    """The lists of one run: `[rows]` starts of the partial entries, and the rest as in `Plan`."""

    indptr: NDArray[np.int64]
    partial: NDArray[np.int64]
    cols: NDArray[np.int32]
    looks: NDArray[np.int32]
    masks: NDArray[np.int32]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self)


_plans: Held[Plan] = Held(_HELD_BYTES)
_lists: Held[_Lists] = Held(_HELD_BYTES)


@lru_cache(maxsize=4096)
def band(
    mechanism: Any, n: int, m: int, causal: bool, offset: int
) -> tuple[int | None, int | None] | None:
    """The band of keys `i - first .. i + second` that query i of a run sees; None for no band."""
    found: tuple[int | None, int | None] | None
    found = mechanism.clauses(Grid(n, m, causal, offset)).as_band()
    return found


def band_ends(mechanism: Any, run: Run, causal: bool) -> tuple[int, int] | None:
    """`low` and `high` of a run whose pattern is one band, within int32; None for any other."""
    found = band(mechanism, run.n, run.m, causal, run.offset)
    if found is None:
        return None
    far = max(run.n, run.m) + 1
    low = -far if found[0] is None else min(max(run.offset - found[0], -far), far)
    high = far if found[1] is None else min(max(run.offset + found[1], -far), far)
    return low, high


def narrow(mechanism: Any, run: Run, causal: bool, most: int) -> bool:
    """Whether a row sees few keys, however long its run: a band of fewer than `most`, or chosen
    blocks."""
    found = band(mechanism, run.n, run.m, causal, run.offset)
    if found is None:
        return True
    first, second = found
    return first is not None and second is not None and first + second < most


def pack_bits(masks: Tensor) -> NDArray[np.int32]:
    """Bool `[U, A, B]` as int32 words `[U, A + 1, B / 32]`, rounded up, the lowest bit first.

    The last row is what any row sees.
    """
    masks = torch.cat([masks, masks.any(1, keepdim=True)], dim=1)
    bits = np.packbits(masks.numpy(), axis=-1, bitorder="little")
    short = -bits.shape[-1] % 4
    return np.pad(bits, ((0, 0), (0, 0), (0, short))).view("<i4").astype(np.int32)


def _make_lists(mechanism: Any, grid: Grid, queries: int, keys: int, transposed: bool) -> _Lists:
    csr = mechanism.clauses(grid).lower(queries, keys)
    made = look_at(csr.transpose() if transposed else csr)
    assert made.tiles is not None
    full = np.concatenate(([0], np.cumsum(made.look == FULL)))
    partial = made.indptr[:-1] + full[made.indptr[1:]] - full[made.indptr[:-1]]
    looks = made.look.astype(np.int32)
    return _Lists(made.indptr, partial, made.cols.astype(np.int32), looks, pack_bits(made.tiles))


def make(
    mechanism: Any,
    call: AttentionCall,
    runs: list[Run],
    queries: int,
    keys: int,
    transposed: bool = False,
) -> Plan:
    """The plan of a call.

    Args:
        runs: of `cut(call)`; a single one may span several rows of the batch, which are then a
            third axis of the launch, and others are repeated for each of theirs.
        queries, keys: in a block.
    """
    key = (mechanism, call.causal, queries, keys, transposed)
    if len(runs) == 1:
        only = runs[0]
        place = (only.batch.start, only.queries, only.keys, only.offset)
        return _plans.get(
            (*key, str(place), call.device),
            lambda: _build(mechanism, call, runs, queries, keys, transposed),
        )
    return _build(mechanism, call, runs, queries, keys, transposed)


def _build(
    mechanism: Any, call: AttentionCall, runs: list[Run], queries: int, keys: int, transposed: bool
) -> Plan:
    bands = [band_ends(mechanism, run, call.causal) for run in runs]
    banded = all(band is not None for band in bands)
    rows: list[tuple[int, ...]] = []
    tiles: list[NDArray[np.int64]] = []
    cols: list[NDArray[np.int32]] = []
    looks: list[NDArray[np.int32]] = []
    masks: list[NDArray[np.int32]] = []
    entries = faces = 0
    size = keys if transposed else queries
    for run, band in zip(runs, bands, strict=True):
        low = high = 0
        count = -(-(run.m if transposed else run.n) // size)
        table = np.zeros((count, 8), dtype=np.int64)
        table[:, 1] = np.arange(count)
        if banded:
            assert band is not None
            low, high = band
        else:
            grid = Grid(run.n, run.m, call.causal, run.offset)
            found = _lists.get(
                (mechanism, grid, queries, keys, transposed),
                lambda grid=grid: _make_lists(mechanism, grid, queries, keys, transposed),  # type: ignore[misc]
            )
            table[:, 2], table[:, 3], table[:, 4] = (
                entries + x for x in (found.indptr[:-1], found.partial, found.indptr[1:])
            )
            cols.append(found.cols)
            looks.append(found.looks + faces)
            masks.append(found.masks)
            entries, faces = entries + len(found.cols), faces + len(found.masks)
        spread = len(runs) > 1
        for batch in range(run.batch.start, run.batch.stop if spread else run.batch.start + 1):
            table = table.copy()
            table[:, 0] = len(rows)
            rows.append((batch, run.queries.start, run.n, run.keys.start, run.m, low, high, 0))
            tiles.append(table)
    whole = np.concatenate(tiles)
    if banded:
        # Under causal, later queries see more keys: the longest first.
        whole = whole[::-1] if call.causal and not transposed else whole
    else:
        whole = whole[np.argsort(whole[:, 2] - whole[:, 4], kind="stable")]

    def table_of(x: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)).to(call.device)

    none = np.zeros(1, dtype=np.int32)  # a pointer to something, where there are no entries
    return Plan(
        runs=table_of(rows),
        tiles=table_of(whole),
        cols=table_of(np.concatenate(cols) if entries else none),
        looks=table_of(np.concatenate(looks) if entries else none),
        masks=table_of(np.concatenate(masks) if faces else none),
        band=banded,
    )
