"""Gradients: of queries by tiles of queries, of keys and of values by tiles of keys.

With `W_ij = gamma ** (i - j) phi(q_i) . phi(k_j)`, l_i its row sum, g_i the gradient of out_i and
`mean_i = g_i . out_i` (without a division, l = 1 and mean = 0):

    dW_ij      = (g_i . v_j - mean_i) / l_i
    dphi(q_i)  = sum_j gamma ** (i - j) dW_ij phi(k_j)
    dphi(k_j)  = sum_i gamma ** (i - j) dW_ij phi(q_i)
    dv_j       = sum_i (W_ij / l_i) g_i

Each is summed by one program in one order: no atomics, the same bits every time. As in the forward,
pairs within a span are weighed one by one, and the others go through the states of spans. What is
not finite in a tile is taken out of its products, and put back into the rows that see it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .features import (
    before_function,
    features,
    multiply,
    number_of,
    slope_of,
    turn_of,
)
from .forward import decay_of
from .states import power_of


@triton.jit
def take_gradient(
    d_x,
    total,
    d_phi,
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
    EVEN: tl.constexpr,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
):
    """Add what a block of features `[R, F]` gives to the gradient before the scale, d_x.

    With a projection d_x is `[R, D]`, and total `[R]` sums the gradients of exponents; else d_x is
    `[R, F]`, the columns of the block.
    """
    y, _ = before_function(
        *(X, row_at, real, block, width, count, scale, ROWS_OF, shift),
        *(F, D, False, EVEN, PROJECT, PRECISION, NUMBER, INPUT),
    )
    d_y = d_phi * slope_of(y, FUNCTION) * turn_of(position, part, turn, NUMBER, PARTS)[:, None]
    if PROJECT:
        f = block * F + tl.arange(0, F)
        d = tl.arange(0, D)
        d_y = tl.where(real[:, None] & (f < count)[None, :], d_y, 0.0)
        total += tl.sum(d_y, 1)
        in_rows = (f < count)[:, None] & (d < width)[None, :]
        rows_of = tl.load(ROWS_OF + f[:, None] * width + d[None, :], in_rows, 0.0)
        d_x += multiply(d_y.to(INPUT), rows_of, PRECISION, NUMBER, INPUT)
    else:
        d_x += d_y
    return d_x, total


@triton.jit
def put_gradient(
    DX,
    dx_at,
    d_x,
    total,
    X,
    row_at,
    real,
    block,
    width,
    scale,
    F: tl.constexpr,
    MOST: tl.constexpr,
    PROJECT: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """Store the gradient of a block of columns of rows."""
    d = block * F + tl.arange(0, F)
    inside = real[:, None] & (d < width)[None, :]
    if PROJECT and not MOST:
        x = tl.load(X + row_at[:, None] + d[None, :], inside, 0.0).to(NUMBER)
        d_x -= x * scale * total[:, None]
    tl.store(DX + dx_at[:, None] + d[None, :], (d_x * scale).to(DX.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["mask_batch", "width", "value_width", "count", "slots"])
def grad_queries(
    Q,
    K,
    V,
    GRAD,
    LENGTH,
    MEAN,
    DQ,
    STATE,
    RUNS,
    TILES,
    KEY_MASK,
    LOGS,
    ROWS_OF,
    Q_SHIFT,
    K_SHIFT,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_batch,
    grad_head,
    grad_row,
    dq_batch,
    dq_head,
    dq_row,
    length_batch,
    length_head,
    shift_batch,
    shift_head,
    mask_batch,
    width,
    value_width,
    count,
    blocks,
    groups,
    slots,
    scale,
    scale_rest,
    key_scale,
    key_scale_rest,
    turn,
    turn_rest,
    CAUSAL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DECAY: tl.constexpr,
    HOLES: tl.constexpr,
    EVEN: tl.constexpr,
    FUNCTION: tl.constexpr,
    MOST: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
):
    """Program (tile, query head, batch row), as in `outputs`; LENGTH is not 0."""
    tile = TILES + tl.program_id(0) * 8
    run = RUNS + tl.load(tile) * 9
    batch = tl.load(run) + tl.program_id(2)
    n = tl.load(run + 2)
    k_first = tl.load(run + 3)
    m = tl.load(run + 4)
    offset = tl.load(run + 5)
    begin = tl.load(tile + 1)
    met_at = tl.load(tile + 3)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // groups
    scale = number_of(scale, scale_rest, NUMBER)
    key_scale = number_of(key_scale, key_scale_rest, NUMBER)
    turn = number_of(turn, turn_rest, NUMBER)

    position = begin + tl.arange(0, ROWS)
    row = position - offset
    real = (row >= 0) & (row < n)
    if CAUSAL:
        real = real & (position >= 0)
    place = tl.load(run + 1) + row
    q_at = batch * q_batch + head * q_head + place * q_row
    dq_at = batch * dq_batch + head * dq_head + place * dq_row
    grad_at = batch * grad_batch + head * grad_head + place * grad_row
    length_at = batch * length_batch + head * length_head + place
    shift = tl.zeros([ROWS], NUMBER)
    mean = tl.zeros([ROWS], NUMBER)
    by = tl.full([ROWS], 1.0, NUMBER)
    if PROJECT:
        shift = tl.load(Q_SHIFT + length_at, real, 0.0)
    if NORMALIZE:
        mean = tl.load(MEAN + length_at, real, 0.0)
        by = 1.0 / tl.load(LENGTH + length_at, real, 1.0)
    e = tl.arange(0, E)
    power = power_of(LOGS, head, tl.maximum(position - met_at, 0), NUMBER, DECAY)
    slot = tl.load(tile + 2) + tl.program_id(2).to(tl.int64) * slots
    size = tl.cast(count, tl.int64) * PARTS * (value_width + 1)
    if DECAY:
        state_at = STATE + (slot * tl.num_programs(1) + head) * size
    else:
        state_at = STATE + (slot * (tl.num_programs(1) // groups) + kv_head) * size
    stop = met_at
    if CAUSAL:
        stop = tl.minimum(begin + ROWS, m)

    total = tl.zeros([ROWS], NUMBER)
    d_x = tl.zeros([ROWS, D if PROJECT else F], NUMBER)
    for block in range(0, blocks):
        if not PROJECT:
            d_x = tl.zeros([ROWS, F], NUMBER)
        f = block * F + tl.arange(0, F)
        in_f = f < count
        for part in range(0, PARTS):
            # Through the state.
            d_phi = tl.zeros([ROWS, F], NUMBER)
            at_f = part * count + f
            for first in range(0, value_width, E):
                in_e = first + e < value_width
                grad = tl.load(
                    GRAD + grad_at[:, None] + first + e[None, :], real[:, None] & in_e[None, :], 0.0
                )
                state = tl.load(
                    state_at + at_f[None, :] * value_width + first + e[:, None],
                    in_f[None, :] & in_e[:, None],
                    0.0,
                )
                d_phi = tl.dot(
                    grad.to(INPUT),
                    state.to(INPUT),
                    d_phi,
                    input_precision=PRECISION,
                    out_dtype=NUMBER,
                )
            if NORMALIZE:
                ones_at = state_at + tl.cast(count, tl.int64) * PARTS * value_width
                ones = tl.load(ones_at + at_f, in_f, 0.0)
                d_phi -= mean[:, None] * ones[None, :]
            if DECAY:
                d_phi *= power[:, None]
            # Pair by pair.
            lost = tl.full([1], 1 << 30, tl.int32)  # the first bad key, from the tile's first row
            for at in range(met_at, stop, ROWS):
                key = at + tl.arange(0, ROWS)
                there = key < m
                if HOLES:
                    hole_at = KEY_MASK + batch * mask_batch + k_first
                    there = there & (tl.load(hole_at + key, there, 0) != 0)
                key_place = k_first + key
                v_at = batch * v_batch + kv_head * v_head + key_place * v_row
                d_w = tl.zeros([ROWS, ROWS], NUMBER)
                for first in range(0, value_width, E):
                    in_e = first + e < value_width
                    grad = tl.load(
                        GRAD + grad_at[:, None] + first + e[None, :],
                        real[:, None] & in_e[None, :],
                        0.0,
                    )
                    v = tl.load(
                        V + v_at[None, :] + first + e[:, None], there[None, :] & in_e[:, None], 0.0
                    )
                    d_w = tl.dot(
                        grad.to(INPUT),
                        v.to(INPUT),
                        d_w,
                        input_precision=PRECISION,
                        out_dtype=NUMBER,
                    )
                seen = (key[None, :] <= position[:, None]) & there[None, :]
                d_w = (d_w - mean[:, None]) * decay_of(
                    LOGS, head, position[:, None], key[None, :], NUMBER, DECAY
                )
                d_w = tl.where(seen, d_w, 0.0)
                k_at = batch * k_batch + kv_head * k_head + key_place * k_row
                key_shift = tl.zeros([ROWS], NUMBER)
                if PROJECT:
                    shift_at = batch * shift_batch + kv_head * shift_head + key_place
                    key_shift = tl.load(K_SHIFT + shift_at, there, 0.0)
                phi_k, fine = features(
                    *(K, k_at, there, key, block, part, width, count, key_scale, turn, ROWS_OF),
                    *(
                        key_shift,
                        F,
                        D,
                        False,
                        EVEN,
                        FUNCTION,
                        PARTS,
                        PROJECT,
                        PRECISION,
                        NUMBER,
                        INPUT,
                    ),
                )
                bad = there & ~fine
                nearby = (key - begin).to(tl.int32)
                lost = tl.minimum(lost, tl.min(tl.where(bad, nearby, 1 << 30), 0))
                phi_k = tl.where(bad[:, None], 0.0, phi_k.to(NUMBER)).to(INPUT)
                d_phi = tl.dot(
                    d_w.to(INPUT), phi_k, d_phi, input_precision=PRECISION, out_dtype=NUMBER
                )
            if CAUSAL:
                d_phi = tl.where((tl.arange(0, ROWS) >= lost)[:, None], float("nan"), d_phi)
            d_x, total = take_gradient(
                *(d_x, total, d_phi * by[:, None], Q, q_at, real, position, block, part, width),
                *(count, scale, turn, ROWS_OF, shift),
                *(F, D, EVEN, FUNCTION, PARTS, PROJECT, PRECISION, NUMBER, INPUT),
            )
        if not PROJECT:
            put_gradient(
                *(DQ, dq_at, d_x, total, Q, q_at, real, block, width, scale),
                *(F, MOST, PROJECT, NUMBER),
            )
    if PROJECT:
        put_gradient(
            *(DQ, dq_at, d_x, total, Q, q_at, real, 0, width, scale),
            *(D, MOST, PROJECT, NUMBER),
        )
