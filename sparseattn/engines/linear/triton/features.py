"""Feature maps as the kernels evaluate them, and their slopes: see `FusedMap` in `maps.py`.

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
def not_finite(x):
    """Where x is NaN or infinite."""
    return ~(tl.abs(x) < float("inf"))


@triton.jit
def function_of(x, FUNCTION: tl.constexpr):
    """The elementwise function of a map; NaN stays NaN."""
    if FUNCTION == "elu_plus_one":
        x = tl.exp(tl.minimum(x, 0.0)) + tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
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
    """`x @ y` to the digits of NUMBER, where one of the two is INPUT already: where products are of
    halves, the other is cut in two."""
    high_x = x.to(INPUT)
    high_y = y.to(INPUT)
    made = tl.dot(high_x, high_y, input_precision=PRECISION, out_dtype=NUMBER)
    if tl.bfloat16 == INPUT:
        if x.dtype == NUMBER:
            rest = (x - high_x.to(NUMBER)).to(INPUT)
            made = tl.dot(rest, high_y, made, input_precision=PRECISION, out_dtype=NUMBER)
        else:
            rest = (y - high_y.to(NUMBER)).to(INPUT)
            made = tl.dot(high_x, rest, made, input_precision=PRECISION, out_dtype=NUMBER)
    return made


@triton.jit
def raw_rows(X, row_at, real, column, width, EVEN: tl.constexpr):
    """Columns of rows, `[R, C]`, as they are; 0 outside. Under EVEN all of these columns are there,
    and loads are as wide as rows are."""
    at = X + row_at[:, None] + column[None, :]
    if EVEN:
        x = tl.load(at, real[:, None], 0.0)
    else:
        x = tl.load(at, real[:, None] & (column < width)[None, :], 0.0)
    return x


@triton.jit
def put_rows(X, row_at, real, column, width, x, EVEN: tl.constexpr):
    """Store what `raw_rows` loads."""
    at = X + row_at[:, None] + column[None, :]
    if EVEN:
        tl.store(at, x.to(X.dtype.element_ty), real[:, None])
    else:
        tl.store(at, x.to(X.dtype.element_ty), real[:, None] & (column < width)[None, :])


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
    ACROSS: tl.constexpr,
    EVEN: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
):
    """What the elementwise function is applied to, `[R, F]`, and which rows are finite, `[R]`.

    Args:
        row_at: where rows start; real: which there are. block: of features; count: how many there
            are. ROWS_OF: the rows of the projection, `[count, width]` in NUMBER. shift `[R]`.
        EVEN: as in `raw_rows`, of rows and of the projection; and every feature is there.
        ACROSS: transpose, `[F, R]`. Products are made so in the first place: Triton before 3.7.1
            miscompiles the transpose of a cast accumulator.
    """
    if PROJECT:
        f = block * F + tl.arange(0, F)
        d = tl.arange(0, D)
        x = raw_rows(X, row_at, real, d, width, EVEN)
        projection = raw_rows(ROWS_OF, f * (D if EVEN else width), f < count, d, width, EVEN)
        if ACROSS:
            x = tl.trans(x)
            y = multiply(projection, x, PRECISION, NUMBER, INPUT) * scale - shift[None, :]
        else:
            projection = tl.trans(projection)
            y = multiply(x, projection, PRECISION, NUMBER, INPUT) * scale - shift[:, None]
    else:
        x = raw_rows(X, row_at, real, block * F + tl.arange(0, F), width, EVEN)
        if ACROSS:
            x = tl.trans(x)
        y = x.to(NUMBER) * scale
    finite = tl.max(not_finite(x.to(NUMBER)).to(tl.int32), 0 if ACROSS else 1) == 0
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
    ACROSS: tl.constexpr,
    EVEN: tl.constexpr,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
):
    """A block of features in INPUT, 0 outside, `[R, F]` (ACROSS: `[F, R]`); which rows are finite.

    Arguments as of `before_function`, and: position `[R]` and `turn`, radians a position.
    """
    y, finite = before_function(
        *(X, row_at, real, block, width, count, scale, ROWS_OF, shift),
        *(F, D, ACROSS, EVEN, PROJECT, PRECISION, NUMBER, INPUT),
    )
    phi = function_of(y, FUNCTION)
    factor = turn_of(position, part, turn, NUMBER, PARTS)
    real_f = block * F + tl.arange(0, F) < count
    if ACROSS:
        inside = real[None, :] if EVEN else real_f[:, None] & real[None, :]
        phi = tl.where(inside, phi * factor[None, :], 0.0)
    else:
        inside = real[:, None] if EVEN else real[:, None] & real_f[None, :]
        phi = tl.where(inside, phi * factor[:, None], 0.0)
    return phi.to(INPUT), finite
