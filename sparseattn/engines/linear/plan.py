"""What a sweep over one run does in which order, and the decay it applies on the way.

A sweep walks along positions in steps. A step serves queries, keys or both, and holds `chunks`
chunks of `size` positions: pairs within a chunk are weighed one by one, all pairs across chunks go
through a state `sum_j phi(k_j) v_j^T`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import wide, widest
from ...runs import trim_future

# Measured on CPU (Zen 4, 8 heads of width 64): chunks of 64 lead at 64 and at 256 features, and
# steps are fastest while the states of their chunks stay near 1 MiB. An accelerator wants fewer and
# larger steps.
CHUNK = 64
MOST_CHUNKS = 32
_CPU_STATE_ELEMENTS = 17 * 2**14
_DEVICE_STATE_ELEMENTS = 2**24


# Calls of so few pairs, and rows, are evaluated in float64 where their inputs are float32.
_EXACT_PAIRS = 2**18
_EXACT_ROWS = 2**12
_MANY_KEYS = 256


def exactly(call: AttentionCall) -> bool:
    """Whether to evaluate a run in float64, for float32 inputs.

    In a short run an error is that of a few numbers: the definition in float32 may hit them to the
    last digit by luck (a weight of exactly 1, say), which no sum in another order can promise to
    match. There the wider arithmetic costs nothing that a user would notice.
    """
    few = call.n * call.m <= _EXACT_PAIRS and call.n + call.m <= _EXACT_ROWS
    return few and call.dtype == torch.float32 and widest(call.device) == torch.float64


def finely(call: AttentionCall) -> torch.dtype:
    """The dtype of products with the state, for the features of `wide(call.dtype)`.

    Where every query sees many keys, the definition in float32 errs little: its errors, one a key,
    average. Those of a product with the state do not.
    """
    many = not call.causal or int(call.offset) >= _MANY_KEYS
    if many and call.dtype == torch.float32:
        return widest(call.device)
    return wide(call.dtype)


class Step(NamedTuple):
    """Positions `start` to `stop - 1`, as `chunks` chunks of `size`; whose rows it serves.

    Where `facing` is not 0, the queries at those positions see all of the keys 0 to `facing - 1`,
    as one chunk: in short calls that are not causal.
    """

    start: int
    chunks: int
    size: int
    queries: bool
    keys: bool
    facing: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.chunks * self.size

    @property
    def key_size(self) -> int:
        """Keys in a chunk."""
        return self.facing or self.size

    @property
    def key_rows(self) -> slice:
        """The step's keys, as rows of k."""
        return slice(0, self.facing) if self.facing else slice(self.start, self.stop)


def state_elements(device: torch.device) -> int:
    """How many elements the states of one step may have together."""
    return _CPU_STATE_ELEMENTS if device.type == "cpu" else _DEVICE_STATE_ELEMENTS


def _cut(start: int, stop: int, chunks: int, queries: bool, keys: bool) -> Iterator[Step]:
    """Full steps, then one of the full chunks left over, then one of the rows left over."""
    both = queries and keys
    while start < stop:
        full = min(chunks, (stop - start) // CHUNK)
        size = CHUNK if full else stop - start
        step = Step(start, full or 1, size, queries, keys)
        if not both:  # nothing is weighed pair by pair: one chunk
            step = Step(start, 1, step.stop - start, queries, keys)
        yield step
        start = step.stop


def plan(call: AttentionCall, chunks: int) -> list[Step]:
    """The steps of one run, in an order in which each query comes after all keys that it sees.

    Keys after the last query and queries before the first key are in no step.

    Args:
        call: of a run alone: `call.offset` is an int.
        chunks: how many chunks a step may hold.
    """
    first, last = int(call.offset), int(call.offset) + call.n
    keys = trim_future(call)
    if not call.causal and keys <= 2 * CHUNK and call.n <= chunks * CHUNK:
        return [Step(first, 1, call.n, True, True, facing=keys)]
    if not call.causal:
        return [*_cut(0, keys, chunks, False, True), *_cut(first, last, chunks, True, False)]
    first = max(first, 0)
    steps = [*_cut(0, min(first, keys), chunks, False, True)]
    if first > keys:  # nothing stands between, but a decay goes on
        steps.append(Step(keys, 1, first - keys, False, False))
    steps += _cut(first, keys, chunks, True, True)
    steps += _cut(max(first, keys), last, chunks, True, False)
    return steps


class Decay:
    """Powers of each query head's decay gamma, of distances alone, so that none overflows.

    Computed in float64 and rounded once: a rounded `gamma ** size` would drift, multiplied chunk
    after chunk.
    """

    def __init__(self, gamma: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self._gamma = gamma.detach().to("cpu", torch.float64)
        self._dtype, self._device = dtype, device
        self._held: dict[tuple[str, int], Any] = {}

    def _to(self, x: Tensor) -> Tensor:
        return x.to(self._device, self._dtype)

    def _powers(self, exponents: Tensor) -> Tensor:
        return self._gamma.view(-1, *[1] * exponents.ndim) ** exponents

    def within(self, size: int) -> Tensor:
        """`gamma ** (i - j)` for the pairs of a chunk, 0 where j > i: `[1, Hq, 1, size, size]`."""
        held = self._held.get(("within", size))
        if held is None:
            rows = torch.arange(size, device="cpu")
            distance = (rows[:, None] - rows).clamp(min=0)
            held = self._to(self._powers(distance).tril_()[None, :, None])
            self._held["within", size] = held
        return held

    def since_start(self, size: int) -> Tensor:
        """`gamma ** r` for row r of a chunk: `[1, Hq, 1, size, 1]`."""
        held = self._held.get(("start", size))
        if held is None:
            rows = torch.arange(size, device="cpu")
            held = self._to(self._powers(rows)[None, :, None, :, None])
            self._held["start", size] = held
        return held

    def until_end(self, size: int) -> Tensor:
        """`gamma ** (size - r)` for row r of a chunk: `[1, Hq, 1, size, 1]`."""
        held = self._held.get(("end", size))
        if held is None:
            rows = torch.arange(size, 0, -1, device="cpu")
            held = self._to(self._powers(rows)[None, :, None, :, None])
            self._held["end", size] = held
        return held

    def across(self, size: int) -> Tensor:
        """`gamma ** size`, what a chunk leaves of the state: float64 `[1, Hq, 1, 1]`."""
        held = self._held.get(("across", size))
        if held is None:
            exact = (self._gamma**size)[None, :, None, None]
            held = self._held["across", size] = exact.to(self._device, widest(self._device))
        return held
