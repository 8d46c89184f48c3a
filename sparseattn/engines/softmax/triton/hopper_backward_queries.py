"""Gradients of queries on Hopper in Gluon: see `hopper_backward`. Rows are queries here."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_backward import _LOG2E, _masked, _phases, _product, _span
from .hopper_parts import _barrier, _flat, _let_go, _operand, _power, _to_global, _to_shared


@triton.jit(do_not_specialize=["lse_batch", "lse_head", "n"])
def deltas(
    GRAD,
    OUT,
    GRAD_LSE,
    DELTA,
    grad_batch,
    grad_head,
    grad_row,
    out_batch,
    out_head,
    out_row,
    lse_batch,
    lse_head,
    n,
    LSE_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    DV: tl.constexpr,
):
    """Program (tile of rows, head, batch row): `grad . out - grad_lse` of its rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    real = row < n
    e = tl.arange(0, DV)
    grad_at = batch * grad_batch + head * grad_head + (row * grad_row)[:, None] + e[None, :]
    out_at = batch * out_batch + head * out_head + (row * out_row)[:, None] + e[None, :]
    grad = tl.load(GRAD + grad_at, real[:, None], 0.0).to(tl.float32)
    out = tl.load(OUT + out_at, real[:, None], 0.0).to(tl.float32)
    delta = tl.sum(grad * out, 1)
    at = batch * lse_batch + head * lse_head + row
    if LSE_GRAD:
        delta -= tl.load(GRAD_LSE + at, real, 0.0)
    tl.store(DELTA + at, delta, real)


@gluon.jit
def _load_keys(
    inputs,
    rings,
    barriers,
    place,
    groups,
    ROWS: gl.constexpr,
    SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer."""
    GRAD, Q, K, V = inputs
    g_shared, q_shared, k_shared, v_shared = rings
    q_full, g_full, k_full, k_empty, v_full, v_empty = barriers
    first, head, batch, begin, count = place
    kv_head = head // groups
    mbarrier.expect(q_full, 2 * Q.block_type.nbytes)
    for c in gl.static_range(2):
        _to_shared(Q, [batch, head, first + c * ROWS, 0], q_full, q_shared.index(c))
    mbarrier.expect(g_full, 2 * GRAD.block_type.nbytes)
    for c in gl.static_range(2):
        _to_shared(GRAD, [batch, head, first + c * ROWS, 0], g_full, g_shared.index(c))
    for j in range(count):
        slot = j % STAGES
        phase = ((j // STAGES) & 1) ^ 1
        key = begin + j * SIZE
        mbarrier.wait(k_empty.index(slot), phase)
        mbarrier.expect(k_full.index(slot), K.block_type.nbytes)
        _to_shared(K, [batch, kv_head, key, 0], k_full.index(slot), k_shared.index(slot))
        mbarrier.wait(v_empty.index(slot), phase)
        mbarrier.expect(v_full.index(slot), V.block_type.nbytes)
        _to_shared(V, [batch, kv_head, key, 0], v_full.index(slot), v_shared.index(slot))


@gluon.jit
def _query_blocks(
    start,
    stop,
    d_dots,
    dq,
    shared,
    barriers,
    begin,
    lowest,
    highest,
    lse,
    delta,
    scale,
    MASK: gl.constexpr,
    STAGES: gl.constexpr,
    LATE: gl.constexpr,
    LAYOUT: gl.constexpr,
    INPUT: gl.constexpr,
):
    """Take blocks of keys."""
    q, g, k_shared, v_shared = shared
    k_full, k_empty, v_full, v_empty = barriers
    Q_LAYOUT: gl.constexpr = dq.type.layout
    SIZE: gl.constexpr = k_shared.shape[3]
    for j in range(start, stop):
        slot = j % STAGES
        dots = _product(q, k_shared, k_full, j, LAYOUT, STAGES)
        d_weights = _product(g, v_shared, v_full, j, LAYOUT, STAGES)
        if LATE:
            # Before the first block there is a sum of nothing.
            before = gl.maximum(j - 1, 0) % STAGES
            dq = warpgroup_mma(d_dots, _flat(k_shared.index(before)), dq, is_async=True)
            dots = warpgroup_mma_wait(2, deps=[dots])
        else:
            dots = warpgroup_mma_wait(1, deps=[dots])
        dots = _masked(dots, lowest, highest, begin + j * SIZE, MASK)
        powers = _power(dots * scale - lse[:, None])
        if LATE:
            d_weights, dq, d_dots = warpgroup_mma_wait(0, deps=[d_weights, dq, d_dots])
            _barrier()
            mbarrier.arrive(k_empty.index(before), pred=j > 0)
            mbarrier.arrive(v_empty.index(slot))
            d_dots = _operand(powers * (d_weights - delta[:, None]), Q_LAYOUT, INPUT)
        else:
            d_weights = warpgroup_mma_wait(0, deps=[d_weights])
            _let_go(v_empty.index(slot))
            d_dots = _operand(powers * (d_weights - delta[:, None]), Q_LAYOUT, INPUT)
            dq = warpgroup_mma(d_dots, _flat(k_shared.index(slot)), dq, is_async=True)
            dq, d_dots = warpgroup_mma_wait(0, deps=[dq, d_dots])
            _let_go(k_empty.index(slot))
    return d_dots, dq


@gluon.jit
def _sum_queries(
    memory,
    rings,
    barriers,
    band,
    place,
    numbers,
    WHICH: gl.constexpr,
    ROWS: gl.constexpr,
    SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    LATE: gl.constexpr,
):
    """Consumer WHICH: its ROWS queries."""
    DQ, LSE, DELTA, lse_batch, lse_head = memory
    g_shared, q_shared, k_shared, v_shared = rings
    q_full, g_full, k_full, k_empty, v_full, v_empty = barriers
    n, m, low, high = band
    scale, slope = numbers
    first, head, batch, begin, count = place
    INPUT: gl.constexpr = q_shared.dtype
    D: gl.constexpr = q_shared.shape[4]
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SIZE, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    own = first + WHICH * ROWS
    query = own + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    lse_at = batch.to(gl.int64) * lse_batch + head.to(gl.int64) * lse_head
    lse = gl.load(LSE + lse_at + query, query < n, float("inf"))
    delta = gl.load(DELTA + lse_at + query, query < n, 0.0)
    # A row that saw nothing has no powers.
    lse = gl.where(lse == float("-inf"), float("inf"), lse) * _LOG2E
    lowest = query + low
    highest = gl.minimum(query + high, m - 1)
    left, right = _phases(own, begin, count, low, gl.minimum(high, m - 1 - own), ROWS, SIZE)
    q = _flat(q_shared.index(WHICH))
    shared = (q, _flat(g_shared.index(WHICH)), k_shared, v_shared)
    turns = (k_full, k_empty, v_full, v_empty)
    dq = gl.zeros([ROWS, D], gl.float32, layout=Q_LAYOUT)
    d_dots = gl.zeros([ROWS, SIZE], INPUT, layout=gl.DotOperandLayout(0, Q_LAYOUT, 2))
    mbarrier.wait(q_full, 0)
    mbarrier.wait(g_full, 0)
    d_dots, dq = _query_blocks(
        *(0, left, d_dots, dq, shared, turns, begin, lowest, highest, lse, delta, scale),
        *("both", STAGES, LATE, LAYOUT, INPUT),
    )
    d_dots, dq = _query_blocks(
        *(left, right, d_dots, dq, shared, turns, begin, lowest, highest, lse, delta, scale),
        *("", STAGES, LATE, LAYOUT, INPUT),
    )
    d_dots, dq = _query_blocks(
        *(right, count, d_dots, dq, shared, turns, begin, lowest, highest, lse, delta, scale),
        *("upper", STAGES, LATE, LAYOUT, INPUT),
    )
    if LATE:
        dq = warpgroup_mma(d_dots, _flat(k_shared.index((count - 1) % STAGES)), dq, is_async=True)
        dq, d_dots = warpgroup_mma_wait(0, deps=[dq, d_dots])
    # The queries of this consumer have been read.
    _barrier()
    q.store((dq * slope).to(INPUT))
    fence_async_shared()
    _barrier()
    _to_global(DQ, [batch, head, own, 0], q_shared.index(WHICH))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        *("LSE", "DELTA", "lse_batch", "lse_head", "n", "m", "low", "high"),
        *("tiles", "heads", "groups", "scale", "slope"),
    ]
)
def grad_queries_specialised(
    LSE,
    DELTA,
    GRAD,
    Q,
    K,
    V,
    DQ,
    lse_batch,
    lse_head,
    n,
    m,
    low,
    high,
    tiles,
    heads,
    groups,
    scale,
    slope,
    ROWS: gl.constexpr,
    SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    LATE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Gradients of queries in a band: query r sees the keys from `low + r` to `high + r`.

    Args:
        LSE, DELTA: float32 `[B, heads, n]`, and their steps along the first two.
        GRAD, Q, DQ: descriptors of `[B, heads, n, D]` in blocks of ROWS queries, two of which are a
            tile. What is outside of them is read as 0, and not written.
        K, V: descriptors of `[B, H, m, D]` in blocks of SIZE keys.
        tiles: for each of `heads` heads and each batch row.
        groups: query heads of a head of K and V.
        scale: of q . k, in base 2; above 0. slope: the scale itself.
    """
    INPUT: gl.constexpr = Q.dtype
    D: gl.constexpr = Q.block_type.shape[3]
    DV: gl.constexpr = V.block_type.shape[3]
    q_shared = gl.allocate_shared_memory(INPUT, [2, 1, 1, ROWS, D], Q.layout)
    g_shared = gl.allocate_shared_memory(INPUT, [2, 1, 1, ROWS, DV], GRAD.layout)
    k_shared = gl.allocate_shared_memory(INPUT, [STAGES, 1, 1, SIZE, D], K.layout)
    v_shared = gl.allocate_shared_memory(INPUT, [STAGES, 1, 1, SIZE, DV], V.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    g_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    mbarrier.init(g_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    index = gl.program_id(0)
    # The last queries come first: under causal they see the most keys.
    first = (tiles - 1 - index % tiles) * (2 * ROWS)
    head = index // tiles % heads
    batch = index // tiles // heads
    begin, count = _span(first, 2 * ROWS, low, high, n, m, SIZE)
    place = (first, head, batch, begin, count)
    band = (n, m, low, high)
    barriers = (q_full, g_full, k_full, k_empty, v_full, v_empty)
    rings = (g_shared, q_shared, k_shared, v_shared)
    inputs = (GRAD, Q, K, V)
    memory = (DQ, LSE, DELTA, lse_batch, lse_head)
    numbers = (scale, slope)
    gl.warp_specialize(
        [
            (
                _sum_queries,
                (memory, rings, barriers, band, place, numbers, 0, ROWS, SIZE, STAGES, LATE),
            ),
            (
                _sum_queries,
                (memory, rings, barriers, band, place, numbers, 1, ROWS, SIZE, STAGES, LATE),
            ),
            (_load_keys, (inputs, rings, barriers, place, groups, ROWS, SIZE, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
