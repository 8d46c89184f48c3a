"""The softmax engine on a GPU for selections: from chosen ids to lists, and from lists to launches.

A selection names blocks of keys for each query and head. Everything that depends on what is chosen
is made on the device, by sorting, without a read on the host; memory follows the number of chosen
blocks, and nothing of size N x M is formed. The kernels stand in `triton/selected.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import wide
from ...runs import Run
from ..triton_launch import halves, launch

if TYPE_CHECKING:
    from .in_triton import _Launcher
    from .triton.config import Tiles
    from .triton.selected_config import Selected

# Keys in a block from which on a step of a kernel lies within one block, and neighbouring queries
# share a tile.
_WIDE = 16
# Choices that are made into lists together: what that takes besides is bounded.
_CHOICES_AT_ONCE = 2**24


class Places(NamedTuple):
    """Where the blocks of every run lie, and what each query may see; on the call's device.

    Blocks are numbered through all runs.

    Attributes:
        blocks: int32 `[J, 3]`: batch row, first key, and where the run's keys end.
        first, reach: int32 `[B, N]`: the number of the first block of a query's run, and how many
            of its blocks have a key that the query may see. Both are 0 where a query is in no run.
        stops: int32 `[B, N]`: where the keys that it may see end, as a place among M.
    """

    blocks: Tensor
    first: Tensor
    reach: Tensor
    stops: Tensor


class Lists(NamedTuple):
    """What the rows of each tile of queries chose. L = B * head blocks * tiles lists, E wide.

    Attributes:
        at: int32 `[L, E]`, the first key of each block, as a place among M; ascending.
        bits: int32 `[L, E]`, bit r set where row r of the tile chose it.
        counts: int32 `[L]`, how many entries of a list are real.
    """

    at: Tensor
    bits: Tensor
    counts: Tensor


class Members(NamedTuple):
    """Who chose each block: J * Hkv lists, the list of block j and head h being `j * Hkv + h`.

    Attributes:
        order: int64 `[J * Hkv]`, the lists, the longest first.
        starts: int64 `[J * Hkv + 1]`, where each begins in `rows`.
        rows: int32 or int64 `[P]`, `query head * N + query`, in one fixed order.
    """

    order: Tensor
    starts: Tensor
    rows: Tensor


def places(call: AttentionCall, runs: list[Run], block: int) -> Places:
    """The places of a call's blocks of `block` keys."""
    first, reach, stops = (np.zeros((call.batch, call.n), dtype=np.int32) for _ in range(3))
    blocks: list[np.ndarray] = []
    taken = 0
    for run in runs:
        seen = np.full(run.n, run.m, dtype=np.int64)
        if call.causal:
            seen = np.clip(run.offset + 1 + np.arange(run.n), 0, run.m)
        each = -(-run.m // block)
        table = np.empty((each, 3), dtype=np.int32)
        table[:, 1] = run.keys.start + np.arange(each) * block
        table[:, 2] = run.keys.stop
        for batch in range(run.batch.start, run.batch.stop):
            first[batch, run.queries] = taken
            reach[batch, run.queries] = -(-seen // block)
            stops[batch, run.queries] = run.keys.start + seen
            blocks.append(table.copy())
            blocks[-1][:, 0] = batch
            taken += each
    whole = (np.concatenate(blocks), first, reach, stops)
    return Places(*(torch.from_numpy(x).to(call.device) for x in whole))


class Selection:
    """A call's selection, made ready for kernels.

    Args:
        pack: heads of a group in a tile. rows: in a tile. queries: of which are queries.
    """

    def __init__(
        self,
        call: AttentionCall,
        found: Places,
        pack: int,
        rows: int,
        queries: int,
    ) -> None:
        assert call.selection is not None
        self.call, self.found, self.pack, self.rows = call, found, pack, rows
        self.queries, self.heads = queries, call.q_heads // pack
        self.tiles = -(-call.n // queries)
        self.blocks = len(found.blocks)
        self.nothing = self.blocks * rows
        few = self.nothing + rows < 2**31
        ids = call.selection
        first, reach = found.first[:, None, :, None], found.reach[:, None, :, None]
        named = (ids >= 0) & (ids < reach)
        dtype = torch.int32 if few else torch.int64
        codes = torch.where(named, (ids + first).to(dtype) * rows, self.nothing)
        short = self.tiles * queries - call.n
        codes = torch.nn.functional.pad(codes, (0, 0, 0, short), value=self.nothing)
        # [B, head block, head, tile, query, S]: a tile's rows are queries, and heads within each.
        codes = codes.reshape(call.batch, self.heads, pack, self.tiles, queries, ids.shape[-1])
        codes = codes.permute(0, 1, 3, 4, 2, 5)
        row = torch.arange(queries * pack, device=ids.device, dtype=dtype).view(queries, pack, 1)
        codes = torch.where(codes < self.nothing, codes + row, self.nothing)
        self.codes = codes.reshape(-1, queries * pack * ids.shape[-1])
        for part in self._parts():
            self.codes[part] = self.codes[part].sort(-1).values

    def _parts(self) -> list[slice]:
        total, width = self.codes.shape
        step = max(1, _CHOICES_AT_ONCE // width)
        return [slice(start, start + step) for start in range(0, total, step)]

    def lists(self) -> Lists:
        """What each tile's rows chose."""
        total, width = self.codes.shape
        at, bits = (self.codes.new_empty(total, width, dtype=torch.int32) for _ in range(2))
        counts = self.codes.new_empty(total, dtype=torch.int32)
        for part in self._parts():
            codes = self.codes[part]
            block, named = codes // self.rows, codes < self.nothing
            new, once = named.clone(), named.clone()
            new[:, 1:] &= block[:, 1:] != block[:, :-1]
            once[:, 1:] &= codes[:, 1:] != codes[:, :-1]  # a set: a repeat counts once
            slot = (new.cumsum(-1) - 1).masked_fill_(~named, width)  # the last takes what is none
            bit = torch.where(once, torch.ones_like(codes) << (codes % self.rows), 0)
            room = codes.new_zeros(len(codes), width + 1, dtype=torch.int32)
            bits[part] = room.scatter_add(-1, slot, bit.to(torch.int32))[:, :width]
            key = self.found.blocks[:, 1][block.clamp(max=self.blocks - 1).long()]
            at[part] = room.scatter(-1, slot, key)[:, :width]
            counts[part] = new.sum(-1, dtype=torch.int32)
        return Lists(at, bits, counts)

    def members(self) -> Members:
        """Who chose each block."""
        call, codes = self.call, self.codes
        lists, width = codes.shape
        index = torch.arange(lists, device=codes.device)[:, None]
        head_block = index // self.tiles % self.heads
        kv_head = head_block * self.pack // call.groups
        once = codes < self.nothing
        once[:, 1:] &= codes[:, 1:] != codes[:, :-1]
        last = self.blocks * call.kv_heads
        dtype = torch.int32 if last < 2**31 else torch.int64
        where = (codes // self.rows).to(dtype) * call.kv_heads + kv_head.to(dtype)
        where = torch.where(once, where, last).flatten()
        where, order = where.sort(stable=True)
        row = (codes.flatten()[order] % self.rows).long()
        index = order // width
        head = index // self.tiles % self.heads * self.pack + row % self.pack
        query = index % self.tiles * self.queries + row // self.pack
        few = call.q_heads * call.n < 2**31
        rows = (head * call.n + query).to(torch.int32 if few else torch.int64)
        edges = torch.arange(last + 1, device=codes.device, dtype=dtype)
        starts = torch.searchsorted(where, edges)
        return Members(starts.diff().argsort(descending=True, stable=True), starts, rows)


def _pack(call: AttentionCall, rows: int) -> int:
    """Heads of a group that share a tile: as many as divide the group and fit in it."""
    return max(x for x in range(1, rows + 1) if call.groups % x == 0)


def _keys(block: int, most: int) -> tuple[int, int]:
    """Keys in a step, and the places that a block takes in a list of steps.

    Wide blocks take whole steps, as few places as may be; narrow ones stand close together.
    """
    if block < _WIDE:
        return most, block
    sizes = [x for x in (16, 32, 64, 128, 256) if x <= most]
    span, less = min((-(-block // x) * x, -x) for x in sizes)
    return -less, span


class _Selected:
    """The launches of one call; `shared` is what they share with those of static patterns."""

    def __init__(self, shared: _Launcher) -> None:
        self.shared, self.call, self.block = shared, shared.call, shared.mechanism.block
        self.found = places(self.call, shared.runs, self.block)

    def tiles(self) -> Selected:
        from .triton import selected_config

        width = max(self.call.head_dim, self.call.value_dim)
        return selected_config.selected(self.shared.target, self.shared.q.dtype, width)

    def selection(self, tiles: Tiles) -> Selection:
        pack = _pack(self.call, tiles.rows)
        queries = tiles.rows // pack if self.block >= _WIDE else 1
        return Selection(self.call, self.found, pack, tiles.rows, queries)

    def constants(self, tiles: Tiles, **more: Any) -> dict[str, Any]:
        made = self.shared.constants(tiles, band=False)
        for word in ("BAND", "PACK"):
            del made[word]
        return {**made, "BLOCK": self.block, **more}

    def forward(self) -> tuple[Tensor, Tensor]:
        from .triton.selected import forward_selected

        shared, call, q, k, v = self.shared, self.call, self.shared.q, self.shared.k, self.shared.v
        shape = (call.batch, call.q_heads, call.n)
        out = torch.empty(*shape, call.value_dim, dtype=q.dtype, device=q.device)
        lse = torch.empty(shape, dtype=wide(q.dtype), device=q.device)
        tiles = self.tiles().forward
        keys, span = _keys(self.block, tiles.keys)
        chosen = self.selection(tiles)
        lists = chosen.lists()
        launch(
            forward_selected,
            (chosen.tiles, chosen.heads, call.batch),
            *(q, k, v, out, lse, *lists, self.found.stops, shared.key_mask),
            *(stride for x in (q, k, v, out) for stride in x.stride()[:3]),
            *(*lse.stride()[:2], shared.key_mask.stride(0)),
            *(*shared.numbers(), call.head_dim, call.value_dim, call.groups),
            *(call.n, chosen.tiles, lists.at.shape[1]),
            **self.constants(
                tiles._replace(keys=keys), QUERIES=chosen.queries, PACK=chosen.pack, SPAN=span
            ),
        )
        return out, lse

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from .triton.selected import grad_keys_selected, grad_queries_selected

        shared, call, q, k, v = self.shared, self.call, self.shared.q, self.shared.k, self.shared.v
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        # Keys in no run have no gradient.
        dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        delta = torch.empty_like(lse)
        tiles = self.tiles().grad_queries
        keys, span = _keys(self.block, tiles.keys)
        chosen = self.selection(tiles)
        lists = chosen.lists()
        numbers = (*shared.numbers(), *halves(call.scale))
        launch(
            grad_queries_selected,
            (chosen.tiles, chosen.heads, call.batch),
            *(grad_out, q, k, v, out, lse, lse if grad_lse is None else grad_lse, delta, dq),
            *(*lists, self.found.stops, shared.key_mask),
            *(stride for x in (grad_out, q, k, v, out, dq) for stride in x.stride()[:3]),
            *(*lse.stride()[:2], shared.key_mask.stride(0)),
            *(*numbers, call.head_dim, call.value_dim, call.groups),
            *(call.n, chosen.tiles, lists.at.shape[1]),
            LSE_GRAD=grad_lse is not None,
            **self.constants(
                tiles._replace(keys=keys), QUERIES=chosen.queries, PACK=chosen.pack, SPAN=span
            ),
        )
        del lists
        members = chosen.members()
        tiles = self.tiles().grad_keys
        size = 16
        while size < min(self.block, tiles.keys):
            size *= 2
        launch(
            grad_keys_selected,
            (len(members.order), -(-self.block // size)),
            *(grad_out, q, k, v, lse, delta, dk, dv),
            *(self.found.blocks, *members, self.found.stops, shared.key_mask),
            *(stride for x in (grad_out, q, k, v, dk, dv) for stride in x.stride()[:3]),
            *(lse.stride(0), shared.key_mask.stride(0)),
            *(*numbers, call.head_dim, call.value_dim, call.kv_heads, call.n),
            **self.constants(tiles._replace(keys=size)),
        )
        return dq, dk, dv


def _nothing(shared: _Launcher) -> bool:
    """Whether a call has no choice to serve."""
    selection = shared.call.selection
    assert selection is not None
    return not shared.runs or selection.numel() == 0 or shared.call.kv_heads == 0


def forward(shared: _Launcher) -> tuple[Tensor, Tensor]:
    """Out `[B, Hq, N, Dv]` and lse `[B, Hq, N]` of a call that has a selection."""
    call, q = shared.call, shared.q
    if _nothing(shared):
        shape = (call.batch, call.q_heads, call.n)
        out = torch.zeros(*shape, call.value_dim, dtype=q.dtype, device=q.device)
        return out, torch.full(shape, -torch.inf, dtype=wide(q.dtype), device=q.device)
    return _Selected(shared).forward()


def backward(
    shared: _Launcher, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; lse in one piece, and so the last dimension of the others."""
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    if _nothing(shared):
        dq, dk, dv = (torch.zeros_like(x) for x in (shared.q, shared.k, shared.v))
        return dq, dk, dv
    return _Selected(shared).backward(grad_out, grad_lse, out, lse)
