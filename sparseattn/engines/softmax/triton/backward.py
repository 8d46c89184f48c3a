"""Backward: gradients of queries by tiles of queries, those of keys and values by tiles of keys.

Two kernels, so that each gradient is summed by one program in one order: no atomics, the same bits
every time (FlashAttention-2, algorithm 2, cut in two). The first also works out
`delta = grad . out - grad_lse`, which the second reads. Both make the weights anew, from the total
lse of their rows: with sink logits, or over part of the keys, the sums come out right. Products
whose result is transposed are made transposed: Triton before 3.7.1 miscompiles the transpose of a
cast accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .weights import (
    any_in_tile,
    band_of,
    between,
    edge_of,
    in_width,
    logits,
    norm_of,
    seen_in_tile,
)


@triton.jit(do_not_specialize=["lse_batch", "lse_head", "mask_batch"])
def grad_queries(
    GRAD,
    Q,
    K,
    V,
    OUT,
    LSE,
    GRAD_LSE,
    DELTA,
    DQ,
    RUNS,
    TILES,
    COLS,
    LOOKS,
    MASKS,
    KEY_MASK,
    grad_batch,
    grad_head,
    grad_row,
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
    dq_batch,
    dq_head,
    dq_row,
    lse_batch,
    lse_head,
    mask_batch,
    scale,
    scale_rest,
    cap,
    cap_rest,
    slope,
    slope_rest,
    head_dim,
    value_dim,
    groups,
    LSE_GRAD: tl.constexpr,
    BAND: tl.constexpr,
    HOLES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PACK: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program (tile, head block, batch row), as in `forward`; writes DQ and DELTA.

    LSE, GRAD_LSE (if LSE_GRAD) and DELTA share their strides; `slope` is the scale itself.
    """
    QUERIES: tl.constexpr = ROWS // PACK
    tile = TILES + tl.program_id(0) * 8
    run = RUNS + tl.load(tile) * 8
    first = tl.load(tile + 1) * QUERIES
    batch = (tl.load(run) + tl.program_id(2)).to(tl.int64)
    n = tl.load(run + 2)
    k_first = tl.load(run + 3).to(tl.int64)
    m = tl.load(run + 4)
    low = tl.load(run + 5)
    high = tl.load(run + 6)
    scale = tl.cast(scale, NUMBER) + tl.cast(scale_rest, NUMBER)
    cap = tl.cast(cap, NUMBER) + tl.cast(cap_rest, NUMBER)
    slope = tl.cast(slope, NUMBER) + tl.cast(slope_rest, NUMBER)

    row = tl.arange(0, ROWS)
    query = first + row // PACK
    head = (tl.program_id(1) * PACK + row % PACK).to(tl.int64)
    kv_head = (tl.program_id(1) * PACK // groups).to(tl.int64)
    real = query < n
    place = (tl.load(run + 1) + query).to(tl.int64)
    d = tl.arange(0, D)
    e = tl.arange(0, DV)
    in_d = in_width(real, d, head_dim, EVEN)
    in_e = in_width(real, e, value_dim, EVEN)
    q_at = batch * q_batch + (head * q_head + place * q_row)[:, None] + d[None, :]
    q = tl.load(Q + q_at, mask=in_d, other=0.0).to(INPUT)
    grad_at = batch * grad_batch + (head * grad_head + place * grad_row)[:, None] + e[None, :]
    grad = tl.load(GRAD + grad_at, mask=in_e, other=0.0).to(INPUT)
    out_at = batch * out_batch + (head * out_head + place * out_row)[:, None] + e[None, :]
    out = tl.load(OUT + out_at, mask=in_e, other=0.0)
    lse_at = batch * lse_batch + head * lse_head + place
    lse = tl.load(LSE + lse_at, mask=real, other=float("inf"))
    delta = tl.sum(grad.to(NUMBER) * out.to(NUMBER), 1)
    if LSE_GRAD:
        delta -= tl.load(GRAD_LSE + lse_at, mask=real, other=0.0).to(NUMBER)
    tl.store(DELTA + lse_at, delta, mask=real)
    norm = norm_of(lse)
    # Within a tile offsets are 32 bits wide: 64 for every element would spill.
    span = tl.arange(0, KEYS)
    key_at = K + batch * k_batch + kv_head * k_head + k_first * k_row
    value_at = V + batch * v_batch + kv_head * v_head + k_first * v_row
    k_offset = span[:, None] * k_row + d[None, :]
    v_offset = span[:, None] * v_row + e[None, :]
    hole_at = KEY_MASK + batch * mask_batch + k_first
    dq = tl.zeros([ROWS, D], NUMBER)

    if BAND:
        lowest = low + query
        highest = tl.minimum(high + query, m - 1)
        begin, end, inner, outer, left, edges = band_of(low, high, first, QUERIES, n, m, KEYS)
    else:
        begin = tl.load(tile + 2)
        end = tl.load(tile + 4)
        outer = tl.load(tile + 3)
    for MASKED in tl.static_range(2):
        if MASKED:
            start, stop = (0, edges) if BAND else (outer, end)
        else:
            start, stop = (inner, outer) if BAND else (begin, outer)
        if start < stop:  # as in `forward`
            for at in tl.range(start, stop, KEYS if BAND and not MASKED else 1):
                if not BAND:
                    base = tl.load(COLS + at) * KEYS
                elif MASKED:
                    base = edge_of(at, begin, outer, left, KEYS)
                else:
                    base = at
                key = base + span
                seen = real[:, None]
                some = key < m  # seen by any row of the tile
                if MASKED:
                    if BAND:
                        seen = between(key, lowest, highest)
                        some = (key >= low + first) & (key < end)
                    else:
                        look = tl.load(LOOKS + at)
                        seen = seen_in_tile(MASKS, look, row // PACK, span, QUERIES, KEYS)
                        some = any_in_tile(MASKS, look, span, QUERIES, KEYS)
                if HOLES:
                    allowed = tl.load(hole_at + key, mask=key < m, other=0) != 0
                    seen = seen & allowed[None, :]
                    some = some & allowed
                k_at = key_at + tl.cast(base, tl.int64) * k_row + k_offset
                v_at = value_at + tl.cast(base, tl.int64) * v_row + v_offset
                if EVEN and not (MASKED or HOLES):
                    k = tl.load(k_at)
                    v = tl.load(v_at)
                else:
                    k = tl.load(k_at, in_width(some, d, head_dim, EVEN), 0.0)
                    v = tl.load(v_at, in_width(some, e, value_dim, EVEN), 0.0)
                k = k.to(INPUT)
                dots = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=NUMBER)
                s, bend = logits(dots, scale, cap, SOFTCAP)
                d_weights = tl.dot(
                    grad, tl.trans(v.to(INPUT)), input_precision=PRECISION, out_dtype=NUMBER
                )
                d_dots = tl.exp2(s - norm[:, None]) * (d_weights - delta[:, None]) * bend
                if MASKED or HOLES:
                    d_dots = tl.where(seen, d_dots, 0.0)
                dq = tl.dot(d_dots.to(INPUT), k, dq, input_precision=PRECISION, out_dtype=NUMBER)

    dq_at = batch * dq_batch + (head * dq_head + place * dq_row)[:, None] + d[None, :]
    tl.store(DQ + dq_at, (dq * slope).to(DQ.dtype.element_ty), mask=in_d)


@triton.jit(do_not_specialize=["lse_batch", "lse_head", "mask_batch"])
def grad_keys(
    GRAD,
    Q,
    K,
    V,
    LSE,
    DELTA,
    DK,
    DV_,
    RUNS,
    TILES,
    COLS,
    LOOKS,
    MASKS,
    KEY_MASK,
    grad_batch,
    grad_head,
    grad_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    dk_batch,
    dk_head,
    dk_row,
    dv_batch,
    dv_head,
    dv_row,
    lse_batch,
    lse_head,
    mask_batch,
    scale,
    scale_rest,
    cap,
    cap_rest,
    slope,
    slope_rest,
    head_dim,
    value_dim,
    groups,
    BAND: tl.constexpr,
    HOLES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program (tile of keys, key-value head, batch row) over a transposed plan; writes DK and DV_.

    Every query head of the group is summed here, in order: ROWS are queries of one.
    """
    tile = TILES + tl.program_id(0) * 8
    run = RUNS + tl.load(tile) * 8
    first = tl.load(tile + 1) * KEYS
    batch = (tl.load(run) + tl.program_id(2)).to(tl.int64)
    q_first = tl.load(run + 1)
    n = tl.load(run + 2)
    k_first = tl.load(run + 3)
    m = tl.load(run + 4)
    low = tl.load(run + 5)
    high = tl.load(run + 6)
    scale = tl.cast(scale, NUMBER) + tl.cast(scale_rest, NUMBER)
    cap = tl.cast(cap, NUMBER) + tl.cast(cap_rest, NUMBER)
    slope = tl.cast(slope, NUMBER) + tl.cast(slope_rest, NUMBER)

    span = tl.arange(0, KEYS)
    key = first + span
    kv_head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    e = tl.arange(0, DV)
    allowed = key < m
    if HOLES:
        hole_at = KEY_MASK + batch * mask_batch + k_first
        allowed = allowed & (tl.load(hole_at + key, mask=key < m, other=0) != 0)
    place = (k_first + key).to(tl.int64)
    in_d = in_width(key < m, d, head_dim, EVEN)
    in_e = in_width(key < m, e, value_dim, EVEN)
    k_at = batch * k_batch + (kv_head * k_head + place * k_row)[:, None] + d[None, :]
    k = tl.load(K + k_at, mask=in_d, other=0.0).to(INPUT)
    v_at = batch * v_batch + (kv_head * v_head + place * v_row)[:, None] + e[None, :]
    v = tl.load(V + v_at, mask=in_e, other=0.0).to(INPUT)
    dk = tl.zeros([KEYS, D], NUMBER)
    dv = tl.zeros([KEYS, DV], NUMBER)
    row = tl.arange(0, ROWS)
    q_offset = row[:, None] * q_row + d[None, :]
    grad_offset = row[:, None] * grad_row + e[None, :]

    # The band as keys see it: key j is seen by the queries from `j - high` to `j - low`.
    if BAND:
        lowest = key - high
        highest = tl.minimum(key - low, n - 1)  # a key that no query sees may be NaN
        begin, end, inner, outer, left, edges = band_of(-high, -low, first, KEYS, m, n, ROWS)
    else:
        begin = tl.load(tile + 2)
        end = tl.load(tile + 4)
        outer = tl.load(tile + 3)
    for group in range(0, groups):
        head = kv_head * groups + group
        q_at = Q + batch * q_batch + head * q_head + q_offset
        grad_at = GRAD + batch * grad_batch + head * grad_head + grad_offset
        lse_at = batch * lse_batch + head * lse_head + row
        for MASKED in tl.static_range(2):
            if MASKED:
                start, stop = (0, edges) if BAND else (outer, end)
            else:
                start, stop = (inner, outer) if BAND else (begin, outer)
            if start < stop:  # as in `forward`
                for at in tl.range(start, stop, ROWS if BAND and not MASKED else 1):
                    if not BAND:
                        base = tl.load(COLS + at) * ROWS
                    elif MASKED:
                        base = edge_of(at, begin, outer, left, ROWS)
                    else:
                        base = at
                    query = base + row
                    some = query < n  # sees any key of the block
                    seen = allowed[:, None]
                    if MASKED:
                        if BAND:
                            seen = seen & between(query, lowest, highest)
                            some = (query >= first - high) & (query < end)
                        else:
                            look = tl.load(LOOKS + at)
                            seen = seen & seen_in_tile(MASKS, look, span, row, KEYS, ROWS)
                            seen = seen & some[None, :]
                            some = some & any_in_tile(MASKS, look, row, KEYS, ROWS)
                    start_row = tl.cast(q_first + base, tl.int64)
                    q_row_at = q_at + start_row * q_row
                    grad_row_at = grad_at + start_row * grad_row
                    lse_row_at = lse_at + start_row
                    if EVEN and BAND and not MASKED:
                        q = tl.load(q_row_at)
                        grad = tl.load(grad_row_at)
                        lse = tl.load(LSE + lse_row_at)
                        delta = tl.load(DELTA + lse_row_at)
                    else:
                        q = tl.load(q_row_at, in_width(some, d, head_dim, EVEN), 0.0)
                        grad = tl.load(grad_row_at, in_width(some, e, value_dim, EVEN), 0.0)
                        lse = tl.load(LSE + lse_row_at, some, float("inf"))
                        delta = tl.load(DELTA + lse_row_at, some, 0.0)
                    q = q.to(INPUT)
                    grad = grad.to(INPUT)
                    norm = norm_of(lse)
                    dots = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=NUMBER)
                    s, bend = logits(dots, scale, cap, SOFTCAP)
                    powers = tl.exp2(s - norm[None, :])
                    if MASKED or HOLES:
                        powers = tl.where(seen, powers, 0.0)
                    dv = tl.dot(
                        powers.to(INPUT), grad, dv, input_precision=PRECISION, out_dtype=NUMBER
                    )
                    d_weights = tl.dot(
                        v, tl.trans(grad), input_precision=PRECISION, out_dtype=NUMBER
                    )
                    d_dots = powers * (d_weights - delta[None, :]) * bend
                    if MASKED or HOLES:
                        d_dots = tl.where(seen, d_dots, 0.0)
                    dk = tl.dot(
                        d_dots.to(INPUT), q, dk, input_precision=PRECISION, out_dtype=NUMBER
                    )

    dk_at = batch * dk_batch + (kv_head * dk_head + place * dk_row)[:, None] + d[None, :]
    tl.store(DK + dk_at, (dk * slope).to(DK.dtype.element_ty), mask=in_d)
    dv_at = batch * dv_batch + (kv_head * dv_head + place * dv_row)[:, None] + e[None, :]
    tl.store(DV_ + dv_at, dv.to(DV_.dtype.element_ty), mask=in_e)
