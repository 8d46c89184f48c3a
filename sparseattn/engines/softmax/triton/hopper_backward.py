"""Backward on Hopper in Gluon: the two kernels of `backward`, for bands, with warps that only load.

As in `hopper`, one warp fills rings by TMA and a consumer is a warpgroup with rows of its own. The
rows of gradients of keys are keys: products of keys and queries are made transposed, so that
weights are the left operand of what is summed, and stay in registers.

A consumer issues both products of a block, takes powers beside the second, and works out the
gradient of the logits beside the sum of values. With LATE it sums gradients of the block before
beside the powers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_parts import (
    _barrier,
    _flat,
    _let_go,
    _operand,
    _power,
    _to_global,
    _to_shared,
    _unless_above,
)

_LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _span(first, count, low, high, n, m, SIZE: gl.constexpr):
    """Where the columns begin that some of `count` rows from `first` on see, and how many blocks of
    them there are: row r of n sees the columns from `low + r` to `high + r`, of m."""
    last = gl.minimum(first + count, n) - 1
    begin = gl.maximum(low + first, 0)
    end = gl.minimum(high + last + 1, m)
    return begin, (end - begin + SIZE - 1) // SIZE


@gluon.jit
def _phases(own, begin, count, low, high, ROWS: gl.constexpr, SIZE: gl.constexpr):
    """Blocks before the first and from the second on are not seen by all of ROWS rows throughout:
    before on both sides, and after on the upper alone."""
    left = gl.maximum(low + own + ROWS - 1 - begin + SIZE - 1, 0) // SIZE
    left = gl.minimum(left, count)
    right = gl.maximum(high + own + 1 - begin, 0) // SIZE
    return left, gl.minimum(gl.maximum(right, left), count)


@gluon.jit
def _masked(dots, lowest, highest, at, MASK: gl.constexpr):
    if MASK != "":
        layout: gl.constexpr = dots.type.layout
        SIZE: gl.constexpr = dots.shape[1]
        column = at + gl.arange(0, SIZE, layout=gl.SliceLayout(0, layout))
        dots = _unless_above(dots, column[None, :], highest[:, None])
        if MASK == "both":
            dots = _unless_above(dots, lowest[:, None], column[None, :])
    return dots


@gluon.jit
def _product(rows, ring, full, j, LAYOUT: gl.constexpr, STAGES: gl.constexpr):
    """Begin the product of rows and block j of a ring, transposed."""
    mbarrier.wait(full.index(j % STAGES), (j // STAGES) & 1)
    columns = _flat(ring.index(j % STAGES))
    ROWS: gl.constexpr = rows.shape[0]
    SIZE: gl.constexpr = columns.shape[0]
    zeros = gl.zeros([ROWS, SIZE], gl.float32, LAYOUT)
    return warpgroup_mma(rows, columns.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _load_queries(
    memory,
    rings,
    barriers,
    band,
    place,
    groups,
    ROWS: gl.constexpr,
    SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer of `grad_keys_specialised`."""
    GRAD, Q, K, V, LSE, DELTA, lse_batch, lse_head = memory
    g_shared, q_shared, k_shared, v_shared, lse_shared, delta_shared = rings
    k_full, v_full, q_full, q_empty, g_full, g_empty = barriers
    n, _, _, _ = band
    first, kv_head, batch, begin, count = place
    mbarrier.expect(k_full, 2 * K.block_type.nbytes)
    for c in gl.static_range(2):
        _to_shared(K, [batch, kv_head, first + c * ROWS, 0], k_full, k_shared.index(c))
    mbarrier.expect(v_full, 2 * V.block_type.nbytes)
    for c in gl.static_range(2):
        _to_shared(V, [batch, kv_head, first + c * ROWS, 0], v_full, v_shared.index(c))
    span = gl.arange(0, SIZE, layout=gl.BlockedLayout([SIZE // 32], [32], [1], [0]))
    used = 0
    for group in range(groups):
        head = kv_head * groups + group
        lse_at = batch.to(gl.int64) * lse_batch + head.to(gl.int64) * lse_head
        for at in range(count):
            j = used + at
            slot = j % STAGES
            phase = ((j // STAGES) & 1) ^ 1
            query = begin + at * SIZE
            real = query + span < n
            lse = gl.load(LSE + lse_at + (query + span), real, float("inf"))
            delta = gl.load(DELTA + lse_at + (query + span), real, 0.0)
            mbarrier.wait(q_empty.index(slot), phase)
            mbarrier.expect(q_full.index(slot), Q.block_type.nbytes)
            _to_shared(Q, [batch, head, query, 0], q_full.index(slot), q_shared.index(slot))
            mbarrier.wait(g_empty.index(slot), phase)
            # A row that saw nothing has no powers.
            lse = gl.where(lse == float("-inf"), float("inf"), lse)
            lse_shared.index(slot).store(lse * _LOG2E)
            delta_shared.index(slot).store(delta)
            _barrier()
            mbarrier.expect(g_full.index(slot), GRAD.block_type.nbytes)
            _to_shared(GRAD, [batch, head, query, 0], g_full.index(slot), g_shared.index(slot))
        used += count


@gluon.jit
def _key_blocks(
    start,
    stop,
    d_dots,
    dk,
    dv,
    shared,
    barriers,
    used,
    begin,
    lowest,
    highest,
    scale,
    MASK: gl.constexpr,
    STAGES: gl.constexpr,
    LATE: gl.constexpr,
    LAYOUT: gl.constexpr,
    INPUT: gl.constexpr,
):
    """Take blocks of queries."""
    k, v, g_shared, q_shared, lse_shared, delta_shared = shared
    q_full, q_empty, g_full, g_empty = barriers
    COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    K_LAYOUT: gl.constexpr = dk.type.layout
    V_LAYOUT: gl.constexpr = dv.type.layout
    SIZE: gl.constexpr = q_shared.shape[3]
    for at in range(start, stop):
        j = used + at
        slot = j % STAGES
        dots = _product(k, q_shared, q_full, j, LAYOUT, STAGES)
        d_weights = _product(v, g_shared, g_full, j, LAYOUT, STAGES)
        if LATE:
            # Before the first block there is a sum of nothing.
            before = gl.maximum(j - 1, 0) % STAGES
            dk = warpgroup_mma(d_dots, _flat(q_shared.index(before)), dk, is_async=True)
            dots = warpgroup_mma_wait(2, deps=[dots])
        else:
            dots = warpgroup_mma_wait(1, deps=[dots])
        lse = lse_shared.index(slot).load(COLUMN)
        dots = _masked(dots, lowest, highest, begin + at * SIZE, MASK)
        powers = _power(dots * scale - lse[None, :])
        weights = _operand(powers, V_LAYOUT, INPUT)
        dv = warpgroup_mma(weights, _flat(g_shared.index(slot)), dv, is_async=True)
        if LATE:
            d_weights, dk, d_dots = warpgroup_mma_wait(1, deps=[d_weights, dk, d_dots])
            _barrier()
            mbarrier.arrive(q_empty.index(before), pred=j > 0)
        else:
            d_weights = warpgroup_mma_wait(1, deps=[d_weights])
        delta = delta_shared.index(slot).load(COLUMN)
        d_dots = _operand(powers * (d_weights - delta[None, :]), K_LAYOUT, INPUT)
        if LATE:
            dv, weights = warpgroup_mma_wait(0, deps=[dv, weights])
            _let_go(g_empty.index(slot))
        else:
            dk = warpgroup_mma(d_dots, _flat(q_shared.index(slot)), dk, is_async=True)
            dv, weights = warpgroup_mma_wait(1, deps=[dv, weights])
            _let_go(g_empty.index(slot))
            dk, d_dots = warpgroup_mma_wait(0, deps=[dk, d_dots])
            _let_go(q_empty.index(slot))
    return d_dots, dk, dv


@gluon.jit
def _sum_keys(
    sums,
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
    """Consumer WHICH of `grad_keys_specialised`: its ROWS keys."""
    DK, DV_ = sums
    g_shared, q_shared, k_shared, v_shared, lse_shared, delta_shared = rings
    groups, scale, slope = numbers
    k_full, v_full, q_full, q_empty, g_full, g_empty = barriers
    _, _, low, high = band
    first, kv_head, batch, begin, count = place
    INPUT: gl.constexpr = q_shared.dtype
    D: gl.constexpr = k_shared.shape[4]
    DV: gl.constexpr = v_shared.shape[4]
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SIZE, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    V_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV, 16])
    own = first + WHICH * ROWS
    key = own + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    lowest = key + low
    highest = key + high
    left, right = _phases(own, begin, count, low, high, ROWS, SIZE)
    k = _flat(k_shared.index(WHICH))
    v = _flat(v_shared.index(WHICH))
    shared = (k, v, g_shared, q_shared, lse_shared, delta_shared)
    turns = (q_full, q_empty, g_full, g_empty)
    dk = gl.zeros([ROWS, D], gl.float32, layout=K_LAYOUT)
    dv = gl.zeros([ROWS, DV], gl.float32, layout=V_LAYOUT)
    d_dots = gl.zeros([ROWS, SIZE], INPUT, layout=gl.DotOperandLayout(0, K_LAYOUT, 2))
    mbarrier.wait(k_full, 0)
    mbarrier.wait(v_full, 0)
    for group in range(groups):
        used = group * count
        d_dots, dk, dv = _key_blocks(
            *(0, left, d_dots, dk, dv, shared, turns, used, begin, lowest, highest, scale),
            *("both", STAGES, LATE, LAYOUT, INPUT),
        )
        d_dots, dk, dv = _key_blocks(
            *(left, right, d_dots, dk, dv, shared, turns, used, begin, lowest, highest, scale),
            *("", STAGES, LATE, LAYOUT, INPUT),
        )
        d_dots, dk, dv = _key_blocks(
            *(right, count, d_dots, dk, dv, shared, turns, used, begin, lowest, highest),
            *(scale, "upper", STAGES, LATE, LAYOUT, INPUT),
        )
    if LATE:
        slot = (groups * count - 1) % STAGES
        dk = warpgroup_mma(d_dots, _flat(q_shared.index(slot)), dk, is_async=True)
        dk, d_dots = warpgroup_mma_wait(0, deps=[dk, d_dots])
    # The keys and values of this consumer have been read.
    _barrier()
    k.store((dk * slope).to(INPUT))
    v.store(dv.to(INPUT))
    fence_async_shared()
    _barrier()
    _to_global(DK, [batch, kv_head, own, 0], k_shared.index(WHICH))
    _to_global(DV_, [batch, kv_head, own, 0], v_shared.index(WHICH))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        *("LSE", "DELTA", "lse_batch", "lse_head", "n", "m", "low", "high"),
        *("tiles", "heads", "groups", "scale", "slope"),
    ]
)
def grad_keys_specialised(
    LSE,
    DELTA,
    GRAD,
    Q,
    K,
    V,
    DK,
    DV_,
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
    """Gradients of keys and values in a band: key r sees the queries from `low + r` to `high + r`.

    Args:
        LSE, DELTA: float32 `[B, H, n]`, and their steps along the first two.
        GRAD, Q: descriptors of `[B, H, n, D]` in blocks of SIZE queries.
        K, V, DK, DV_: descriptors of `[B, heads, m, D]` in blocks of ROWS keys, two of which are a
            tile. What is outside of them is read as 0, and not written.
        tiles: for each of `heads` heads and each batch row.
        groups: query heads of a head of K and V.
        scale: of q . k, in base 2; above 0. slope: the scale itself.
    """
    INPUT: gl.constexpr = Q.dtype
    D: gl.constexpr = K.block_type.shape[3]
    DV: gl.constexpr = V.block_type.shape[3]
    k_shared = gl.allocate_shared_memory(INPUT, [2, 1, 1, ROWS, D], K.layout)
    v_shared = gl.allocate_shared_memory(INPUT, [2, 1, 1, ROWS, DV], V.layout)
    q_shared = gl.allocate_shared_memory(INPUT, [STAGES, 1, 1, SIZE, D], Q.layout)
    g_shared = gl.allocate_shared_memory(INPUT, [STAGES, 1, 1, SIZE, DV], GRAD.layout)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_shared = gl.allocate_shared_memory(gl.float32, [STAGES, SIZE], LINE)
    delta_shared = gl.allocate_shared_memory(gl.float32, [STAGES, SIZE], LINE)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    g_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    g_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(g_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(g_empty.index(i), count=2)
    fence_async_shared()

    index = gl.program_id(0)
    first = index % tiles * (2 * ROWS)
    head = index // tiles % heads
    batch = index // tiles // heads
    begin, count = _span(first, 2 * ROWS, low, high, m, n, SIZE)
    place = (first, head, batch, begin, count)
    band = (n, m, low, high)
    barriers = (k_full, v_full, q_full, q_empty, g_full, g_empty)
    rings = (g_shared, q_shared, k_shared, v_shared, lse_shared, delta_shared)
    producer = (GRAD, Q, K, V, LSE, DELTA, lse_batch, lse_head)
    sums = (DK, DV_)
    numbers = (groups, scale, slope)
    gl.warp_specialize(
        [
            (
                _sum_keys,
                (sums, rings, barriers, band, place, numbers, 0, ROWS, SIZE, STAGES, LATE),
            ),
            (
                _sum_keys,
                (sums, rings, barriers, band, place, numbers, 1, ROWS, SIZE, STAGES, LATE),
            ),
            (_load_queries, (producer, rings, barriers, band, place, groups, ROWS, SIZE, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
