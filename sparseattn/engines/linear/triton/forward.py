"""Outputs: one program a tile of queries, over the state before its span and the keys within it."""

from __future__ import annotations

import triton
import triton.language as tl

from .features import features, multiply, not_finite, number_of, raw_rows
from .states import power_of


@triton.jit
def decay_of(LOGS, head, query, key, NUMBER: tl.constexpr, DECAY: tl.constexpr):
    """`gamma ** (i - j)` for broadcast positions, 1 where j > i."""
    distance = query - key
    return power_of(LOGS, head, tl.where(distance > 0, distance, 0), NUMBER, DECAY)


@triton.jit(do_not_specialize=["width", "value_width", "count", "rows"])
def shifts(
    X,
    SHIFT,
    ROWS_OF,
    x_batch,
    x_head,
    x_row,
    shift_batch,
    shift_head,
    rows,
    width,
    count,
    blocks,
    scale,
    scale_rest,
    drop,
    drop_rest,
    MOST: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
):
    """What exponents are lowered by, `[B, H, n]`: the greatest of the row if MOST, else half the
    square of the row; and `drop`. Program (tile of rows, head, batch row)."""
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    scale = number_of(scale, scale_rest, NUMBER)
    row_at = batch * x_batch + head * x_head + row * x_row
    d = tl.arange(0, D)
    x = raw_rows(X, row_at, real, d, width, EVEN)
    if MOST:
        shift = tl.full([ROWS], float("-inf"), NUMBER)
        for block in range(0, blocks):
            f = block * F + tl.arange(0, F)
            stride = D if EVEN else width
            projection = raw_rows(ROWS_OF, f * stride, f < count, d, width, EVEN)
            y = multiply(x, tl.trans(projection), PRECISION, NUMBER, INPUT) * scale
            shift = tl.maximum(shift, tl.max(tl.where((f < count)[None, :], y, float("-inf")), 1))
    else:
        y = x.to(NUMBER) * scale
        shift = tl.sum(y * y, 1) * 0.5
    shift += number_of(drop, drop_rest, NUMBER)
    tl.store(SHIFT + batch * shift_batch + head * shift_head + row, shift, real)


@triton.jit(do_not_specialize=["mask_batch", "width", "value_width", "count", "slots"])
def outputs(
    Q,
    K,
    V,
    OUT,
    LENGTH,
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
    out_batch,
    out_head,
    out_row,
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
    """Program (tile x block of values, query head, batch row); writes OUT, and LENGTH, the row sums
    before the division (if NORMALIZE)."""
    value_blocks = (value_width + E - 1) // E
    tile = TILES + tl.program_id(0) // value_blocks * 8
    value_block = tl.program_id(0) % value_blocks
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
    shift = tl.zeros([ROWS], NUMBER)
    if PROJECT:
        length_at = batch * length_batch + head * length_head + place
        shift = tl.load(Q_SHIFT + length_at, real, 0.0)
    e = value_block * E + tl.arange(0, E)

    # Through the state.
    slot = tl.load(tile + 2) + tl.program_id(2).to(tl.int64) * slots
    size = tl.cast(count, tl.int64) * PARTS * (value_width + 1)
    if DECAY:
        state_at = STATE + (slot * tl.num_programs(1) + head) * size
    else:
        state_at = STATE + (slot * (tl.num_programs(1) // groups) + kv_head) * size
    out = tl.zeros([ROWS, E], NUMBER)
    length = tl.zeros([ROWS], NUMBER)
    for b in range(0, blocks * PARTS):
        block = b % blocks
        part = b // blocks
        phi, _ = features(
            *(Q, q_at, real, position, block, part, width, count, scale, turn, ROWS_OF, shift),
            *(F, D, False, EVEN, FUNCTION, PARTS, PROJECT, PRECISION, NUMBER, INPUT),
        )
        f = block * F + tl.arange(0, F)
        in_state = f < count
        f = part * count + f
        state = tl.load(
            state_at + f[:, None] * value_width + e[None, :],
            in_state[:, None] & (e < value_width)[None, :],
            0.0,
        )
        out = tl.dot(phi, state.to(INPUT), out, input_precision=PRECISION, out_dtype=NUMBER)
        if NORMALIZE:
            ones = tl.load(state_at + count * PARTS * value_width + f, in_state, 0.0)
            length += tl.sum(phi.to(NUMBER) * ones[None, :], 1)
    if DECAY:
        power = power_of(LOGS, head, tl.maximum(position - met_at, 0), NUMBER, DECAY)
        out *= power[:, None]
        length *= power

    # Pair by pair, within the span.
    if CAUSAL:
        stop = tl.minimum(begin + ROWS, m)
        # The first key that is not finite, by column of the output: it reaches no row before it.
        lost = tl.full([E], 1 << 30, tl.int32)  # counted from the tile's first row
        for at in range(met_at, stop, ROWS):
            key = at + tl.arange(0, ROWS)
            there = key < m
            if HOLES:
                hole_at = KEY_MASK + batch * mask_batch + k_first
                there = there & (tl.load(hole_at + key, there, 0) != 0)
            key_place = k_first + key
            k_at = batch * k_batch + kv_head * k_head + key_place * k_row
            key_shift = tl.zeros([ROWS], NUMBER)
            if PROJECT:
                shift_at = batch * shift_batch + kv_head * shift_head + key_place
                key_shift = tl.load(K_SHIFT + shift_at, there, 0.0)
            scores = tl.zeros([ROWS, ROWS], NUMBER)
            fine = there
            for b in range(0, blocks * PARTS):
                block = b % blocks
                part = b // blocks
                phi, _ = features(
                    *(Q, q_at, real, position, block, part, width, count, scale, turn, ROWS_OF),
                    *(shift, F, D, False, EVEN, FUNCTION, PARTS, PROJECT, PRECISION),
                    *(NUMBER, INPUT),
                )
                phi_k, finite = features(
                    *(K, k_at, there, key, block, part, width, count, key_scale, turn, ROWS_OF),
                    *(
                        key_shift,
                        F,
                        D,
                        True,
                        EVEN,
                        FUNCTION,
                        PARTS,
                        PROJECT,
                        PRECISION,
                        NUMBER,
                        INPUT,
                    ),
                )
                fine = fine & finite
                scores = tl.dot(phi, phi_k, scores, input_precision=PRECISION, out_dtype=NUMBER)
            seen = (key[None, :] <= position[:, None]) & there[None, :]
            scores *= decay_of(LOGS, head, position[:, None], key[None, :], NUMBER, DECAY)
            scores = tl.where(seen, scores, 0.0)
            length += tl.sum(scores, 1)
            v_at = batch * v_batch + kv_head * v_head + key_place * v_row
            v = tl.load(
                V + v_at[:, None] + e[None, :], there[:, None] & (e < value_width)[None, :], 0.0
            )
            bad = not_finite(v.to(NUMBER)) | (there & ~fine)[:, None]
            nearby = (key - begin).to(tl.int32)
            lost = tl.minimum(lost, tl.min(tl.where(bad, nearby[:, None], 1 << 30), 0))
            v = tl.where(bad, 0.0, v.to(NUMBER)).to(INPUT)
            out = tl.dot(scores.to(INPUT), v, out, input_precision=PRECISION, out_dtype=NUMBER)
        out = tl.where(tl.arange(0, ROWS)[:, None] >= lost[None, :], float("nan"), out)

    if NORMALIZE:
        if value_block == 0:
            length_at = batch * length_batch + head * length_head + place
            tl.store(LENGTH + length_at, length, real)
        out /= tl.where(length == 0, float("inf"), length)[:, None]
    out_at = batch * out_batch + head * out_head + place * out_row
    tl.store(
        OUT + out_at[:, None] + e[None, :],
        out.to(OUT.dtype.element_ty),
        real[:, None] & (e < value_width)[None, :],
    )
