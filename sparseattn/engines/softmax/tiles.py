"""Selected blocks of keys, served from the side of the blocks.

All queries of a head that chose a block form tiles of one size against it, on torch's fused CPU
kernel; what the blocks of one query gave is then merged by its log normalisers. A query's numbers
depend on no later query: queries stand in order, so its place in its tile is counted from earlier
ones, and the merge is row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...call import AttentionCall
from ...digits import all_finite, wide
from .primitive import additive, flash_backward, flash_forward, weighted_sums

# Numbers of one gathered buffer of queries (4 MiB in float32), and of the parts that are merged
# together: with more of them tiles are better filled, with fewer they take less memory.
_BUFFER_ELEMENTS, _PARTS_ELEMENTS = 2**20, 2**23


class Family(NamedTuple):
    """Tiles of one size.

    Attributes:
        members: int64 `[T, size]`, the rows in each tile; the last is repeated where they run out.
        real: bool `[T, size]`, False where repeated. blocks: int64 `[T]`, the block of each tile.
        cut: whether the rows see their block only in part.
    """

    members: Tensor
    real: Tensor
    blocks: Tensor
    cut: bool


class Tiles(NamedTuple):
    """Some rows of one key head against the blocks that they chose.

    Attributes:
        rows: the rows, a slice into G * n. keep: bool `[R, S]`, the choices that show something.
        starts: int64 `[R + 1]`, slots: int64 `[P]`: where in the tiles, which stand one family
            after the other, each choice of a row is.
        seen: int64 `[blocks]`, how many keys of each block some row may see.
    """

    rows: slice
    keep: Tensor
    starts: Tensor
    slots: Tensor
    families: tuple[Family, Family]
    seen: Tensor

    @property
    def size(self) -> int:
        """Rows in all tiles together."""
        return sum(family.members.numel() for family in self.families)


class _Head:
    """The selection of one key head: `G * n` rows, queries of a group one after another."""

    def __init__(self, mechanism: Any, call: AttentionCall, b: int, head: int) -> None:
        assert call.selection is not None
        groups = slice(head * call.groups, (head + 1) * call.groups)
        self.ids = call.selection[b, groups].reshape(-1, call.selection.shape[-1]).numpy()
        self.size, self.call = mechanism.block, call
        self.count = -(-call.m // self.size)
        self.mask = np.zeros(self.count * self.size, dtype=bool)
        self.mask[: call.m] = True if call.key_mask is None else call.key_mask[b].numpy()
        blocks = self.mask.reshape(self.count, self.size)
        self.some: NDArray[np.bool_] = np.any(blocks, axis=1)
        self.whole: NDArray[np.bool_] = np.all(blocks, axis=1)

    def place(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last key position that causality allows some rows."""
        if not self.call.causal:
            return np.full(len(rows), self.call.m - 1)
        return np.minimum(int(self.call.offset) + rows % self.call.n, self.call.m - 1)

    def tiles(self, value_dim: int) -> Iterator[Tiles]:
        """All rows, as many together as bounded memory takes."""
        total, width = self.ids.shape
        step = max(1, _PARTS_ELEMENTS // max(1, width * value_dim))
        step = -(-total // max(1, -(-total // step)))  # slabs of one size
        # Static, as is everything that decides on shapes: what is chosen later changes no bit.
        usual = min(step, total) * min(width, self.count) // max(1, self.count)
        # From 192 rows on the kernel takes them by 64.
        size = 192 if usual >= 768 else 128 if usual >= 192 else 64 if usual >= 64 else 32
        for start in range(0, total, step):
            rows = np.arange(start, min(start + step, total))
            yield self._tile(rows, size)

    def _tile(self, rows: NDArray[np.int64], size: int) -> Tiles:
        ids = self.ids[rows[0] : rows[-1] + 1].astype(np.int64)
        ids[(ids < 0) | (ids >= self.count)] = self.count
        ids.sort(axis=1)
        place = self.place(rows)
        keep = (ids < self.count) & (ids * self.size <= place[:, None])
        keep[:, 1:] &= ids[:, 1:] != ids[:, :-1]  # a set: what is named twice counts once
        keep &= self.some[np.minimum(ids, self.count - 1)]
        row, block = np.nonzero(keep)[0], ids[keep]
        whole = (block * self.size + self.size - 1 <= place[row]) & self.whole[block]
        slots = np.empty(len(row), dtype=np.int64)
        families, taken = [], 0
        for cut in (False, True):
            which = np.flatnonzero(whole != cut)
            # Most blocks are cut by their own queries alone, which are as many as they have keys.
            family, at = self._family(row[which], block[which], min(size, 64) if cut else size, cut)
            slots[which] = at + taken
            taken += family.members.numel()
            families.append(family._replace(members=family.members + int(rows[0])))
        seen = np.zeros(self.count, dtype=np.int64)
        np.maximum.at(seen, block, np.minimum(place[row] - block * self.size + 1, self.size))
        return Tiles(
            slice(int(rows[0]), int(rows[-1]) + 1),
            torch.from_numpy(keep),
            torch.from_numpy(np.concatenate(([0], np.cumsum(keep.sum(1))))),
            torch.from_numpy(slots),
            (families[0], families[1]),
            torch.from_numpy(seen),
        )

    def _family(
        self, row: NDArray[np.int64], block: NDArray[np.int64], size: int, cut: bool
    ) -> tuple[Family, NDArray[np.int64]]:
        """Tiles for some choices, in ascending order of rows, and the slot of each choice."""
        key = block.astype(np.uint16) if self.count < 2**16 else block  # sorted in linear time
        order = np.argsort(key, kind="stable")
        members = np.bincount(block, minlength=self.count)
        tiles = -(-members // size)
        group = np.repeat(np.arange(self.count), tiles)
        nth = np.arange(len(group)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        within = nth[:, None] * size + np.arange(size)
        most = members[group][:, None]
        real = within < most
        at = (np.cumsum(members) - members)[group][:, None] + np.minimum(within, most - 1)
        slots = np.empty(len(row), dtype=np.int64)
        slots[order] = np.flatnonzero(real)
        rows, held, blocks = (torch.from_numpy(x) for x in (row[order][at], real, group))
        return Family(rows, held, blocks, cut), slots

    def hidden(self, tiles: Tiles) -> Tensor:
        """The keys that none of the tiles' rows sees: bool `[blocks * size, 1]`."""
        seen = torch.arange(self.size) < tiles.seen[:, None]
        return ~(seen.flatten() & torch.from_numpy(self.mask))[:, None]

    def mask_of(self, family: Family, dtype: torch.dtype) -> Tensor | None:
        """The additive mask of tiles, `[1, T, size, block]`; None where they see all."""
        if not family.cut:
            return None
        keys = family.blocks[:, None] * self.size + torch.arange(self.size)
        place = torch.from_numpy(self.place(family.members.flatten().numpy()))
        mask = keys[:, None] <= place.view(len(keys), -1, 1)
        return additive(mask & torch.from_numpy(self.mask)[keys][:, None], dtype)[None]


def _batches(tiles: Tiles, width: int) -> Iterator[tuple[Family, slice]]:
    """Families cut into batches that fit the buffer, and their slots."""
    taken = 0
    for family in tiles.families:
        size = family.members.shape[1]
        step = max(1, _BUFFER_ELEMENTS // (size * width))
        for start in range(0, len(family.blocks), step):
            part = slice(start, start + step)
            some = Family(family.members[part], family.real[part], family.blocks[part], family.cut)
            yield some, slice(taken, taken + some.members.numel())
            taken += some.members.numel()


class _Room:
    """One buffer, for one thing after another."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.held = like.new_empty(0, dtype=dtype)

    def rows(self, count: int, width: int) -> Tensor:
        if self.held.numel() < count * width:
            # With room to grow: fresh memory is dear, and what is never touched costs nothing.
            self.held = self.held.new_empty(count * width * 5 // 4)
        return self.held[: count * width].view(count, width)

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """`x[index]`: x `[L, ..., D]`, index `[T, ...]` -> `[1, T, ..., ..., D]`."""
        inner = x.shape[1:]
        out = self.rows(index.numel(), inner.numel()).view(index.numel(), *inner)
        torch.index_select(x, 0, index.reshape(-1), out=out)
        return out.view(1, *index.shape, *inner)


def _blocked(x: Tensor, head: _Head) -> Tensor:
    short = head.count * head.size - x.shape[0]
    return torch.nn.functional.pad(x, (0, 0, 0, short)) if short else x.contiguous()


def _inert(head: _Head, tiles: Tiles, finite: bool, *tensors: Tensor) -> list[Tensor]:
    """Blocks `[count, size, D]`, zero where no row sees them: 0 * NaN is NaN."""
    if not finite:
        hidden = head.hidden(tiles)
        tensors = tuple(x.masked_fill(hidden, 0.0) for x in tensors)
    return [x.unflatten(0, (head.count, head.size)) for x in tensors]


def forward(
    mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Attention over one run: q `[b, Hkv, G, n, D]`, k, v `[b, Hkv, m, .]`.

    Returns:
        out `[b, Hkv, G, n, Dv]` in q's dtype, lse `[b, Hkv, G, n]`.
    """
    acc, value_dim = wide(q.dtype), v.shape[-1]
    out = q.new_zeros(*q.shape[:4], value_dim)
    lse = q.new_full(q.shape[:4], -torch.inf, dtype=acc)
    finite = all_finite(k, v)
    q_room, k_room, v_room, parts_room = (_Room(q, x) for x in (*(q.dtype,) * 3, acc))
    for b in range(call.batch):
        for h in range(call.kv_heads):
            head = _Head(mechanism, call, b, h)
            rows = q[b, h].reshape(-1, q.shape[-1])
            keys, values = (_blocked(x[b, h], head) for x in (k, v))
            o, s = out[b, h].view(-1, value_dim), lse[b, h].view(-1)
            for tiles in head.tiles(value_dim):
                kb, vb = _inert(head, tiles, finite, keys, values)
                parts, norms = parts_room.rows(tiles.size, value_dim), lse.new_empty(tiles.size)
                for some, where in _batches(tiles, max(q.shape[-1], value_dim)):
                    mixed, norm = flash_forward(
                        q_room.take(rows, some.members),
                        k_room.take(kb, some.blocks),
                        v_room.take(vb, some.blocks),
                        call.scale,
                        head.mask_of(some, q.dtype),
                    )
                    parts[where] = mixed.flatten(0, 2)
                    norms[where] = norm.flatten()
                weights = lse.new_full(tiles.keep.shape, -torch.inf)
                weights.masked_scatter_(tiles.keep, norms[tiles.slots])
                top = weights.amax(1, keepdim=True)
                top.masked_fill_(top == -torch.inf, 0.0)
                total = weights.sub_(top).exp_().sum(1, keepdim=True)
                weights /= total.masked_fill(total == 0, 1.0)
                merged = weighted_sums(tiles.starts, tiles.slots, parts, weights[tiles.keep])
                o[tiles.rows] = merged.to(q.dtype)
                s[tiles.rows] = total.log_().add_(top)[:, 0]  # log(0) = -inf: an empty row
    return out, lse


def backward(
    mechanism: Any,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, wide; shapes as `forward`."""
    acc, width = wide(q.dtype), q.shape[-1]
    dq, dk, dv = (torch.zeros(x.shape, dtype=acc) for x in (q, k, v))
    finite = all_finite(k, v)
    q_room, k_room, v_room, g_room, o_room = (_Room(q, q.dtype) for _ in range(5))
    parts_room = _Room(q, acc)
    for b in range(call.batch):
        for h in range(call.kv_heads):
            head = _Head(mechanism, call, b, h)
            rows, g, o = (x[b, h].reshape(-1, x.shape[-1]) for x in (q, grad_out, out))
            s = lse[b, h].reshape(-1)
            t = None if grad_lse is None else grad_lse[b, h].reshape(-1)
            keys, values = (_blocked(x[b, h], head) for x in (k, v))
            sums = [x.new_zeros(head.count, head.size, x.shape[-1], dtype=acc) for x in (k, v)]
            for tiles in head.tiles(max(width, v.shape[-1])):
                kb, vb = _inert(head, tiles, finite, keys, values)
                parts = parts_room.rows(tiles.size, width)
                for some, where in _batches(tiles, max(width, v.shape[-1])):
                    index, again = some.members, ~some.real  # a repeated row passes nothing on
                    grads = flash_backward(
                        g_room.take(g, index).masked_fill_(again[..., None], 0.0),
                        None if t is None else t[index].masked_fill_(again, 0.0)[None],
                        q_room.take(rows, index),
                        k_room.take(kb, some.blocks),
                        v_room.take(vb, some.blocks),
                        o_room.take(o, index),
                        s[index][None],
                        call.scale,
                        head.mask_of(some, q.dtype),
                    )
                    parts[where] = grads[0].flatten(0, 2)
                    # On the CPU index_add_ is sequential: the same bits every time.
                    for total, grad in zip(sums, grads[1:], strict=True):
                        total.index_add_(0, some.blocks, grad[0].to(acc))
                dq[b, h].view(-1, width)[tiles.rows] = weighted_sums(
                    tiles.starts, tiles.slots, parts, None
                )
            dk[b, h], dv[b, h] = (x.flatten(0, 1)[: call.m] for x in sums)
    return dq, dk, dv
