"""Outputs of a span by one program, which carries the state through it in registers.

Along a span, chunk by chunk of ROWS positions: what the chunk's queries owe to the keys before it
comes from the state, what they owe to those of the chunk is weighed pair by pair, then the chunk is
added to the state. k and v are read once, and each feature is evaluated once.

Serves states that registers hold, for products of halves: see `carried` in `config.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .carried_rows import phi_of, within
from .features import not_finite, number_of, put_rows, raw_rows
from .states import power_of


@triton.jit(do_not_specialize=["mask_batch", "width", "value_width", "count", "slots", "span"])
def carried_outputs(
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
    groups,
    slots,
    span,
    scale,
    scale_rest,
    key_scale,
    key_scale_rest,
    turn,
    turn_rest,
    WALK: tl.constexpr,
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
    """Program (span x block of values, query head, batch row); writes as `outputs`.

    WALK: through keys of the span; else its queries have met all their keys.
    """
    value_blocks = (value_width + E - 1) // E
    tile = TILES + tl.program_id(0) // value_blocks * 8
    value_block = tl.program_id(0) % value_blocks
    run = RUNS + tl.load(tile) * 9
    batch = tl.load(run) + tl.program_id(2)
    n = tl.load(run + 2).to(tl.int32)
    m = tl.load(run + 4).to(tl.int32)
    offset = tl.load(run + 5).to(tl.int32)
    begin = tl.load(tile + 1).to(tl.int32)
    met_at = tl.load(tile + 3).to(tl.int32)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // groups
    scale = number_of(scale, scale_rest, NUMBER)
    key_scale = number_of(key_scale, key_scale_rest, NUMBER)
    turn = number_of(turn, turn_rest, NUMBER)
    # Rows of the run's own numbers, from here on.
    q_first = tl.load(run + 1)
    k_first = tl.load(run + 3)
    Q += batch * q_batch + head * q_head + q_first * q_row
    OUT += batch * out_batch + head * out_head + q_first * out_row
    LENGTH += batch * length_batch + head * length_head + q_first
    K += batch * k_batch + kv_head * k_head + k_first * k_row
    V += batch * v_batch + kv_head * v_head + k_first * v_row
    KEY_MASK += batch * mask_batch + k_first
    if PROJECT:
        Q_SHIFT += batch * length_batch + head * length_head + q_first
        K_SHIFT += batch * shift_batch + kv_head * shift_head + k_first

    r = tl.arange(0, ROWS)
    e = value_block * E + tl.arange(0, E)
    f = tl.arange(0, F)
    slot = tl.load(tile + 2) + tl.program_id(2).to(tl.int64) * slots
    size = tl.cast(count, tl.int64) * PARTS * (value_width + 1)
    state_row = value_width
    if EVEN:  # what these are multiples of, said for wide loads
        size = size // 16 * 16
        state_row = value_width // 16 * 16
    if DECAY:
        STATE += (slot * tl.num_programs(1) + head) * size
    else:
        STATE += (slot * (tl.num_programs(1) // groups) + kv_head) * size
    state = raw_rows(STATE, f * state_row, f < count * PARTS, e, value_width, EVEN)
    ones = tl.zeros([F], NUMBER)
    if NORMALIZE:
        ones = tl.load(STATE + count * PARTS * value_width + f, f < count * PARTS, 0.0)

    stop = tl.minimum(begin + span, offset + n)
    if WALK:
        since = power_of(LOGS, head, r, NUMBER, DECAY)
        until = power_of(LOGS, head, ROWS - r, NUMBER, DECAY)
        across = power_of(LOGS, head, ROWS + tl.zeros([1], tl.int32), NUMBER, DECAY)
        pairs = within(LOGS, head, ROWS, NUMBER, DECAY)
        for at in range(begin, stop, ROWS):
            position = at + r
            row = position - offset
            real = (row >= 0) & (row < n)
            there = position < m
            if HOLES:
                there = there & (tl.load(KEY_MASK + position, there, 0) != 0)
            shift = tl.zeros([ROWS], NUMBER)
            key_shift = tl.zeros([ROWS], NUMBER)
            if PROJECT:
                shift = tl.load(Q_SHIFT + row, real, 0.0)
                key_shift = tl.load(K_SHIFT + position, there, 0.0)
            phi = phi_of(
                *(Q, row.to(tl.int64) * q_row, real, position, 0, width, count, scale, turn),
                *(ROWS_OF, shift, F, D, False, EVEN, FUNCTION, PARTS, PROJECT, PRECISION),
                *(NUMBER, INPUT),
            )
            length = tl.zeros([ROWS], NUMBER)
            if NORMALIZE:
                length = tl.sum(phi.to(NUMBER) * ones[None, :], 1)
            phi_k = phi_of(
                *(K, position.to(tl.int64) * k_row, there, position, 0, width, count, key_scale),
                *(turn, ROWS_OF, key_shift, F, D, True, EVEN, FUNCTION, PARTS, PROJECT),
                *(PRECISION, NUMBER, INPUT),
            )
            if NORMALIZE:
                one = tl.where(there, until, 0.0)
                ones = ones * across + tl.sum(phi_k.to(NUMBER) * one[None, :], 1)
            v = raw_rows(V, position.to(tl.int64) * v_row, there, e, value_width, EVEN)
            # What is not finite reaches the state as it is, and in the chunk no row before it.
            bad = not_finite(v.to(NUMBER))
            some = tl.max(bad.to(tl.int32))
            finite = tl.where(bad, 0.0, v.to(NUMBER)).to(INPUT)
            added = (v.to(NUMBER) * until[:, None]).to(INPUT) if DECAY else v.to(INPUT)
            made = tl.dot(phi, state.to(INPUT), input_precision=PRECISION, out_dtype=NUMBER)
            scores = tl.dot(phi, phi_k, input_precision=PRECISION, out_dtype=NUMBER)
            if DECAY:
                made *= since[:, None]
                length *= since
                scores *= pairs
                state *= across[:, None]
            scores = tl.where((r[None, :] <= r[:, None]) & there[None, :], scores, 0.0)
            made = tl.dot(
                scores.to(INPUT), finite, made, input_precision=PRECISION, out_dtype=NUMBER
            )
            state = tl.dot(phi_k, added, state, input_precision=PRECISION, out_dtype=NUMBER)
            if some > 0:
                v = raw_rows(V, position.to(tl.int64) * v_row, there, e, value_width, EVEN)
                lost = tl.min(tl.where(not_finite(v.to(NUMBER)), r[:, None], ROWS), 0)
                made = tl.where(r[:, None] >= lost[None, :], float("nan"), made)
            if NORMALIZE:
                length += tl.sum(scores, 1)
                if value_block == 0:
                    tl.store(LENGTH + row, length, real)
                made /= tl.where(length == 0, float("inf"), length)[:, None]
            put_rows(OUT, row.to(tl.int64) * out_row, real, e, value_width, made, EVEN)
    else:
        for at in range(begin, stop, ROWS):
            position = at + r
            row = position - offset
            real = (row >= 0) & (row < n)
            if CAUSAL:
                real = real & (position >= 0)
            shift = tl.zeros([ROWS], NUMBER)
            if PROJECT:
                shift = tl.load(Q_SHIFT + row, real, 0.0)
            phi = phi_of(
                *(Q, row.to(tl.int64) * q_row, real, position, 0, width, count, scale, turn),
                *(ROWS_OF, shift, F, D, False, EVEN, FUNCTION, PARTS, PROJECT, PRECISION),
                *(NUMBER, INPUT),
            )
            made = tl.dot(phi, state.to(INPUT), input_precision=PRECISION, out_dtype=NUMBER)
            length = tl.zeros([ROWS], NUMBER)
            if NORMALIZE:
                length = tl.sum(phi.to(NUMBER) * ones[None, :], 1)
            if DECAY:
                power = power_of(LOGS, head, tl.maximum(position - met_at, 0), NUMBER, DECAY)
                made *= power[:, None]
                length *= power
            if NORMALIZE:
                if value_block == 0:
                    tl.store(LENGTH + row, length, real)
                made /= tl.where(length == 0, float("inf"), length)[:, None]
            put_rows(OUT, row.to(tl.int64) * out_row, real, e, value_width, made, EVEN)
