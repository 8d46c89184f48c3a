"""A call cut into runs: rectangles of queries and keys with neither padding nor packing.

Padding and packing are invisible by construction: an engine serves each run as if it stood alone.
Cutting reads mask values on the host, so it belongs inside an operator, never in traced code.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from .arguments import check_contiguous_runs
from .call import AttentionCall


class Run(NamedTuple):
    """A rectangle of a call: rows of the batch, a range of queries, a range of keys.

    Attributes:
        batch, queries, keys: slices into B, N and M. `keys` starts at the run's first allowed key,
            which is position 0, and ends after its last allowed one.
        offset: the position of the run's first query; negative where it stands before every key.
        holes: bool `[b, m]` of allowed keys within the run, or None where all are.
    """

    batch: slice
    queries: slice
    keys: slice
    offset: int
    holes: Tensor | None

    @property
    def n(self) -> int:
        return self.queries.stop - self.queries.start

    @property
    def m(self) -> int:
        return self.keys.stop - self.keys.start

    def subcall(self, call: AttentionCall) -> AttentionCall:
        """The call of this run alone: no segments, `key_mask` only where there are holes."""
        cut_off = isinstance(call.q_offset, Tensor) or (
            (self.n, self.m, self.offset) != (call.n, call.m, call.q_offset)
        )
        if call.key_mask is None and call.q_segments is None and not cut_off:
            return call  # which is its one run
        bias = call.bias
        if bias is not None:
            bias = bias if bias.shape[0] == 1 else bias[self.batch]
            bias = bias if bias.shape[2] == 1 else bias[:, :, self.queries]
            bias = bias[..., self.keys]
        selection = call.selection
        if selection is not None:
            selection = selection[self.batch, :, self.queries]
        return call.replace(
            batch=self.batch.stop - self.batch.start,
            n=self.n,
            m=self.m,
            q_offset=self.offset,
            key_mask=self.holes,
            q_segments=None,
            kv_segments=None,
            bias=bias,
            selection=selection,
        )


def cut(call: AttentionCall) -> list[Run]:
    """The runs of a call that have both queries and allowed keys, in order of batch and position.

    Rows of the batch that are alike and adjacent share a run. Queries and keys in no run see, and
    are seen by, nothing.

    Raises:
        InvalidInputError: segment ids are not in contiguous runs.
    """
    if call.n == 0 or call.m == 0 or call.batch == 0:
        return []
    if call.q_segments is not None:
        return _merge(call, _packed(call))
    if call.key_mask is None and not isinstance(call.q_offset, Tensor):
        whole = slice(0, call.batch), slice(0, call.n), slice(0, call.m)
        return [Run(*whole, int(call.offset), None)]
    offset = call.offset
    offsets = offset.tolist() if isinstance(offset, Tensor) else [offset] * call.batch
    mask = None if call.key_mask is None else call.key_mask.cpu().numpy()
    rows = []
    for b, off in enumerate(offsets):
        if (piece := _piece(mask, b, 0, call.m)) is not None:
            start, stop, holes = piece
            rows.append((b, 0, call.n, start, stop, off - start, holes))
    return _merge(call, rows)


# (batch row, query start, query stop, key start, key stop, offset, has holes)
_Row = tuple[int, int, int, int, int, int, bool]


def _piece(mask: np.ndarray | None, b: int, start: int, stop: int) -> tuple[int, int, bool] | None:
    """The allowed span of keys `start:stop` of row b, and whether it has holes."""
    if mask is None:
        return (start, stop, False) if stop > start else None
    allowed = np.flatnonzero(mask[b, start:stop])
    if allowed.size == 0:
        return None
    first, last = int(allowed[0]), int(allowed[-1])
    return start + first, start + last + 1, allowed.size != last - first + 1


def _runs_of(ids: np.ndarray) -> list[tuple[int, int]]:
    """The stretches of equal ids, as (start, stop); one empty stretch where there are none."""
    cuts = np.concatenate(([0], np.flatnonzero(ids[1:] != ids[:-1]) + 1, [len(ids)]))
    return list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))


def _packed(call: AttentionCall) -> list[_Row]:
    assert call.q_segments is not None and call.kv_segments is not None
    # Traced code could not read the values when the call was validated.
    check_contiguous_runs("q_segments", call.q_segments)
    if call.kv_segments is not call.q_segments:
        check_contiguous_runs("kv_segments", call.kv_segments)
    q_all, k_all = call.q_segments.cpu().numpy(), call.kv_segments.cpu().numpy()
    mask = None if call.key_mask is None else call.key_mask.cpu().numpy()
    rows: list[_Row] = []
    for b in range(call.batch):
        keys = {int(k_all[b, start]): (start, stop) for start, stop in _runs_of(k_all[b])}
        for q_start, q_stop in _runs_of(q_all[b]):
            span = keys.get(int(q_all[b, q_start]))
            if span is None or (piece := _piece(mask, b, *span)) is None:
                continue
            start, stop, holes = piece
            offset = (span[1] - span[0]) - (q_stop - q_start) - (start - span[0])
            rows.append((b, q_start, q_stop, start, stop, offset, holes))
    return rows


def _merge(call: AttentionCall, rows: list[_Row]) -> list[Run]:
    """Join adjacent batch rows whose only run is the same rectangle."""
    count: dict[int, int] = {}
    for row in rows:
        count[row[0]] = count.get(row[0], 0) + 1
    runs: list[Run] = []
    i = 0
    while i < len(rows):
        j = i + 1
        while (
            j < len(rows)
            and rows[j][1:6] == rows[i][1:6]
            and rows[j][0] == rows[j - 1][0] + 1
            and count[rows[j][0]] == count[rows[i][0]] == 1
        ):
            j += 1
        b, q_start, q_stop, k_start, k_stop, offset, _ = rows[i]
        batch, keys = slice(b, rows[j - 1][0] + 1), slice(k_start, k_stop)
        holes = None
        if any(row[6] for row in rows[i:j]):
            assert call.key_mask is not None
            holes = call.key_mask[batch, keys]
        runs.append(Run(batch, slice(q_start, q_stop), keys, offset, holes))
        i = j
    return runs


def trim_future(call: AttentionCall) -> int:
    """How many of a run's keys any query can reach: under causal, none after the last query."""
    if not call.causal:
        return call.m
    return max(0, min(call.m, int(call.offset) + call.n))


__all__ = ["Run", "cut", "trim_future"]
