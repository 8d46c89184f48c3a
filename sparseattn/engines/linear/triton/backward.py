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
    not_finite,
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


@triton.jit(do_not_specialize=["mask_batch", "width", "value_width", "count", "slots"])
def grad_keys(
    Q,
    K,
    V,
    GRAD,
    LENGTH,
    MEAN,
    DK,
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
    dk_batch,
    dk_head,
    dk_row,
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
    """Program (tile of keys, key-value head, batch row), over every query head of the group."""
    tile = TILES + tl.program_id(0) * 8
    run = RUNS + tl.load(tile) * 9
    batch = tl.load(run) + tl.program_id(2)
    q_first = tl.load(run + 1)
    n = tl.load(run + 2)
    k_first = tl.load(run + 3)
    m = tl.load(run + 4)
    offset = tl.load(run + 5)
    begin = tl.load(tile + 1)
    met_at = tl.load(tile + 3)
    kv_head = tl.program_id(1).to(tl.int64)
    scale = number_of(scale, scale_rest, NUMBER)
    key_scale = number_of(key_scale, key_scale_rest, NUMBER)
    turn = number_of(turn, turn_rest, NUMBER)

    key = begin + tl.arange(0, ROWS)
    real = key < m
    if HOLES:
        hole_at = KEY_MASK + batch * mask_batch + k_first
        real = real & (tl.load(hole_at + key, real, 0) != 0)
    place = k_first + key
    k_at = batch * k_batch + kv_head * k_head + place * k_row
    dk_at = batch * dk_batch + kv_head * dk_head + place * dk_row
    v_at = batch * v_batch + kv_head * v_head + place * v_row
    key_shift = tl.zeros([ROWS], NUMBER)
    if PROJECT:
        shift_at = batch * shift_batch + kv_head * shift_head + place
        key_shift = tl.load(K_SHIFT + shift_at, real, 0.0)
    e = tl.arange(0, E)
    slot = tl.load(tile + 2) + tl.program_id(2).to(tl.int64) * slots
    size = tl.cast(count, tl.int64) * PARTS * (value_width + 1)
    # Queries before the first one, or before every key, are in no tile.
    start = met_at
    if CAUSAL:
        start = tl.maximum(begin, tl.maximum(offset, 0) // ROWS * ROWS)
    stop = tl.minimum(met_at, offset + n)

    total = tl.zeros([ROWS], NUMBER)
    d_x = tl.zeros([ROWS, D if PROJECT else F], NUMBER)
    for block in range(0, blocks):
        if not PROJECT:
            d_x = tl.zeros([ROWS, F], NUMBER)
        f = block * F + tl.arange(0, F)
        in_f = f < count
        for part in range(0, PARTS):
            d_phi = tl.zeros([ROWS, F], NUMBER)
            at_f = part * count + f
            lost = tl.full([1], -1, tl.int32)  # the last bad query, from the tile's first row
            for member in range(0, groups):
                head = kv_head * groups + member
                if DECAY or member == 0:
                    # Through the state, which without a decay the group shares.
                    state_head = head if DECAY else kv_head
                    heads = tl.num_programs(1) * (groups if DECAY else 1)
                    state_at = STATE + (slot * heads + state_head) * size
                    added = tl.zeros([ROWS, F], NUMBER)
                    for first in range(0, value_width, E):
                        in_e = first + e < value_width
                        v = tl.load(
                            V + v_at[:, None] + first + e[None, :],
                            real[:, None] & in_e[None, :],
                            0.0,
                        )
                        state = tl.load(
                            state_at + at_f[None, :] * value_width + first + e[:, None],
                            in_f[None, :] & in_e[:, None],
                            0.0,
                        )
                        added = tl.dot(
                            v.to(INPUT),
                            state.to(INPUT),
                            added,
                            input_precision=PRECISION,
                            out_dtype=NUMBER,
                        )
                    if NORMALIZE:
                        ones_at = state_at + tl.cast(count, tl.int64) * PARTS * value_width
                        added += tl.load(ones_at + at_f, in_f, 0.0)[None, :]
                    if DECAY:
                        added *= power_of(LOGS, head, tl.maximum(met_at - key, 0), NUMBER, DECAY)[
                            :, None
                        ]
                    d_phi += added
                for at in range(start, stop, ROWS):
                    position = at + tl.arange(0, ROWS)
                    row = position - offset
                    there = (row >= 0) & (row < n)
                    q_place = q_first + row
                    grad_at = batch * grad_batch + head * grad_head + q_place * grad_row
                    d_w = tl.zeros([ROWS, ROWS], NUMBER)
                    for first in range(0, value_width, E):
                        in_e = first + e < value_width
                        v = tl.load(
                            V + v_at[:, None] + first + e[None, :],
                            real[:, None] & in_e[None, :],
                            0.0,
                        )
                        grad = tl.load(
                            GRAD + grad_at[None, :] + first + e[:, None],
                            there[None, :] & in_e[:, None],
                            0.0,
                        )
                        d_w = tl.dot(
                            v.to(INPUT),
                            grad.to(INPUT),
                            d_w,
                            input_precision=PRECISION,
                            out_dtype=NUMBER,
                        )
                    length_at = batch * length_batch + head * length_head + q_place
                    bad = not_finite(tl.zeros([ROWS], NUMBER))
                    if NORMALIZE:
                        mean = tl.load(MEAN + length_at, there, 0.0)
                        by = 1.0 / tl.load(LENGTH + length_at, there, 1.0)
                        bad = not_finite(mean) | not_finite(by)
                        d_w = (d_w - mean[None, :]) * by[None, :]
                    d_w *= decay_of(LOGS, head, position[None, :], key[:, None], NUMBER, DECAY)
                    seen = (key[:, None] <= position[None, :]) & there[None, :] & real[:, None]
                    d_w = tl.where(seen, d_w, 0.0)
                    shift = tl.zeros([ROWS], NUMBER)
                    if PROJECT:
                        shift = tl.load(Q_SHIFT + length_at, there, 0.0)
                    q_at = batch * q_batch + head * q_head + q_place * q_row
                    phi, fine = features(
                        *(Q, q_at, there, position, block, part, width, count, scale, turn),
                        *(ROWS_OF, shift, F, D, False, EVEN, FUNCTION, PARTS, PROJECT, PRECISION),
                        *(NUMBER, INPUT),
                    )
                    bad = there & (bad | ~fine)
                    nearby = (position - begin).to(tl.int32)
                    lost = tl.maximum(lost, tl.max(tl.where(bad, nearby, -1), 0))
                    phi = tl.where(bad[:, None], 0.0, phi.to(NUMBER)).to(INPUT)
                    d_phi = tl.dot(
                        d_w.to(INPUT), phi, d_phi, input_precision=PRECISION, out_dtype=NUMBER
                    )
            if CAUSAL:
                d_phi = tl.where((tl.arange(0, ROWS) <= lost)[:, None], float("nan"), d_phi)
            d_x, total = take_gradient(
                *(d_x, total, d_phi, K, k_at, real, key, block, part, width),
                *(count, key_scale, turn, ROWS_OF, key_shift),
                *(F, D, EVEN, FUNCTION, PARTS, PROJECT, PRECISION, NUMBER, INPUT),
            )
        if not PROJECT:
            put_gradient(
                *(DK, dk_at, d_x, total, K, k_at, real, block, width, key_scale),
                *(F, MOST, PROJECT, NUMBER),
            )
    if PROJECT:
        put_gradient(
            *(DK, dk_at, d_x, total, K, k_at, real, 0, width, key_scale),
            *(D, MOST, PROJECT, NUMBER),
        )


@triton.jit(do_not_specialize=["mask_batch", "width", "value_width", "count", "slots"])
def grad_values(
    Q,
    K,
    GRAD,
    LENGTH,
    DV,
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
    grad_batch,
    grad_head,
    grad_row,
    dv_batch,
    dv_head,
    dv_row,
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
    """Program (tile of keys x block of values, key-value head, batch row), as `grad_keys`."""
    value_blocks = (value_width + E - 1) // E
    tile = TILES + tl.program_id(0) // value_blocks * 8
    run = RUNS + tl.load(tile) * 9
    batch = tl.load(run) + tl.program_id(2)
    q_first = tl.load(run + 1)
    n = tl.load(run + 2)
    k_first = tl.load(run + 3)
    m = tl.load(run + 4)
    offset = tl.load(run + 5)
    begin = tl.load(tile + 1)
    met_at = tl.load(tile + 3)
    kv_head = tl.program_id(1).to(tl.int64)
    scale = number_of(scale, scale_rest, NUMBER)
    key_scale = number_of(key_scale, key_scale_rest, NUMBER)
    turn = number_of(turn, turn_rest, NUMBER)

    key = begin + tl.arange(0, ROWS)
    real = key < m
    if HOLES:
        hole_at = KEY_MASK + batch * mask_batch + k_first
        real = real & (tl.load(hole_at + key, real, 0) != 0)
    place = k_first + key
    k_at = batch * k_batch + kv_head * k_head + place * k_row
    key_shift = tl.zeros([ROWS], NUMBER)
    if PROJECT:
        shift_at = batch * shift_batch + kv_head * shift_head + place
        key_shift = tl.load(K_SHIFT + shift_at, real, 0.0)
    e = tl.program_id(0) % value_blocks * E + tl.arange(0, E)
    in_e = e < value_width
    slot = tl.load(tile + 2) + tl.program_id(2).to(tl.int64) * slots
    size = tl.cast(count, tl.int64) * PARTS * (value_width + 1)
    start = met_at
    if CAUSAL:
        start = tl.maximum(begin, tl.maximum(offset, 0) // ROWS * ROWS)
    stop = tl.minimum(met_at, offset + n)

    d_v = tl.zeros([ROWS, E], NUMBER)
    lost = tl.full([E], -1, tl.int32)  # the last bad query by column, from the tile's first row
    for member in range(0, groups):
        head = kv_head * groups + member
        if DECAY or member == 0:
            state_head = head if DECAY else kv_head
            heads = tl.num_programs(1) * (groups if DECAY else 1)
            state_at = STATE + (slot * heads + state_head) * size
            added = tl.zeros([ROWS, E], NUMBER)
            for b in range(0, blocks * PARTS):
                block = b % blocks
                part = b // blocks
                phi_k, _ = features(
                    *(K, k_at, real, key, block, part, width, count, key_scale, turn, ROWS_OF),
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
                f = block * F + tl.arange(0, F)
                state = tl.load(
                    state_at + (part * count + f)[:, None] * value_width + e[None, :],
                    (f < count)[:, None] & in_e[None, :],
                    0.0,
                )
                added = tl.dot(
                    phi_k, state.to(INPUT), added, input_precision=PRECISION, out_dtype=NUMBER
                )
            if DECAY:
                power = power_of(LOGS, head, tl.maximum(met_at - key, 0), NUMBER, DECAY)
                added *= power[:, None]
            d_v += added
        for at in range(start, stop, ROWS):
            position = at + tl.arange(0, ROWS)
            row = position - offset
            there = (row >= 0) & (row < n)
            q_place = q_first + row
            length_at = batch * length_batch + head * length_head + q_place
            shift = tl.zeros([ROWS], NUMBER)
            if PROJECT:
                shift = tl.load(Q_SHIFT + length_at, there, 0.0)
            q_at = batch * q_batch + head * q_head + q_place * q_row
            weights = tl.zeros([ROWS, ROWS], NUMBER)
            bad_row = not_finite(tl.zeros([ROWS], NUMBER))
            for b in range(0, blocks * PARTS):
                block = b % blocks
                part = b // blocks
                phi_k, _ = features(
                    *(K, k_at, real, key, block, part, width, count, key_scale, turn, ROWS_OF),
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
                phi, fine = features(
                    *(Q, q_at, there, position, block, part, width, count, scale, turn, ROWS_OF),
                    *(shift, F, D, True, EVEN, FUNCTION, PARTS, PROJECT, PRECISION),
                    *(NUMBER, INPUT),
                )
                bad_row = bad_row | ~fine
                weights = tl.dot(phi_k, phi, weights, input_precision=PRECISION, out_dtype=NUMBER)
            if NORMALIZE:
                by = 1.0 / tl.load(LENGTH + length_at, there, 1.0)
                bad_row = bad_row | not_finite(by)
                weights *= by[None, :]
            weights *= decay_of(LOGS, head, position[None, :], key[:, None], NUMBER, DECAY)
            seen = (key[:, None] <= position[None, :]) & there[None, :] & real[:, None]
            weights = tl.where(seen, weights, 0.0)
            grad_at = batch * grad_batch + head * grad_head + q_place * grad_row
            grad = tl.load(
                GRAD + grad_at[:, None] + e[None, :], there[:, None] & in_e[None, :], 0.0
            ).to(NUMBER)
            bad = not_finite(grad) | (there & bad_row)[:, None]
            nearby = (position - begin).to(tl.int32)
            lost = tl.maximum(lost, tl.max(tl.where(bad, nearby[:, None], -1), 0))
            grad = tl.where(bad, 0.0, grad).to(INPUT)
            d_v = tl.dot(weights.to(INPUT), grad, d_v, input_precision=PRECISION, out_dtype=NUMBER)
    if CAUSAL:
        d_v = tl.where(tl.arange(0, ROWS)[:, None] <= lost[None, :], float("nan"), d_v)
    dv_at = batch * dv_batch + kv_head * dv_head + place * dv_row
    tl.store(
        DV + dv_at[:, None] + e[None, :],
        d_v.to(DV.dtype.element_ty),
        real[:, None] & in_e[None, :],
    )
