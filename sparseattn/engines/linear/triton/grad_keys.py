"""Gradients of keys, by tiles of keys: see `grad_queries.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from .features import features, not_finite, number_of
from .forward import decay_of
from .grad_queries import put_gradient, take_gradient
from .states import power_of


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
