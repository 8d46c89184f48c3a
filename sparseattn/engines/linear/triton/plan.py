"""Tables that tell the kernels which rows they serve: the runs of a call, in one launch each.

Positions of a run are cut into spans, whatever its length, so that a row has the same bits in any
call. Pairs within a span are weighed one by one, tile by tile; all pairs across spans go through a
state, one a span:

- the queries of span s meet `S_s = sum_j gamma ** (start of s - j) phi(k_j) [v_j, 1]^T`, over the
  keys before the span. Queries beyond all spans meet the sum over all keys;
- backward, its keys meet `R_s = sum_i gamma ** (i - end of s) phi(q_i) g_i^T`, over the queries
  after it. Queries beyond all spans are one more part of that sum.

Where a call is not causal, every query meets the sum over all keys, and no pair is weighed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....call import AttentionCall
from ....runs import Run
from ...held import Held

_HELD_BYTES = 64 * 2**20
WORDS = 8  # of a row of a table, but that of runs


class Plan(NamedTuple):
    """Tables of the launches of one call, int64 `[rows, 8]`, on its device.

    Attributes:
        runs: batch row, first query, queries, first key, keys, offset, first slot, spans, parts of
            the sum over queries beyond all spans.
        key_spans, query_spans: run, first row, stop, slot, and the position that powers of a decay
            count from. Rows are of the run; slot is where the sum goes.
        query_tiles, key_tiles: run, first position, slot of the state met, its position, and
            whether that is the state of all keys, or of all queries.
        walks, tails: those query_tiles that meet the state of earlier keys, and of all keys.
        slots: of states.
    """

    runs: Tensor
    key_spans: Tensor
    query_spans: Tensor
    query_tiles: Tensor
    key_tiles: Tensor
    walks: Tensor
    tails: Tensor
    slots: int

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self[:7])


_plans: Held[Plan] = Held(_HELD_BYTES)


def make(call: AttentionCall, runs: list[Run], span: int, rows: int) -> Plan:
    """The plan of a call.

    Args:
        runs: of `cut(call)`; a single one may span several rows of the batch, which are then a
            third axis of the launch, and others are repeated for each of theirs.
        span, rows: positions in a span and in a tile; tiles divide spans.
    """
    if len(runs) != 1:
        return _build(call, runs, span, rows)
    run = runs[0]
    place = (run.batch.start, str(run.queries), str(run.keys), run.offset)
    key = (*place, call.causal, call.device, span, rows)
    return _plans.get(key, lambda: _build(call, runs, span, rows))


def _table(*columns: Any) -> NDArray[np.int64]:
    """Rows of `WORDS` numbers, from columns that broadcast."""
    given = np.broadcast_arrays(*columns)
    made = np.zeros((len(given[0]), WORDS), dtype=np.int64)
    for at, column in enumerate(given):
        made[:, at] = column
    return made


def _steps(start: int, stop: int, size: int) -> NDArray[np.int64]:
    return np.arange(start, max(start, stop), size, dtype=np.int64)


def _build(call: AttentionCall, runs: list[Run], span: int, rows: int) -> Plan:
    tables: list[list[NDArray[np.int64]]] = [[], [], [], [], []]
    slots = count = 0
    for run in runs:
        n, m, offset = run.n, run.m, run.offset
        if call.causal:
            m = max(0, min(m, offset + n))  # no query sees a later key
        spans = -(-m // span)
        reach = spans * span
        starts = _steps(0, m, span)
        own = np.arange(len(starts))
        key_spans = (starts, np.minimum(starts + span, m), own, starts + span)
        if call.causal:
            # Queries before every key see nothing; those beyond the spans are cut into parts.
            tail = _steps(max(0, reach - offset), n, span)
            low, high = np.clip(starts - offset, 0, n), np.clip(starts + span - offset, 0, n)
            position = np.concatenate([starts, np.full(len(tail), reach)])
            first = np.concatenate([low, tail])
            stop = np.concatenate([high, np.minimum(tail + span, n)])
            begin = max(offset, 0) // rows * rows if offset < reach else offset
            at = _steps(begin, offset + n, rows)
            slot = np.minimum(at // span, spans)
            query_tiles = (at, slot, np.minimum(slot * span, reach), slot == spans)
            at = _steps(0, m, rows)
            key_tiles = (at, at // span, (at // span + 1) * span, 0)
        else:
            first = tail = _steps(0, n, span)
            stop, position = np.minimum(tail + span, n), np.zeros(1, dtype=np.int64)
            query_tiles = (_steps(offset, offset + n, rows), spans, 0, 1)  # type: ignore[assignment]
            key_tiles = (_steps(0, m, rows), spans, 0, 1)  # type: ignore[assignment]
        into = np.arange(len(first)) + (0 if call.causal else spans)
        query_spans = (first, stop, into, position)
        size = spans + max(1, len(tail))
        spread = len(runs) > 1
        for batch in range(run.batch.start, run.batch.stop if spread else run.batch.start + 1):
            whole = (batch, run.queries.start, n, run.keys.start, m, offset, slots, spans)
            tables[0].append(np.array([*whole, len(tail)], dtype=np.int64)[None])
            tables[1].append(_table(count, *_moved(key_spans, 2, slots)))
            tables[2].append(_table(count, *_moved(query_spans, 2, slots)))
            tables[3].append(_table(count, *_moved(query_tiles, 1, slots)))
            tables[4].append(_table(count, *_moved(key_tiles, 1, slots)))
            slots, count = slots + size, count + 1
    joined = [np.concatenate(x) for x in tables]
    tail = joined[3][:, 4] != 0
    joined += [joined[3][~tail], joined[3][tail]]
    on = [torch.from_numpy(x).to(call.device) for x in joined]
    return Plan(on[0], on[1], on[2], on[3], on[4], on[5], on[6], slots)


def _moved(columns: tuple[Any, ...], at: int, by: int) -> tuple[Any, ...]:
    """Columns with slots of a run as slots of the call."""
    return *columns[:at], columns[at] + by, *columns[at + 1 :]
