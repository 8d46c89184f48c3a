"""Ranking of keys and blocks that no device, length or cut of the queries can change."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import sparseattn as sa

_SLAB_ELEMENTS = 2**21  # scores held together: some 60 MiB with what ranking them takes
_LEAST, _BELOW = -(2**31), 2**23 - 1  # -inf is the number _LEAST + _BELOW
_GROUP = 16


def slabs(n: int, per_row: int) -> Iterator[tuple[int, int]]:
    """Ranges of the n queries whose scores, `per_row` a query, fit in bounded memory."""
    # Traced lengths are symbols: one slab keeps them so.
    rows = n if torch.compiler.is_compiling() else max(1, _SLAB_ELEMENTS // max(per_row, 1))
    for start in range(0, n, max(rows, 1)):
        yield start, min(start + rows, n)


def positions(call: sa.AttentionCall, start: int, stop: int) -> Tensor:
    """The positions of some queries, int64 `[n]`."""
    return torch.arange(start, stop, device=call.device) + call.offset


def grouped(q: Tensor, k: Tensor) -> Tensor:
    """`q . k` in float64, for grouped heads: `[B, Hq, n, D]`, `[B, Hkv, m, D]` -> `[B, Hq, n, m]`.

    Matrix products add in an order that depends on shape and device, so equal keys may get scores
    that differ in the last bits. In float64 those bits are far below what `best` compares.
    """
    b, hq, n, d = q.shape
    hkv, m = k.shape[1], k.shape[2]
    folded = q.to(torch.float64).reshape(b, hkv, hq // max(hkv, 1) * n, d)
    return (folded @ k.to(torch.float64).transpose(-1, -2)).reshape(b, hq, n, m)


def logits(q: Tensor, k: Tensor, call: sa.AttentionCall, start: int, stop: int) -> Tensor:
    """The call's logits of queries `start:stop`, float64 `[B, Hq, n, m]`, before any mask."""
    scores = grouped(q[:, :, start:stop], k).mul_(call.scale)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        bias = call.bias if call.bias.shape[2] == 1 else call.bias[:, :, start:stop]
        scores = scores + bias.to(torch.float64)
    return scores


def allowed(call: sa.AttentionCall, start: int, stop: int) -> Tensor:
    """The pairs that the call's masks allow queries `start:stop`: bool `[B or 1, 1, n, m]`."""
    i = positions(call, start, stop)
    j = torch.arange(call.m, device=call.device)
    mask = (j <= i[:, None]) if call.causal else torch.ones_like(j <= i[:, None])
    mask = mask[None, None]
    return mask if call.key_mask is None else mask & call.key_mask[:, None, None, :]


def best(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The `count` best candidates of each row, in any order: int32 `[..., min(count, S)]`.

    Scores are compared in float32; ties go to the lowest index; -1 pads where candidates run out. A
    NaN ranks above every number, so that it stays visible in what the selection is used for.

    Args:
        scores: `[..., S]`, floating point.
        candidates: bool, broadcastable to `scores`. Nothing else is ever chosen.
    """
    size = scores.shape[-1]
    count = min(count, size)
    rank = scores.to(torch.float32) + 0.0  # -0.0 and 0.0 are one number with two patterns of bits
    plain = scores.device.type == "cpu" and count > 0 and scores.numel() > 0 and _is_plain(rank)
    if not plain or bool(rank.sum().isnan()):
        rank = rank.masked_fill(rank.isnan(), torch.nan)
    bits = rank.view(torch.int32)
    # Negative floats order backwards as integers: flip all but their sign.
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    index = torch.arange(size, device=scores.device)
    # No float is so low, and no two of these are equal where numpy partitions.
    least = (_LEAST + index % _BELOW).to(torch.int32)
    if plain:
        _drop(ordered, candidates, least)
        chosen = _greatest(ordered.view(-1, size).numpy(), count)
        return torch.from_numpy(chosen).view(*scores.shape[:-1], count)
    ordered = torch.where(candidates, ordered, least)
    # One integer holds the score and, below it, the index: no two are equal, so topk has no choice.
    top = (ordered.to(torch.int64) * 2**32 + index.flip(0)).topk(count, dim=-1).values
    chosen = size - 1 - (top & (2**32 - 1))
    return chosen.masked_fill(top >> 32 < _LEAST + _BELOW, -1).to(torch.int32)


def _drop(ordered: Tensor, candidates: Tensor, least: Tensor) -> None:
    """Put `least` in place of all that are no candidates, where columns have any such."""
    candidates = candidates.expand(*candidates.shape[:-1], len(least))
    columns = (~candidates.reshape(-1, len(least)).all(0)).nonzero()
    if len(columns):
        some = slice(int(columns[0]), int(columns[-1]) + 1)
        part = ordered[..., some]
        part.copy_(torch.where(candidates[..., some], part, least[some]))


def _is_plain(x: Tensor) -> bool:
    """Whether numpy can read a tensor: neither while tracing nor under vmap."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and not _is_wrapped(x)


def _is_wrapped(x: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def _greatest(rank: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """The indices of the `count` greatest of each row `[R, S]`, ascending, -1 last: `[R, count]`.

    Partitions find the least that is chosen, many times as fast as torch's topk on the CPU.
    """
    size = rank.shape[1]
    least = _nth(rank, count)[:, None]
    chosen = rank >= np.maximum(least, _LEAST + _BELOW)
    found = np.count_nonzero(chosen, axis=1)
    tied = np.flatnonzero(found > count)
    if len(tied):
        above, equal = rank[tied] > least[tied], rank[tied] == least[tied]
        left = count - np.count_nonzero(above, axis=1)[:, None]
        chosen[tied] = above | (equal & (np.cumsum(equal, axis=1) <= left))
        found[tied] = count
    return _listed(
        chosen, found, np.broadcast_to(np.arange(size, dtype=np.int32), rank.shape), count, -1
    )


def _listed(
    chosen: NDArray[np.bool_],
    found: NDArray[np.int64],
    values: NDArray[np.int32],
    width: int,
    fill: int,
) -> NDArray[np.int32]:
    """The chosen values of each row side by side: `[R, width]`, filled up with `fill`."""
    out = np.full((len(chosen), width), fill, dtype=np.int32)
    out[np.arange(width) < found[:, None]] = values[chosen]
    return out


def _nth(rank: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """The `count`-th greatest number of each row `[R, S]`."""
    rows, size = rank.shape
    groups = size // _GROUP
    if groups >= 2 * count:
        # As many groups have a number of at least this, so the wanted one is no less; few are left.
        tops = rank[:, : groups * _GROUP].reshape(rows, groups, _GROUP).max(2)
        some = rank >= np.partition(tops, groups - count, axis=1)[:, groups - count, None]
        found = np.count_nonzero(some, axis=1)
        width = int(found.max())
        if width <= size // 2:
            rank, size = _listed(some, found, rank, width, _LEAST), width
    return np.partition(rank, size - count, axis=1)[:, size - count]
