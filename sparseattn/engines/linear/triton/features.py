"""Feature maps as the kernels evaluate them, and their slopes: see `FusedMap` in `linear/maps.py`.

Features of a row come in blocks of F. Those that turn with the position have two parts: the blocks
times the cosine of an angle, and the same blocks times its sine.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number_of(first, rest, NUMBER: tl.constexpr):
    """A number that came as two halves: Triton passes no float64."""
    return tl.cast(first, NUMBER) + tl.cast(rest, NUMBER)


@triton.jit
def function_of(x, FUNCTION: tl.constexpr):
    """The elementwise function of a map; NaN stays NaN."""
    if FUNCTION == "elu_plus_one":
        x = tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    elif FUNCTION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif FUNCTION == "exp":
        x = tl.exp(x)
    return x


@triton.jit
def slope_of(x, FUNCTION: tl.constexpr):
    """The derivative of `function_of`; as torch has it at 0."""
    if FUNCTION == "elu_plus_one":
        x = tl.exp(tl.where(x > 0, 0.0, x))
    elif FUNCTION == "relu":
        x = tl.where(x > 0, 1.0, 0.0)
    elif FUNCTION == "exp":
        x = tl.exp(x)
    else:
        x = tl.full(x.shape, 1.0, x.dtype)
    return x


@triton.jit
def turn_of(position, part, turn, NUMBER: tl.constexpr, PARTS: tl.constexpr):
    """What the features of a part are multiplied by in each row, `[R]`: 1 without an angle."""
    if PARTS == 1:
        factor = tl.full(position.shape, 1.0, NUMBER)
    else:
        angle = position.to(NUMBER) * turn
        factor = tl.where(part == 0, tl.cos(angle), tl.sin(angle))
    return factor


@triton.jit
def multiply(x, y, PRECISION: tl.constexpr, NUMBER: tl.constexpr, INPUT: tl.constexpr):
    """`x @ y` for y in NUMBER, to its digits: where products are of halves, y is cut in two."""
    high = y.to(INPUT)
    made = tl.dot(x.to(INPUT), high, input_precision=PRECISION, out_dtype=NUMBER)
    if INPUT == tl.bfloat16:
        rest = (y - high.to(NUMBER)).to(INPUT)
        made = tl.dot(x.to(INPUT), rest, made, input_precision=PRECISION, out_dtype=NUMBER)
    return made


@triton.jit
def raw_rows(X, row_at, real, block, width, F: tl.constexpr):
    """A block of the columns of rows, `[R, F]`, as they are; 0 outside."""
    d = block * F + tl.arange(0, F)
    return tl.load(X + row_at[:, None] + d[None, :], real[:, None] & (d < width)[None, :], 0.0)


@triton.jit
def before_function(
    X,
    row_at,
    real,
    block,
    width,
    count,
    scale,
    ROWS_OF,
    shift,
    F: tl.constexpr,
    D: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
):
    """What the elementwise function is applied to, `[R, F]`, and which rows are finite, `[R]`.

    Args:
        row_at: where rows start; real: which there are. block: of features; count: how many there
            are. ROWS_OF: the rows of the projection, `[count, width]` in NUMBER. shift `[R]`.
    """
    if PROJECT:
        x = raw_rows(X, row_at, real, 0, width, D)
        f = block * F + tl.arange(0, F)
        d = tl.arange(0, D)
        # Transposed as it is loaded.
        at = ROWS_OF + f[None, :] * width + d[:, None]
        rows_of = tl.load(at, (f < count)[None, :] & (d < width)[:, None], 0.0)
        y = multiply(x, rows_of, PRECISION, NUMBER, INPUT) * scale - shift[:, None]
    else:
        x = raw_rows(X, row_at, real, block, width, F)
        y = x.to(NUMBER) * scale
    finite = tl.max((~(tl.abs(x.to(NUMBER)) < float("inf"))).to(tl.int32), 1) == 0
    return y, finite


@triton.jit
def features(
    X,
    row_at,
    real,
    position,
    block,
    part,
    width,
    count,
    scale,
    turn,
    ROWS_OF,
    shift,
    F: tl.constexpr,
    D: tl.constexpr,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
):
    """A block of features, `[R, F]` in INPUT, 0 outside; and which rows are finite, `[R]`.

    Arguments as of `before_function`, and: position `[R]` and `turn`, radians a position.
    """
    y, finite = before_function(
        *(X, row_at, real, block, width, count, scale, ROWS_OF, shift),
        *(F, D, PROJECT, PRECISION, NUMBER, INPUT),
    )
    phi = function_of(y, FUNCTION)
    phi *= turn_of(position, part, turn, NUMBER, PARTS)[:, None]
    f = block * F + tl.arange(0, F)
    phi = tl.where(real[:, None] & (f < count)[None, :], phi, 0.0)
    return phi.to(INPUT), finite
