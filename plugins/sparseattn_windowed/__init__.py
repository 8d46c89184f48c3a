"""Static patterns made of bands, steps and chunks: local attention and its relatives.

Positions i (query) and j (key) are absolute: they count from the first key that the call allows and
restart in each packed document. The call's own masks, causality among them, are applied beside what
is written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import sparseattn as sa

_MOST = 2**31 - 1  # tokens in a run; keeps products of two options within int64


def _refuse(mechanism: sa.Mechanism, option: str, value: object, expected: str) -> None:
    raise sa.InvalidInputError(
        f"{mechanism.name}: option {option} got {value!r:.80}, expected {expected}"
    )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST


def _check_count(mechanism: sa.Mechanism, option: str, least: int) -> None:
    value = getattr(mechanism, option)
    if not _is_count(value, least):
        _refuse(mechanism, option, value, f"an int from {least} to {_MOST}")


def _check_window(mechanism: sa.Mechanism) -> None:
    window = mechanism.window  # type: ignore[attr-defined]
    pair = isinstance(window, tuple) and len(window) == 2 and all(_is_count(x, 0) for x in window)
    if not pair and not _is_count(window, 1):
        _refuse(
            mechanism,
            "window",
            window,
            f"an int from 1 to {_MOST} (keys at a smaller distance), or a tuple (left, right) of "
            f"keys before and after the query, each from 0 to {_MOST}",
        )


def _sides(window: int | tuple[int, int]) -> tuple[int, int]:
    """Keys before and after the query, inclusive."""
    return window if isinstance(window, tuple) else (window - 1, window - 1)


@dataclass(frozen=True)
class Windowed(sa.MaskedSoftmax):
    """A sliding window of keys near the query, with attention sinks where wanted.

    `-left <= j - i <= right`, or `j < sinks`. `window=W` means `left = right = W - 1`: causal sees
    W keys, the query's own among them.

        windowed(window=2, sinks=1), causal, 5 queries and keys:
            1 0 0 0 0
            1 1 0 0 0
            1 1 1 0 0
            1 0 1 1 0
            1 0 0 1 1

    Refuses: nothing. Cost: O(N (left + right + sinks)) time; a cache of window + sinks keys.

    Attributes:
        window: W, or (left, right): inclusive counts of keys before and after the query.
        sinks: the first keys of a document, seen by every query at or after them.
    """

    name = "windowed"
    source = (
        "Beltagy et al. 2020, Longformer, section 3.1 (arXiv:2004.05150); Jiang et al. 2023, "
        "Mistral 7B, section 2 (arXiv:2310.06825); sinks: Xiao et al. 2023, StreamingLLM, section "
        "3.2 (arXiv:2309.17453)"
    )

    window: int | tuple[int, int] = 256
    sinks: int = 0

    def __post_init__(self) -> None:
        _check_window(self)
        _check_count(self, "sinks", 0)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        left, right = _sides(self.window)
        return ((-left <= j - i) & (j - i <= right)) | (j < self.sinks)

    def layout(self, grid: sa.Grid) -> sa.Layout:
        return grid.band(*_sides(self.window)) | grid.first_keys(self.sinks)


@dataclass(frozen=True)
class Dilated(sa.MaskedSoftmax):
    """A sliding window with gaps: every `dilation`-th key, `window` of them before the query.

    `(i - j) % dilation == 0` and `abs(i - j) < window * dilation`: causal sees `window` keys.

    Refuses: nothing. Cost: O(N window) pairs, scattered over single keys: correct everywhere, no
    promise of speed.

    Attributes:
        window: keys seen on one side, the query's own included.
        dilation: the distance between them; 1 is `windowed`.
    """

    name = "dilated"
    source = "Beltagy et al. 2020, Longformer, section 3.1 (arXiv:2004.05150)"

    window: int = 256
    dilation: int = 2

    def __post_init__(self) -> None:
        _check_count(self, "window", 1)
        _check_count(self, "dilation", 1)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        near = (i - j).abs() < self.window * self.dilation
        return ((i - j) % self.dilation == 0) & near

    def layout(self, grid: sa.Grid) -> sa.Layout:
        reach = (self.window - 1) * self.dilation  # the farthest multiple below window * dilation
        return grid.step(self.dilation) & grid.band(reach, reach)


@dataclass(frozen=True)
class Chunked(sa.MaskedSoftmax):
    """Chunks of the sequence that see only themselves.

    `i // chunk == j // chunk`. The first query of a chunk sees, under causal, only itself.

    Refuses: nothing. Cost: O(N chunk) time.

    Attributes:
        chunk: positions in a chunk; chunks start at position 0 of each document.
    """

    name = "chunked"
    source = "Meta AI 2025, Llama 4, the layers with chunked local attention"

    chunk: int = 256

    def __post_init__(self) -> None:
        _check_count(self, "chunk", 1)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return i // self.chunk == j // self.chunk

    def layout(self, grid: sa.Grid) -> sa.Layout:
        return grid.chunks(self.chunk)


@dataclass(frozen=True)
class Longformer(sa.MaskedSoftmax):
    """A sliding window, and global tokens that see everything and are seen by everything.

    `-left <= j - i <= right`, or `j < global_tokens`, or `i < global_tokens`. One set of
    projections serves both kinds of pair (the paper trains a second one for the global tokens).

    Refuses: nothing. Cost: O(N (left + right + global_tokens)) time.

    Attributes:
        window: W, or (left, right), as in `windowed`.
        global_tokens: the first positions of a document.
    """

    name = "longformer"
    source = "Beltagy et al. 2020, Longformer, section 3.1 (arXiv:2004.05150)"

    window: int | tuple[int, int] = 256
    global_tokens: int = 1

    def __post_init__(self) -> None:
        _check_window(self)
        _check_count(self, "global_tokens", 0)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        left, right = _sides(self.window)
        near = (-left <= j - i) & (j - i <= right)
        return near | (j < self.global_tokens) | (i < self.global_tokens)

    def layout(self, grid: sa.Grid) -> sa.Layout:
        near = grid.band(*_sides(self.window))
        return near | grid.first_keys(self.global_tokens) | grid.first_queries(self.global_tokens)


@dataclass(frozen=True)
class Strided(sa.MaskedSoftmax):
    """The keys near the query, and every `stride`-th key counted from it.

    `abs(i - j) < stride`, or `(i - j) % stride == 0`: the union, in each head, of the two patterns
    that the paper gives to different heads.

    Refuses: nothing. Cost: O(N (stride + M / stride)) pairs, scattered over single keys: correct
    everywhere, no promise of speed.

    Attributes:
        stride: near sqrt(N) in the paper.
    """

    name = "strided"
    source = "Child et al. 2019, Sparse Transformers, section 4.3 (arXiv:1904.10509)"

    stride: int = 64

    def __post_init__(self) -> None:
        _check_count(self, "stride", 1)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return ((i - j).abs() < self.stride) | ((i - j) % self.stride == 0)

    def layout(self, grid: sa.Grid) -> sa.Layout:
        return grid.band(self.stride - 1, self.stride - 1) | grid.step(self.stride)

    def implementations(self) -> tuple[sa.Implementation, ...]:
        # Its far keys stand alone: torch gathers them, while the native kernels go through every
        # block that holds one, and fall behind from a thousand tokens on.
        return tuple(sorted(super().implementations(), key=lambda one: one.name == "native"))


class Plugin:
    """The entry point's object."""

    sparseattn_api = 1

    @sa.hookimpl
    def register_mechanisms(self, register):  # type: ignore[no-untyped-def]
        for mechanism in (Windowed, Dilated, Chunked, Longformer, Strided):
            register(mechanism)
