"""What the softmax kernels share: logits in base 2, and which pairs of a tile are visible.

A logit is held in base 2, `log2(e) * softcap(scale * q . k)`, so that its power is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# By which float32 is short of them.
LOG2E_REST = tl.constexpr(1.925963033500663e-08)
LN2_REST = tl.constexpr(-1.904654290582768e-09)


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

    `scale` holds log2(e) already, or with a softcap is 1 / cap instead; `cap` holds log2(e).
    """
    s, slope = dots * scale, 1.0
    if SOFTCAP:
        t = tanh(s)
        s, slope = t * cap, 1.0 - t * t
    return s, slope


@triton.jit
def norm_of(lse):
    """The log normaliser in base 2; inf for a row that saw nothing, which then has no powers."""
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    if lse.dtype == tl.float64:
        return lse * LOG2E
    else:
        return lse * LOG2E + lse * LOG2E_REST


@triton.jit
def natural_of(lse, more):
    """`(lse + more) * ln 2`, with one rounding where lse is the greater: in float32 a sum in base 2
    would be rounded too."""
    if lse.dtype == tl.float64:
        return (lse + more) * LN2
    else:
        return lse * LN2 + (lse * LN2_REST + more * LN2)


@triton.jit
def band_of(low, high, first, count, n, m, SIZE: tl.constexpr):
    """Where the columns that some rows of a band see lie, in steps of SIZE.

    Rows are `first` and the `count - 1` after it, of n; row r sees the columns from `low + r` to
    `high + r`, of m.

    Returns:
        begin, end: of the columns that any row sees; begin is the start of a step.
        inner, outer: the steps from inner up to outer are seen by every row, throughout.
        left, edges: how many steps stand before inner, and how many more from outer on.
    """
    last = tl.minimum(first + count, n) - 1
    begin = tl.maximum(low + first, 0) // SIZE * SIZE
    end = tl.minimum(high + last + 1, m)
    inner = tl.maximum((tl.maximum(low + last, 0) + SIZE - 1) // SIZE * SIZE, begin)
    outer = tl.maximum(tl.maximum(tl.minimum(high + first + 1, m), 0) // SIZE * SIZE, inner)
    left = (tl.maximum(tl.minimum(inner, end) - begin, 0) + SIZE - 1) // SIZE
    edges = left + (tl.maximum(end - outer, 0) + SIZE - 1) // SIZE
    return begin, end, inner, outer, left, edges


@triton.jit
def edge_of(at, begin, outer, left, SIZE: tl.constexpr):
    """The first column of step `at` of a band's edges."""
    return tl.where(at < left, begin + at * SIZE, outer + (at - left) * SIZE)


@triton.jit
def between(column, lowest, highest):
    """Whether columns `[C]` lie within each row's bounds `[R]`, both inclusive: bool `[R, C]`."""
    return (column[None, :] >= lowest[:, None]) & (column[None, :] <= highest[:, None])


@triton.jit
def in_width(some, at, width, EVEN: tl.constexpr):
    """The mask of a tile's load: rows `some`, and columns `at` before `width` unless EVEN.

    A width that is known to fill the tile is left out of it, for the sake of wide loads.
    """
    if EVEN:
        return some[:, None]
    else:
        return some[:, None] & (at < width)[None, :]


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
