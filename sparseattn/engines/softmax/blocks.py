"""Block layouts in a few large calls: query blocks with equally many key blocks run together.

Key blocks are gathered into a buffer that stays in cache, or read in place where they lie evenly;
blocks that are only partly visible bring a mask that all heads share. Masks are worked out once a
layout, as bit tiles: blocks that look alike share one. Nothing is padded to a common width, so time
follows the density.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...digits import wide
from ...layout import BlockCSR
from .looks import FULL, Looks, look_at
from .primitive import additive, flash_backward, flash_forward

BLOCK = 64
# Elements of one gathered buffer of keys: 2 MiB in float32, so that it stays in cache.
_BUFFER_ELEMENTS = 2**19
# Distinct bit tiles and partial blocks that a layout may keep; one with more has its masks
# evaluated batch by batch.
_MOST_TILES, _MOST_PARTIAL = 1024, 2**17
_PARTIAL_AT_ONCE = 256


class Batch(NamedTuple):
    """Some rows of a layout with the same number of key blocks.

    Attributes:
        rows: the query blocks, T of them: a slice where they lie evenly, else int64 `[T]`.
        cols: int64 `[T, S]`, their key blocks.
        mask: bool `[T or 1, BLOCK, S * BLOCK]`, or None where all is visible.
    """

    rows: slice | Tensor
    cols: NDArray[np.int64]
    mask: Tensor | None


_plans: WeakKeyDictionary[BlockCSR, Looks] = WeakKeyDictionary()


def plan(csr: BlockCSR) -> Looks:
    """What a layout looks like, found once."""
    found = _plans.get(csr)
    if found is None:
        found = _plans[csr] = look_at(csr, _MOST_PARTIAL, _MOST_TILES)
    return found


def batches(csr: BlockCSR, heads: int, width: int) -> Iterator[Batch]:
    """Cut a lowered layout into batches whose gathered keys fit the buffer."""
    made = plan(csr)
    counts = np.diff(made.indptr)
    for count in np.unique(counts[counts > 0]).tolist():
        step = max(1, _BUFFER_ELEMENTS // (heads * count * BLOCK * width))
        rows = np.flatnonzero(counts == count)
        entries = made.indptr[rows][:, None] + np.arange(count)
        looks, cols = made.look[entries], made.cols[entries]
        for alike in _groups(looks, step):
            shared = made.tiles is not None and bool((looks[alike] == looks[alike[0]]).all())
            for start in range(0, len(alike), step):
                part = alike[start : start + step]
                mask = None
                if (looks[part] != FULL).any():
                    mask = _mask(csr, made, rows[part], cols[part], looks[part], shared)
                yield Batch(_evenly(rows[part]), cols[part], mask)


def _groups(looks: NDArray[np.int64], step: int) -> list[NDArray[np.int64]]:
    """Rows that look alike together, so that they share a mask; the odd ones at the end."""
    whole = (looks == FULL).all(1)
    groups = [np.flatnonzero(whole)] if whole.any() else []
    rest = np.flatnonzero(~whole)
    if not len(rest):
        return groups
    _, group, size = np.unique(looks[rest], axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    enough = min(step, 4)
    groups += [rest[group == x] for x in np.flatnonzero(size >= enough)]
    odd = rest[size[group] < enough]
    return groups + ([odd] if len(odd) else [])


def _mask(
    csr: BlockCSR,
    made: Looks,
    rows: NDArray[np.int64],
    cols: NDArray[np.int64],
    looks: NDArray[np.int64],
    shared: bool,
) -> Tensor:
    if made.tiles is None:
        return csr.entry_masks(rows, cols)
    looks = looks[:1] if shared else looks
    # Row U of the table stands for FULL.
    table = torch.cat([made.tiles, torch.ones(1, BLOCK, BLOCK, dtype=torch.bool)])
    picked = table[torch.from_numpy(looks)]  # [T, S, BLOCK, BLOCK]; -1 is the last row
    return picked.transpose(1, 2).flatten(2)


def _evenly(rows: NDArray[np.int64]) -> slice | Tensor:
    if len(rows) == 1:
        return slice(int(rows[0]), int(rows[0]) + 1)
    gaps = np.diff(rows)
    if (gaps == gaps[0]).all():
        return slice(int(rows[0]), int(rows[-1]) + 1, int(gaps[0]))
    return torch.from_numpy(rows)


class _Keys:
    """Key blocks of `[Z, blocks, BLOCK, D]` for one batch after another."""

    def __init__(self, x: Tensor) -> None:
        self.x = _blocked(x, BLOCK)
        self.buffer = self.x.new_empty(0)

    def take(self, cols: NDArray[np.int64]) -> Tensor:
        """The keys of a batch, `[Z, T, S * BLOCK, D]`: in place where they lie evenly."""
        tiles, count = cols.shape
        z, _, size, d = self.x.shape
        apart = int(cols[1, 0] - cols[0, 0]) if tiles > 1 else 0
        run = cols[0, 0] + np.arange(count)
        if apart >= 0 and (cols == run + apart * np.arange(tiles)[:, None]).all():
            stride = self.x.stride()
            return self.x.as_strided(
                (z, tiles, count * size, d),
                (stride[0], apart * stride[1], stride[2], stride[3]),
                self.x.storage_offset() + int(cols[0, 0]) * stride[1],
            )
        shape = (z, tiles * count, size, d)
        total = z * tiles * count * size * d
        if self.buffer.numel() < total:
            self.buffer = self.x.new_empty(total)
        out = self.buffer[:total].view(shape)
        torch.index_select(self.x, 1, torch.from_numpy(cols.ravel()), out=out)
        return out.view(z, tiles, count * size, d)


def _blocked(x: Tensor, size: int) -> Tensor:
    """`[Z, L, D]` as `[Z, blocks, size, D]`, padded with zeros to whole blocks."""
    short = -x.shape[1] % size
    x = torch.nn.functional.pad(x, (0, 0, 0, short)) if short else x.contiguous()
    return x.unflatten(1, (-1, size))


def forward(csr: BlockCSR, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over a lowered layout: q `[Z, G, n, D]`, k, v `[Z, m, .]`.

    Returns:
        out `[Z, G, n, Dv]` and lse `[Z, G, n]`; a row that sees nothing is 0 and -inf.
    """
    z, g, n, _ = q.shape
    qb = _blocked(q.flatten(0, 1), BLOCK)
    keys, values = _Keys(k), _Keys(v)
    out = q.new_zeros(z * g, qb.shape[1], BLOCK, v.shape[-1])
    lse = q.new_full(out.shape[:3], -torch.inf, dtype=wide(q.dtype))
    for batch in batches(csr, z, k.shape[-1]):
        kt, vt = keys.take(batch.cols), values.take(batch.cols)
        mask = None if batch.mask is None else additive(batch.mask, q.dtype)[None]
        for head in range(g):
            pick = (slice(head, None, g), batch.rows)
            o, s = flash_forward(qb[pick], kt, vt, scale, mask)
            out[pick] = o
            lse[pick] = s
    return out.flatten(1, 2)[:, :n].unflatten(0, (z, g)), lse.flatten(1, 2)[:, :n].unflatten(
        0, (z, g)
    )


def backward(
    csr: BlockCSR,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, wide; shapes as `forward`."""
    z, g, n, d = q.shape
    m, acc = k.shape[1], wide(q.dtype)
    qb, gb, ob = (_blocked(x.flatten(0, 1), BLOCK) for x in (q, grad_out, out))
    sb = _blocked(lse.flatten(0, 1)[..., None], BLOCK)[..., 0]
    db = None if grad_lse is None else _blocked(grad_lse.flatten(0, 1)[..., None], BLOCK)[..., 0]
    keys, values = _Keys(k), _Keys(v)
    dq = torch.zeros(qb.shape, dtype=acc)
    dk, dv = torch.zeros(keys.x.shape, dtype=acc), torch.zeros(values.x.shape, dtype=acc)
    for batch in batches(csr, z, d):
        kt, vt = keys.take(batch.cols), values.take(batch.cols)
        mask = None if batch.mask is None else additive(batch.mask, q.dtype)[None]
        cols = torch.from_numpy(batch.cols.ravel())
        for head in range(g):
            pick = (slice(head, None, g), batch.rows)
            dlse = None if db is None else db[pick]
            a, b, c = flash_backward(
                gb[pick], dlse, qb[pick], kt, vt, ob[pick], sb[pick], scale, mask
            )
            dq[pick] = a.to(acc)
            # On the CPU index_add_ is sequential: the same bits every time.
            dk.index_add_(1, cols, b.to(acc).reshape(z, -1, BLOCK, d))
            dv.index_add_(1, cols, c.to(acc).reshape(z, -1, BLOCK, v.shape[-1]))
    return (
        dq.flatten(1, 2)[:, :n].unflatten(0, (z, g)),
        dk.flatten(1, 2)[:, :m],
        dv.flatten(1, 2)[:, :m],
    )


def seen(csr: BlockCSR) -> tuple[Tensor, Tensor]:
    """Which queries see some key, bool `[n]`, and which keys some query sees, bool `[m]`."""
    n, m = csr.frame.n, csr.frame.m
    queries = torch.zeros(csr.shape[0], BLOCK, dtype=torch.bool)
    keys = torch.zeros(csr.shape[1], BLOCK, dtype=torch.bool)
    made = plan(csr)
    rows = np.repeat(np.arange(csr.shape[0]), np.diff(made.indptr))
    full = made.look == FULL
    queries[torch.from_numpy(rows[full])] = True
    keys[torch.from_numpy(made.cols[full])] = True
    rows, cols, looks = rows[~full], made.cols[~full], made.look[~full]
    for start in range(0, len(rows), _PARTIAL_AT_ONCE):
        part = slice(start, start + _PARTIAL_AT_ONCE)
        r, c = rows[part], cols[part]
        masks = (
            csr.entry_masks(r, c[:, None])
            if made.tiles is None
            else made.tiles[torch.from_numpy(looks[part])]
        )
        # Rows repeat: several blocks may show one query something.
        for mask, row, col in zip(masks, r.tolist(), c.tolist(), strict=True):
            queries[row] |= mask.any(1)
            keys[col] |= mask.any(0)
    return queries.flatten()[:n], keys.flatten()[:m]
