"""Gradients of keys and of values by programs that carry the states of queries, backwards along a
span: the mirror image of `carried_queries.py`, and of the outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .carried_rows import into_rows, phi_of, within
from .features import not_finite, number_of, put_rows, raw_rows
from .states import power_of


@triton.jit(do_not_specialize=["mask_batch", "width", "value_width", "count", "slots", "span"])
def carried_grad_keys(
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
    """Program (span x block of features, head of the state, batch row).

    With a decay DK has the heads of queries, to be summed for each of keys.
    """
    blocks = (count * PARTS + F - 1) // F
    tile = TILES + tl.program_id(0) // blocks * 8
    block = tl.program_id(0) % blocks
    run = RUNS + tl.load(tile) * 9
    batch = tl.load(run) + tl.program_id(2)
    n = tl.load(run + 2).to(tl.int32)
    m = tl.load(run + 4).to(tl.int32)
    offset = tl.load(run + 5).to(tl.int32)
    begin = tl.load(tile + 1).to(tl.int32)
    state_head = tl.program_id(1).to(tl.int64)
    # With a decay a query head has its own state, and here its own program.
    kv_head = state_head // groups if DECAY else state_head
    first_head = state_head if DECAY else state_head * groups
    members = 1 if DECAY else groups
    scale = number_of(scale, scale_rest, NUMBER)
    key_scale = number_of(key_scale, key_scale_rest, NUMBER)
    turn = number_of(turn, turn_rest, NUMBER)
    q_first = tl.load(run + 1)
    k_first = tl.load(run + 3)
    Q += batch * q_batch + q_first * q_row
    GRAD += batch * grad_batch + q_first * grad_row
    K += batch * k_batch + kv_head * k_head + k_first * k_row
    KEY_MASK += batch * mask_batch + k_first
    V += batch * v_batch + kv_head * v_head + k_first * v_row
    DK += batch * dk_batch + state_head * dk_head + k_first * dk_row
    if NORMALIZE:
        LENGTH += batch * length_batch + q_first
        MEAN += batch * length_batch + q_first
    if PROJECT:
        Q_SHIFT += batch * length_batch + q_first
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
    STATE += (slot * tl.num_programs(1) + state_head) * size
    # `[E, F]`: so held, it is a factor as it is.
    state = tl.trans(raw_rows(STATE, f * state_row, f < count * PARTS, e, value_width, EVEN))
    ones = tl.zeros([F], NUMBER)
    if NORMALIZE:
        ones = tl.load(STATE + count * PARTS * value_width + f, f < count * PARTS, 0.0)
    since = power_of(LOGS, state_head, r, NUMBER, DECAY)
    until = power_of(LOGS, state_head, ROWS - r, NUMBER, DECAY)
    across = power_of(LOGS, state_head, ROWS + tl.zeros([1], tl.int32), NUMBER, DECAY)
    pairs = within(LOGS, state_head, ROWS, NUMBER, DECAY)
    stop = tl.minimum(begin + span, tl.maximum(m, offset + n) if WALK else m)

    for back in range(0, tl.cdiv(stop - begin, ROWS)):
        # Queries of a chunk see its keys and those before: the last chunk comes first.
        at = begin + (tl.cdiv(stop - begin, ROWS) - 1 - back) * ROWS
        key = at + r
        real = key < m
        if HOLES:
            real = real & (tl.load(KEY_MASK + key, real, 0) != 0)
        key_shift = tl.zeros([ROWS], NUMBER)
        if PROJECT:
            key_shift = tl.load(K_SHIFT + key, real, 0.0)
        v = raw_rows(V, key.to(tl.int64) * v_row, real, e, value_width, EVEN).to(INPUT)
        d_phi = tl.dot(v, state.to(INPUT), input_precision=PRECISION, out_dtype=NUMBER)
        if NORMALIZE:
            d_phi += ones[None, :]
        if WALK:
            if DECAY:
                d_phi *= until[:, None]
                state *= across[:, None]
                ones *= across
            row = key - offset
            there = (row >= 0) & (row < n)
            for member in range(0, members):
                head = first_head + member
                shift = tl.zeros([ROWS], NUMBER)
                if PROJECT:
                    shift = tl.load(Q_SHIFT + head * length_head + row, there, 0.0)
                phi = phi_of(
                    *(Q + head * q_head, row.to(tl.int64) * q_row, there, key, block, width),
                    *(count, scale, turn, ROWS_OF, shift, F, D, False, EVEN, FUNCTION, PARTS),
                    *(PROJECT, PRECISION, NUMBER, INPUT),
                )
                grad = raw_rows(
                    *(GRAD + head * grad_head, row.to(tl.int64) * grad_row, there, e),
                    *(value_width, EVEN),
                )
                grad = tl.trans(grad.to(INPUT))
                by = since
                mean = tl.zeros([ROWS], NUMBER)
                if NORMALIZE:
                    mean = tl.load(MEAN + head * length_head + row, there, 0.0)
                    by = 1.0 / tl.load(LENGTH + head * length_head + row, there, 1.0)
                # As in the outputs, of the features of queries.
                bad = not_finite(phi.to(NUMBER))
                some = tl.max(bad.to(tl.int32))
                finite = tl.where(bad, 0.0, phi.to(NUMBER)).to(INPUT)
                d_w = tl.dot(v, grad, input_precision=PRECISION, out_dtype=NUMBER)
                if NORMALIZE:
                    d_w = (d_w - mean[None, :]) * by[None, :]
                    by *= since
                if DECAY:
                    d_w *= tl.trans(pairs)
                weighed = phi.to(NUMBER) * by[:, None]
                if NORMALIZE:
                    ones -= tl.sum(weighed * mean[:, None], 0)
                added = weighed.to(INPUT) if DECAY or NORMALIZE else phi
                d_w = tl.where((r[:, None] <= r[None, :]) & there[None, :], d_w, 0.0)
                d_phi = tl.dot(
                    d_w.to(INPUT), finite, d_phi, input_precision=PRECISION, out_dtype=NUMBER
                )
                state = tl.dot(grad, added, state, input_precision=PRECISION, out_dtype=NUMBER)
                if some > 0:
                    lost = tl.max(tl.where(bad, r[:, None], -1), 0)
                    d_phi = tl.where(r[:, None] <= lost[None, :], float("nan"), d_phi)
        into_rows(
            *(DK, key.to(tl.int64) * dk_row, d_phi, K, key.to(tl.int64) * k_row, real, key),
            *(block, width, count, key_scale, turn, ROWS_OF, key_shift, F, D, EVEN, FUNCTION),
            *(MOST, PARTS, PROJECT, PRECISION, NUMBER, INPUT, ROWS),
        )


@triton.jit(do_not_specialize=["mask_batch", "width", "value_width", "count", "slots", "span"])
def carried_grad_values(
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
    """Program (span x block of values, head of the state, batch row), as `carried_grad_keys`."""
    blocks = (value_width + E - 1) // E
    tile = TILES + tl.program_id(0) // blocks * 8
    block = tl.program_id(0) % blocks
    run = RUNS + tl.load(tile) * 9
    batch = tl.load(run) + tl.program_id(2)
    n = tl.load(run + 2).to(tl.int32)
    m = tl.load(run + 4).to(tl.int32)
    offset = tl.load(run + 5).to(tl.int32)
    begin = tl.load(tile + 1).to(tl.int32)
    state_head = tl.program_id(1).to(tl.int64)
    # With a decay a query head has its own state, and here its own program.
    kv_head = state_head // groups if DECAY else state_head
    first_head = state_head if DECAY else state_head * groups
    members = 1 if DECAY else groups
    scale = number_of(scale, scale_rest, NUMBER)
    key_scale = number_of(key_scale, key_scale_rest, NUMBER)
    turn = number_of(turn, turn_rest, NUMBER)
    q_first = tl.load(run + 1)
    k_first = tl.load(run + 3)
    Q += batch * q_batch + q_first * q_row
    GRAD += batch * grad_batch + q_first * grad_row
    K += batch * k_batch + kv_head * k_head + k_first * k_row
    KEY_MASK += batch * mask_batch + k_first
    DV += batch * dv_batch + state_head * dv_head + k_first * dv_row
    if NORMALIZE:
        LENGTH += batch * length_batch + q_first
    if PROJECT:
        Q_SHIFT += batch * length_batch + q_first
        K_SHIFT += batch * shift_batch + kv_head * shift_head + k_first

    r = tl.arange(0, ROWS)
    e = block * E + tl.arange(0, E)
    f = tl.arange(0, F)
    slot = tl.load(tile + 2) + tl.program_id(2).to(tl.int64) * slots
    size = tl.cast(count, tl.int64) * PARTS * (value_width + 1)
    state_row = value_width
    if EVEN:  # what these are multiples of, said for wide loads
        size = size // 16 * 16
        state_row = value_width // 16 * 16
    STATE += (slot * tl.num_programs(1) + state_head) * size
    state = raw_rows(STATE, f * state_row, f < count * PARTS, e, value_width, EVEN)
    since = power_of(LOGS, state_head, r, NUMBER, DECAY)
    until = power_of(LOGS, state_head, ROWS - r, NUMBER, DECAY)
    across = power_of(LOGS, state_head, ROWS + tl.zeros([1], tl.int32), NUMBER, DECAY)
    pairs = within(LOGS, state_head, ROWS, NUMBER, DECAY)
    stop = tl.minimum(begin + span, tl.maximum(m, offset + n) if WALK else m)

    for back in range(0, tl.cdiv(stop - begin, ROWS)):
        # Queries of a chunk see its keys and those before: the last chunk comes first.
        at = begin + (tl.cdiv(stop - begin, ROWS) - 1 - back) * ROWS
        key = at + r
        real = key < m
        if HOLES:
            real = real & (tl.load(KEY_MASK + key, real, 0) != 0)
        key_shift = tl.zeros([ROWS], NUMBER)
        if PROJECT:
            key_shift = tl.load(K_SHIFT + key, real, 0.0)
        phi_k = phi_of(
            *(K, key.to(tl.int64) * k_row, real, key, 0, width, count, key_scale, turn),
            *(ROWS_OF, key_shift, F, D, False, EVEN, FUNCTION, PARTS, PROJECT, PRECISION),
            *(NUMBER, INPUT),
        )
        d_v = tl.dot(phi_k, state.to(INPUT), input_precision=PRECISION, out_dtype=NUMBER)
        if WALK:
            if DECAY:
                d_v *= until[:, None]
                state *= across[:, None]
            row = key - offset
            there = (row >= 0) & (row < n)
            for member in range(0, members):
                head = first_head + member
                shift = tl.zeros([ROWS], NUMBER)
                if PROJECT:
                    shift = tl.load(Q_SHIFT + head * length_head + row, there, 0.0)
                phi = phi_of(
                    *(Q + head * q_head, row.to(tl.int64) * q_row, there, key, 0, width, count),
                    *(scale, turn, ROWS_OF, shift, F, D, True, EVEN, FUNCTION, PARTS, PROJECT),
                    *(PRECISION, NUMBER, INPUT),
                )
                grad = raw_rows(
                    *(GRAD + head * grad_head, row.to(tl.int64) * grad_row, there, e),
                    *(value_width, EVEN),
                ).to(NUMBER)
                if NORMALIZE:
                    grad *= (1.0 / tl.load(LENGTH + head * length_head + row, there, 1.0))[:, None]
                # As in the outputs, of the gradients, in which row sums that are lost show.
                bad = not_finite(grad)
                some = tl.max(bad.to(tl.int32))
                finite = tl.where(bad, 0.0, grad).to(INPUT)
                added = (grad * since[:, None]).to(INPUT) if DECAY else grad.to(INPUT)
                weights = tl.dot(phi_k, phi, input_precision=PRECISION, out_dtype=NUMBER)
                if DECAY:
                    weights *= tl.trans(pairs)
                weights = tl.where((r[:, None] <= r[None, :]) & there[None, :], weights, 0.0)
                d_v = tl.dot(
                    weights.to(INPUT), finite, d_v, input_precision=PRECISION, out_dtype=NUMBER
                )
                state = tl.dot(phi, added, state, input_precision=PRECISION, out_dtype=NUMBER)
                if some > 0:
                    lost = tl.max(tl.where(bad, r[:, None], -1), 0)
                    d_v = tl.where(r[:, None] <= lost[None, :], float("nan"), d_v)
        put_rows(DV, key.to(tl.int64) * dv_row, real, e, value_width, d_v, EVEN)
