"""Gradients of values, by tiles of keys: see `grad_queries.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from .features import features, not_finite, number_of
from .forward import decay_of
from .states import power_of


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
