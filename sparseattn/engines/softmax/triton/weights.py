"""What the softmax kernels share: logits in base 2, and which pairs of a tile are visible.

A logit is held in base 2, `log2(e) * softcap(scale * q . k)`, so that its power is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh with a small relative error everywhere: a quotient of polynomials (the continued
    fraction of tanh, cut off) near 0, where the formula by powers would cancel."""
    square = x * x
    above = 135135.0 + square * (17325.0 + square * (378.0 + square))
    below = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    power = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - power) / (1.0 + power)
    return tl.where(tl.abs(x) < 0.6, x * above / below, tl.where(x < 0, -far, far))


@triton.jit
def logits(dots, scale, cap, SOFTCAP: tl.constexpr):
    """From `q . k` to the logit in base 2, and the slope of the softcap (1 without one).

    `scale` holds log2(e) already, or with a softcap 1 / cap instead; `cap` holds log2(e).
    """
    s, slope = dots * scale, 1.0
    if SOFTCAP:
        t = tanh(s)
        s, slope = t * cap, 1.0 - t * t
    return s, slope


@triton.jit
def seen_in_band(low, high, query, key, n, m):
    """The visible pairs of a band, for broadcast indices in a run of n queries and m keys."""
    return (key >= low + query) & (key <= high + query) & (query < n) & (key < m)


@triton.jit
def seen_in_tile(masks, look, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The bits of a mask tile, int32 `[tiles, ROWS + 1, COLUMNS / 32]`: bool `[R, C]` for places
    row `[R]` and column `[C]` in it.

    A word a row is loaded, not one a bit: pointers to each would spill.
    """
    words: tl.constexpr = (COLUMNS + 31) // 32
    at = masks + look.to(tl.int64) * ((ROWS + 1) * words) + row * words
    word = tl.load(at)[:, None]
    for more in tl.static_range(1, words):
        word = tl.where(column[None, :] < 32 * more, word, tl.load(at + more)[:, None])
    return ((word >> (column % 32)[None, :]) & 1) != 0


@triton.jit
def any_in_tile(masks, look, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What any row of a mask tile sees, its last row: bool `[C]` for places column `[C]`."""
    words: tl.constexpr = (COLUMNS + 31) // 32
    at = masks + look.to(tl.int64) * ((ROWS + 1) * words) + ROWS * words
    return ((tl.load(at + column // 32) >> (column % 32)) & 1) != 0


@triton.jit
def any_of(seen, AXIS: tl.constexpr):
    """Whether anything is seen along an axis."""
    return tl.max(seen.to(tl.int32), AXIS) > 0
