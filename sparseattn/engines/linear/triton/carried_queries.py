"""Gradients of queries by programs that carry the states of keys, forwards along a span.

The formulas are those of `grad_queries.py`. Here `mean_i = g_i . out_i` is summed first, pair by
pair and through the state, in a kernel of its own: it needs every feature of a row, and the
gradient of a block of features does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .carried_rows import into_rows, phi_of, within
from .features import not_finite, number_of, raw_rows
from .states import power_of


@triton.jit(do_not_specialize=["mask_batch", "width", "value_width", "count", "slots", "span"])
def carried_means(
    Q,
    K,
    V,
    GRAD,
    LENGTH,
    PARTIAL,
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
    partial_block,
    partial_batch,
    partial_head,
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
    """Program (span x block of values, query head, batch row), as `carried_outputs`.

    Writes LENGTH, the row sums, inf for 0; and PARTIAL `[blocks, B, Hq, N]`, what the values of the
    block add to `sum_j W_ij (g_i . v_j)`.
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
    q_first = tl.load(run + 1)
    k_first = tl.load(run + 3)
    Q += batch * q_batch + head * q_head + q_first * q_row
    GRAD += batch * grad_batch + head * grad_head + q_first * grad_row
    LENGTH += batch * length_batch + head * length_head + q_first
    PARTIAL += value_block.to(tl.int64) * partial_block
    PARTIAL += batch * partial_batch + head * partial_head + q_first
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
    ones = tl.load(STATE + count * PARTS * value_width + f, f < count * PARTS, 0.0)
    since = power_of(LOGS, head, r, NUMBER, DECAY)
    until = power_of(LOGS, head, ROWS - r, NUMBER, DECAY)
    across = power_of(LOGS, head, ROWS + tl.zeros([1], tl.int32), NUMBER, DECAY)
    pairs = within(LOGS, head, ROWS, NUMBER, DECAY)

    for at in range(begin, tl.minimum(begin + span, offset + n), ROWS):
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
        length = tl.sum(phi.to(NUMBER) * ones[None, :], 1)
        grad = raw_rows(GRAD, row.to(tl.int64) * grad_row, real, e, value_width, EVEN)
        made = tl.dot(phi, state.to(INPUT), input_precision=PRECISION, out_dtype=NUMBER)
        total = tl.sum(made * grad.to(NUMBER), 1)
        if WALK:
            there = position < m
            if HOLES:
                there = there & (tl.load(KEY_MASK + position, there, 0) != 0)
            key_shift = tl.zeros([ROWS], NUMBER)
            if PROJECT:
                key_shift = tl.load(K_SHIFT + position, there, 0.0)
            phi_k = phi_of(
                *(K, position.to(tl.int64) * k_row, there, position, 0, width, count, key_scale),
                *(turn, ROWS_OF, key_shift, F, D, True, EVEN, FUNCTION, PARTS, PROJECT),
                *(PRECISION, NUMBER, INPUT),
            )
            one = tl.where(there, until, 0.0)
            ones = ones * across + tl.sum(phi_k.to(NUMBER) * one[None, :], 1)
            v = raw_rows(V, position.to(tl.int64) * v_row, there, e, value_width, EVEN)
            added = (v.to(NUMBER) * until[:, None]).to(INPUT) if DECAY else v.to(INPUT)
            scores = tl.dot(phi, phi_k, input_precision=PRECISION, out_dtype=NUMBER)
            d_w = tl.dot(
                grad.to(INPUT), tl.trans(v.to(INPUT)), input_precision=PRECISION, out_dtype=NUMBER
            )
            if DECAY:
                length *= since
                total *= since
                scores *= pairs
                state *= across[:, None]
            state = tl.dot(phi_k, added, state, input_precision=PRECISION, out_dtype=NUMBER)
            seen = (r[None, :] <= r[:, None]) & there[None, :]
            length += tl.sum(tl.where(seen, scores, 0.0), 1)
            total += tl.sum(tl.where(seen, scores * d_w, 0.0), 1)
        elif DECAY:
            power = power_of(LOGS, head, tl.maximum(position - met_at, 0), NUMBER, DECAY)
            length *= power
            total *= power
        if value_block == 0:
            tl.store(LENGTH + row, tl.where(length == 0, float("inf"), length), real)
        tl.store(PARTIAL + row, total, real)


@triton.jit(do_not_specialize=["mask_batch", "width", "value_width", "count", "slots", "span"])
def carried_grad_queries(
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
    """Program (span x block of features, query head, batch row); LENGTH is not 0."""
    blocks = (count * PARTS + F - 1) // F
    tile = TILES + tl.program_id(0) // blocks * 8
    block = tl.program_id(0) % blocks
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
    q_first = tl.load(run + 1)
    k_first = tl.load(run + 3)
    Q += batch * q_batch + head * q_head + q_first * q_row
    DQ += batch * dq_batch + head * dq_head + q_first * dq_row
    GRAD += batch * grad_batch + head * grad_head + q_first * grad_row
    K += batch * k_batch + kv_head * k_head + k_first * k_row
    V += batch * v_batch + kv_head * v_head + k_first * v_row
    KEY_MASK += batch * mask_batch + k_first
    if NORMALIZE:
        LENGTH += batch * length_batch + head * length_head + q_first
        MEAN += batch * length_batch + head * length_head + q_first
    if PROJECT:
        Q_SHIFT += batch * length_batch + head * length_head + q_first
        K_SHIFT += batch * shift_batch + kv_head * shift_head + k_first

    r = tl.arange(0, ROWS)
    e = tl.arange(0, E)
    f = block * F + tl.arange(0, F)
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
    # `[E, F]`: so held, it is a factor as it is.
    state = tl.trans(raw_rows(STATE, f * state_row, f < count * PARTS, e, value_width, EVEN))
    ones = tl.zeros([F], NUMBER)
    if NORMALIZE:
        ones = tl.load(STATE + count * PARTS * value_width + f, f < count * PARTS, 0.0)
    since = power_of(LOGS, head, r, NUMBER, DECAY)
    until = power_of(LOGS, head, ROWS - r, NUMBER, DECAY)
    across = power_of(LOGS, head, ROWS + tl.zeros([1], tl.int32), NUMBER, DECAY)
    pairs = within(LOGS, head, ROWS, NUMBER, DECAY)

    for at in range(begin, tl.minimum(begin + span, offset + n), ROWS):
        position = at + r
        row = position - offset
        real = (row >= 0) & (row < n)
        if CAUSAL:
            real = real & (position >= 0)
        if DECAY and not WALK:
            since = power_of(LOGS, head, tl.maximum(position - met_at, 0), NUMBER, DECAY)
        grad = raw_rows(GRAD, row.to(tl.int64) * grad_row, real, e, value_width, EVEN).to(INPUT)
        d_phi = tl.dot(grad, state.to(INPUT), input_precision=PRECISION, out_dtype=NUMBER)
        mean = tl.zeros([ROWS], NUMBER)
        if NORMALIZE:
            mean = tl.load(MEAN + row, real, 0.0)
            d_phi -= mean[:, None] * ones[None, :]
        if DECAY:
            d_phi *= since[:, None]
        if WALK:
            there = position < m
            if HOLES:
                there = there & (tl.load(KEY_MASK + position, there, 0) != 0)
            key_shift = tl.zeros([ROWS], NUMBER)
            if PROJECT:
                key_shift = tl.load(K_SHIFT + position, there, 0.0)
            phi_k = phi_of(
                *(K, position.to(tl.int64) * k_row, there, position, block, width, count),
                *(key_scale, turn, ROWS_OF, key_shift, F, D, False, EVEN, FUNCTION, PARTS),
                *(PROJECT, PRECISION, NUMBER, INPUT),
            )
            if NORMALIZE:
                one = tl.where(there, until, 0.0)
                ones = ones * across + tl.sum(phi_k.to(NUMBER) * one[:, None], 0)
            # As in the outputs, of the features of keys.
            bad = not_finite(phi_k.to(NUMBER))
            some = tl.max(bad.to(tl.int32))
            finite = tl.where(bad, 0.0, phi_k.to(NUMBER)).to(INPUT)
            v = raw_rows(V, position.to(tl.int64) * v_row, there, e, value_width, EVEN)
            v = tl.trans(v.to(INPUT))
            added = (phi_k.to(NUMBER) * until[:, None]).to(INPUT) if DECAY else phi_k
            d_w = tl.dot(grad, v, input_precision=PRECISION, out_dtype=NUMBER)
            if NORMALIZE:
                d_w -= mean[:, None]
            if DECAY:
                d_w *= pairs
                state *= across[:, None]
            d_w = tl.where((r[None, :] <= r[:, None]) & there[None, :], d_w, 0.0)
            d_phi = tl.dot(
                d_w.to(INPUT), finite, d_phi, input_precision=PRECISION, out_dtype=NUMBER
            )
            state = tl.dot(v, added, state, input_precision=PRECISION, out_dtype=NUMBER)
            if some > 0:
                lost = tl.min(tl.where(bad, r[:, None], ROWS), 0)
                d_phi = tl.where(r[:, None] >= lost[None, :], float("nan"), d_phi)
        if NORMALIZE:
            d_phi *= (1.0 / tl.load(LENGTH + row, real, 1.0))[:, None]
        shift = tl.zeros([ROWS], NUMBER)
        if PROJECT:
            shift = tl.load(Q_SHIFT + row, real, 0.0)
        into_rows(
            *(DQ, row.to(tl.int64) * dq_row, d_phi, Q, row.to(tl.int64) * q_row, real),
            *(position, block, width, count, scale, turn, ROWS_OF, shift, F, D, EVEN, FUNCTION),
            *(MOST, PARTS, PROJECT, PRECISION, NUMBER, INPUT, ROWS),
        )
