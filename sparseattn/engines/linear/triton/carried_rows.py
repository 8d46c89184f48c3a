"""What kernels that carry states share: features of the rows of a chunk, and their gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .features import before_function, function_of, multiply, put_rows, raw_rows, slope_of
from .states import power_of


@triton.jit
def arguments_of(
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
    PARTS: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
):
    """What the function of features is applied to, as `before_function`, for a block of the
    features of both parts. Under EVEN with two parts the block holds them all, half of it each."""
    if PARTS == 2:
        column = (block * F + tl.arange(0, F)) % (F // 2 if EVEN else count)
        x = raw_rows(X, row_at, real, column, width, EVEN)
        if ACROSS:
            x = tl.trans(x)
        y = x.to(NUMBER) * scale
    else:
        y, _ = before_function(
            *(X, row_at, real, block, width, count, scale, ROWS_OF, shift),
            *(F, D, ACROSS, EVEN, PROJECT, PRECISION, NUMBER, INPUT),
        )
    return y


@triton.jit
def phi_of(
    X,
    row_at,
    real,
    position,
    block,
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
    """A block of the features of rows, of both parts, `[R, F]` in INPUT (ACROSS: `[F, R]`). Rows
    that are not real have the features of 0."""
    y = arguments_of(
        *(X, row_at, real, block, width, count, scale, ROWS_OF, shift),
        *(F, D, ACROSS, EVEN, PARTS, PROJECT, PRECISION, NUMBER, INPUT),
    )
    phi = function_of(y, FUNCTION)
    f = block * F + tl.arange(0, F)
    if PARTS == 2:
        angle = position.to(NUMBER) * turn
        second = f >= (F // 2 if EVEN else count)
        if ACROSS:
            phi *= tl.where(second[:, None], tl.sin(angle)[None, :], tl.cos(angle)[None, :])
        else:
            phi *= tl.where(second[None, :], tl.sin(angle)[:, None], tl.cos(angle)[:, None])
    if not EVEN:
        in_f = f < count * PARTS
        phi = tl.where(in_f[:, None] if ACROSS else in_f[None, :], phi, 0.0)
    return phi.to(INPUT)


@triton.jit
def within(LOGS, head, ROWS: tl.constexpr, NUMBER: tl.constexpr, DECAY: tl.constexpr):
    """`gamma ** (i - j)` of the pairs of a chunk, `[i, j]`; 1 where j > i."""
    r = tl.arange(0, ROWS)
    distance = tl.maximum(r[:, None] - r[None, :], 0)
    return power_of(LOGS, head, distance, NUMBER, DECAY)


@triton.jit
def into_rows(
    DX,
    dx_at,
    d_phi,
    X,
    x_at,
    real,
    position,
    block,
    width,
    count,
    scale,
    turn,
    ROWS_OF,
    shift,
    F: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,
    FUNCTION: tl.constexpr,
    MOST: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Store the gradient of rows, from that of a block of their features, `[R, F]`. The block
    holds all features, with two parts or with a projection."""
    y = arguments_of(
        *(X, x_at, real, block, width, count, scale, ROWS_OF, shift),
        *(F, D, False, EVEN, PARTS, PROJECT, PRECISION, NUMBER, INPUT),
    )
    d_y = d_phi * slope_of(y, FUNCTION)
    f = block * F + tl.arange(0, F)
    if PROJECT:
        d = tl.arange(0, D)
        if not EVEN:
            d_y = tl.where((f < count)[None, :], d_y, 0.0)
        projection = raw_rows(ROWS_OF, f * (D if EVEN else width), f < count, d, width, EVEN)
        d_x = multiply(d_y.to(INPUT), projection, PRECISION, NUMBER, INPUT)
        if not MOST:
            x = raw_rows(X, x_at, real, d, width, EVEN).to(NUMBER)
            d_x -= x * scale * tl.sum(d_y, 1)[:, None]
        put_rows(DX, dx_at, real, d, width, d_x * scale, EVEN)
    elif PARTS == 2:
        # Always EVEN: the columns of both parts side by side.
        angle = position.to(NUMBER) * turn
        second = (f >= F // 2)[None, :]
        d_y *= tl.where(second, tl.sin(angle)[:, None], tl.cos(angle)[:, None])
        d_x = tl.sum(tl.reshape(d_y, [ROWS, 2, F // 2]), 1)
        put_rows(DX, dx_at, real, tl.arange(0, F // 2), width, d_x * scale, EVEN)
    else:
        put_rows(DX, dx_at, real, f, width, d_y * scale, EVEN)
