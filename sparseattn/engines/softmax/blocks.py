"""Block layouts in a few large calls: query blocks with equally many key blocks run together.

Key blocks are gathered into a buffer that stays in cache; blocks that are only partly visible bring
a mask that all heads share. Nothing is padded to a common width, so time follows the density.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...layout import BlockCSR
from .primitive import additive, flash_backward, flash_forward, wide

BLOCK = 64
# Elements of one gathered buffer of keys: 2 MiB in float32, so that it stays in cache.
_BUFFER_ELEMENTS = 2**19


class Batch(NamedTuple):
    """Some rows of a layout with the same number of key blocks.

    Attributes:
        rows: int64 `[T]`, query blocks. cols: int64 `[T * S]`, their key blocks, row after row.
        mask: bool `[T, BLOCK, S * BLOCK]`, or None where all is visible.
    """

    rows: Tensor
    cols: Tensor
    mask: Tensor | None


def batches(csr: BlockCSR, heads: int, width: int) -> Iterator[Batch]:
    """Cut a lowered layout into batches whose gathered keys fit the buffer."""
    counts = np.diff(csr.indptr)
    ragged = csr.frame.m % csr.frame.key_block != 0
    last = csr.shape[1] - 1
    whole = np.ones(len(counts), dtype=bool)
    partial = ~csr.full
    if ragged:  # the last key block ends in padding, which no query may see
        partial = partial | (csr.indices == last)
    whole[np.unique(csr.row_ids()[partial])] = False
    for count in np.unique(counts[counts > 0]).tolist():
        per_row = heads * count * csr.frame.key_block * width
        step = max(1, _BUFFER_ELEMENTS // per_row)
        for kind in (True, False):
            rows = np.flatnonzero((counts == count) & (whole == kind))
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                cols = csr.indices[csr.indptr[part][:, None] + np.arange(count)].astype(np.int64)
                mask = None if kind else csr.entry_masks(part, cols)
                yield Batch(torch.from_numpy(part), torch.from_numpy(cols.ravel()), mask)


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
    size = csr.frame.query_block
    qb = _blocked(q.flatten(0, 1), size)
    kb, vb = _blocked(k, size), _blocked(v, size)
    out = q.new_zeros(z * g, qb.shape[1], size, v.shape[-1])
    lse = q.new_full(out.shape[:3], -torch.inf, dtype=wide(q.dtype))
    for batch in batches(csr, z, k.shape[-1]):
        tiles = len(batch.rows)
        kt = kb.index_select(1, batch.cols).view(z, tiles, -1, k.shape[-1])
        vt = vb.index_select(1, batch.cols).view(z, tiles, -1, v.shape[-1])
        mask = None if batch.mask is None else additive(batch.mask, q.dtype)[None]
        for head in range(g):
            o, s = flash_forward(qb[head::g, batch.rows], kt, vt, scale, mask)
            out[head::g, batch.rows] = o
            lse[head::g, batch.rows] = s
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
    m, acc, size = k.shape[1], wide(q.dtype), csr.frame.query_block
    qb, gb, ob = (_blocked(x.flatten(0, 1), size) for x in (q, grad_out, out))
    sb = _blocked(lse.flatten(0, 1)[..., None], size)[..., 0]
    db = None if grad_lse is None else _blocked(grad_lse.flatten(0, 1)[..., None], size)[..., 0]
    kb, vb = _blocked(k, size), _blocked(v, size)
    dq = torch.zeros(qb.shape, dtype=acc)
    dk, dv = torch.zeros(kb.shape, dtype=acc), torch.zeros(vb.shape, dtype=acc)
    for batch in batches(csr, z, d):
        tiles = len(batch.rows)
        kt = kb.index_select(1, batch.cols).view(z, tiles, -1, d)
        vt = vb.index_select(1, batch.cols).view(z, tiles, -1, v.shape[-1])
        mask = None if batch.mask is None else additive(batch.mask, q.dtype)[None]
        for head in range(g):
            pick = (slice(head, None, g), batch.rows)
            dlse = None if db is None else db[pick]
            a, b, c = flash_backward(
                gb[pick], dlse, qb[pick], kt, vt, ob[pick], sb[pick], scale, mask
            )
            dq[pick] = a.to(acc)
            # On the CPU index_add_ is sequential: the same bits every time.
            dk.index_add_(1, batch.cols, b.to(acc).reshape(z, -1, size, d))
            dv.index_add_(1, batch.cols, c.to(acc).reshape(z, -1, size, v.shape[-1]))
    return (
        dq.flatten(1, 2)[:, :n].unflatten(0, (z, g)),
        dk.flatten(1, 2)[:, :m],
        dv.flatten(1, 2)[:, :m],
    )


def seen(csr: BlockCSR) -> tuple[Tensor, Tensor]:
    """Which queries see some key, bool `[n]`, and which keys some query sees, bool `[m]`."""
    size, n, m = csr.frame.query_block, csr.frame.n, csr.frame.m
    queries = torch.zeros(csr.shape[0], size, dtype=torch.bool)
    keys = torch.zeros(csr.shape[1], csr.frame.key_block, dtype=torch.bool)
    rows, full = csr.row_ids(), csr.full
    queries[torch.from_numpy(rows[full])] = True
    keys[torch.from_numpy(csr.indices[full].astype(np.int64))] = True
    some_rows, some_cols = rows[~full], csr.indices[~full].astype(np.int64)
    for start in range(0, len(some_rows), 256):
        r, c = some_rows[start : start + 256], some_cols[start : start + 256]
        mask = csr.entry_masks(r, c[:, None])
        # Rows repeat: several blocks may show one query something.
        for at, row, col in zip(range(len(r)), r.tolist(), c.tolist(), strict=True):
            queries[row] |= mask[at].any(1)
            keys[col] |= mask[at].any(0)
    return queries.flatten()[:n], keys.flatten()[:m]
