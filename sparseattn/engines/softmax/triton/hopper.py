"""Forward on Hopper in Gluon: warps that only load, and warpgroups whose softmax overlaps products.

FlashAttention-3 (Shah and others 2024) for a band. One warp loads blocks of keys and values by TMA
into rings of STAGES places, each with two barriers: `full` completes when a block has arrived, and
`empty` when every consumer has let go of it. A consumer is a warpgroup with rows of its own. It
issues the next product of queries and keys before it weighs the last values, so that both products
run while it takes powers.

Barriers have phases. The use `j` of a ring is in place `j % STAGES`, and is that place's use
`j // STAGES`; who reads it waits for phase `j // STAGES % 2` of `full`, and who fills it for the
other phase of `empty`, which a new barrier counts as complete.
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

# Some names are others in later versions of Triton.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_to_shared = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_to_global = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _turns(total):
    """How many tiles a program has."""
    return (total - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _tile(turn, band, ROWS: gl.constexpr, KEYS: gl.constexpr):
    """A program's tile: its first query, head and batch row, where the keys begin that it sees, and
    how many blocks of them there are, at least one. The last queries come first: under causal they
    see the most keys."""
    n, m, low, high, skipped, tiles, heads, _ = band
    index = gl.program_id(0) + turn * gl.num_programs(0)
    first = (skipped + tiles - 1 - index % tiles) * ROWS
    rest = index // tiles
    last = gl.minimum(first + ROWS, n) - 1
    begin = gl.maximum(low + first, 0)
    end = gl.minimum(high + last + 1, m)
    return first, rest % heads, rest // heads, begin, (end - begin + KEYS - 1) // KEYS


@gluon.jit
def _load(
    memory,
    barriers,
    band,
    groups,
    CONSUMERS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    QUERIES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer."""
    Q, K, V, q_shared, k_shared, v_shared = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    used = 0
    for turn in range(_turns(band[-1])):
        first, head, batch, begin, count = _tile(turn, band, CONSUMERS * ROWS, KEYS)
        kv_head = head // groups
        slot = turn % QUERIES
        mbarrier.wait(q_empty.index(slot), ((turn // QUERIES) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), CONSUMERS * Q.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            place = [batch, head, first + c * ROWS, 0]
            _to_shared(Q, place, q_full.index(slot), q_shared.index(slot * CONSUMERS + c))
        for at in range(count):
            j = used + at
            slot = j % STAGES
            phase = ((j // STAGES) & 1) ^ 1
            place = [batch, kv_head, begin + at * KEYS, 0]
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), K.block_type.nbytes)
            _to_shared(K, place, k_full.index(slot), k_shared.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), V.block_type.nbytes)
            _to_shared(V, place, v_full.index(slot), v_shared.index(slot))
        used += count


@gluon.jit
def _power(x):
    """2 ** x, with results below the least normal number as 0."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _pinned(x, where, PIN: gl.constexpr):
    """x, known by the time that what follows is waited for.

    The assembler would else move a wait ahead of the powers that should run beside it. It keeps the
    order of stores and waits, and does not see that this store, of a sum of powers below 0, is
    never made.
    """
    if PIN:
        return gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.f32 p, $1, 0fBF800000; @p st.global.f32 [$2], $1;"
            " bar.warp.sync 0xffffffff; mov.b32 $0, $1; }",
            *("=f,f,l", [x, where.to(gl.int64)]),
            dtype=gl.float32,
            is_pure=False,
            pack=1,
        )
    else:
        return x


@gluon.jit
def _unless_above(x, a, b):
    """x, and -inf where a > b. The compiler would pack what it compares itself into bits."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, $3; selp.f32 $0, 0fFF800000, $1, p; }",
        *("=f,f,r,r", [x, a, b]),
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _weigh(dots, top, scale, lowest, highest, at, MASK: gl.constexpr):
    """Weights of a block of keys from its products with queries, the new maximum, and the factor
    for what was summed before."""
    layout: gl.constexpr = dots.type.layout
    KEYS: gl.constexpr = dots.shape[1]
    if MASK != "":
        key = at + gl.arange(0, KEYS, layout=gl.SliceLayout(0, layout))
        dots = _unless_above(dots, key[None, :], highest[:, None])
        if MASK == "both":
            dots = _unless_above(dots, lowest[:, None], key[None, :])
    higher = gl.maximum(top, gl.max(dots, 1))
    base = gl.where(higher == float("-inf"), 0.0, higher) * scale
    weights = _power(dots * scale - base[:, None])
    return weights, higher, _power(top * scale - base)


@gluon.jit
def _dots(q, k_shared, k_full, j, ROWS: gl.constexpr, LAYOUT: gl.constexpr, STAGES: gl.constexpr):
    """Begin the product of queries and block j of the keys."""
    k = k_shared.index(j % STAGES)
    KEYS: gl.constexpr = k.shape[2]
    D: gl.constexpr = k.shape[3]
    mbarrier.wait(k_full.index(j % STAGES), (j // STAGES) & 1)
    zeros = gl.zeros([ROWS, KEYS], gl.float32, LAYOUT)
    keys = k.reshape([KEYS, D]).permute((1, 0))
    return warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def _sums(weights, out, v_shared, v_full, j, STAGES: gl.constexpr):
    """Begin to add weighed block j of the values."""
    v = v_shared.index(j % STAGES)
    KEYS: gl.constexpr = v.shape[2]
    DV: gl.constexpr = v.shape[3]
    mbarrier.wait(v_full.index(j % STAGES), (j // STAGES) & 1)
    return warpgroup_mma(weights, v.reshape([KEYS, DV]), out, is_async=True)


@gluon.jit
def _let_go(empty):
    """Say that this consumer has read what `empty` stands for: all of its warps have."""
    _barrier()
    mbarrier.arrive(empty)


@gluon.jit
def _operand(weights, OUT_LAYOUT: gl.constexpr, INPUT: gl.constexpr):
    layout: gl.constexpr = gl.DotOperandLayout(0, OUT_LAYOUT, 2)
    return gl.convert_layout(weights.to(INPUT), layout)


@gluon.jit
def _blocks(
    start,
    stop,
    weights,
    total,
    top,
    out,
    q,
    k_shared,
    v_shared,
    k_full,
    k_empty,
    v_full,
    v_empty,
    used,
    begin,
    lowest,
    highest,
    scale,
    spare,
    order,
    WHICH: gl.constexpr,
    TURNS: gl.constexpr,
    MASK: gl.constexpr,
    STAGES: gl.constexpr,
    PIN: gl.constexpr,
    LAYOUT: gl.constexpr,
    INPUT: gl.constexpr,
):
    """Take blocks of keys, while the values of the block before are weighed."""
    ROWS: gl.constexpr = out.shape[0]
    KEYS: gl.constexpr = k_shared.shape[3]
    OUT_LAYOUT: gl.constexpr = out.type.layout
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, OUT_LAYOUT)
    for at in range(start, stop):
        j = used + at
        if TURNS:
            mbarrier.wait(order.index(WHICH), (j & 1) ^ (1 - WHICH))
        dots = _dots(q, k_shared, k_full, j, ROWS, LAYOUT, STAGES)
        sums = _sums(weights, out, v_shared, v_full, j - 1, STAGES)
        if TURNS:
            mbarrier.arrive(order.index(1 - WHICH))
        dots = warpgroup_mma_wait(1, deps=[dots])
        _let_go(k_empty.index(j % STAGES))
        powers, top, shrink = _weigh(dots, top, scale, lowest, highest, begin + at * KEYS, MASK)
        total = _pinned(total * shrink + gl.sum(powers, 1), spare, PIN)
        out, weights = warpgroup_mma_wait(0, deps=[sums, weights])
        _let_go(v_empty.index((j - 1) % STAGES))
        out = out * gl.convert_layout(shrink, ROW_LAYOUT)[:, None]
        weights = _operand(powers, OUT_LAYOUT, INPUT)
    return weights, total, top, out


@gluon.jit
def _finish(OUTS, lse_at, o, out, total, top, scale, place, row, n):
    """Store a consumer's rows."""
    empty = total == 0
    some = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("-inf"), (top * scale + gl.log2(some)) * _LN2)
    gl.store(lse_at + row, lse, mask=row < n)
    inverse = gl.convert_layout(1.0 / some, gl.SliceLayout(1, out.type.layout))
    # The tile before may still be read from where this one goes.
    tma.store_wait(0)
    _barrier()
    o.reshape(out.shape).store((out * inverse[:, None]).to(o.dtype))
    fence_async_shared()
    _barrier()
    _to_global(OUTS, place, o)


@gluon.jit
def _attend(
    memory,
    barriers,
    band,
    scale,
    WHICH: gl.constexpr,
    CONSUMERS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    QUERIES: gl.constexpr,
    STAGES: gl.constexpr,
    PIN: gl.constexpr,
    TURNS: gl.constexpr,
):
    """Consumer WHICH: its ROWS rows of each tile."""
    OUT, OUTS, LSE, lse_batch, lse_head, q_shared, k_shared, v_shared, o_shared, order = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    n, m, low, high, _, _, _, total_tiles = band
    INPUT: gl.constexpr = q_shared.dtype
    D: gl.constexpr = q_shared.shape[4]
    DV: gl.constexpr = v_shared.shape[4]
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    OUT_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    o = o_shared.index(WHICH)
    turns = _turns(total_tiles)
    nothing = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW)
    span = WHICH * ROWS + gl.arange(0, ROWS, layout=ROW)
    first, head, batch, begin, count = _tile(0, band, CONSUMERS * ROWS, KEYS)
    q = q_shared.index(WHICH).reshape([ROWS, D])
    mbarrier.wait(q_full.index(0), 0)
    if TURNS:
        mbarrier.wait(order.index(WHICH), 1 - WHICH)
    dots = _dots(q, k_shared, k_full, 0, ROWS, LAYOUT, STAGES)
    if TURNS:
        mbarrier.arrive(order.index(1 - WHICH))
    dots = warpgroup_mma_wait(0, deps=[dots])
    _let_go(k_empty.index(0))
    lowest = low + first + span
    highest = gl.minimum(high + first + span, m - 1)
    powers, top, _ = _weigh(dots, nothing, scale, lowest, highest, begin, "both")
    total = gl.sum(powers, 1)
    weights = _operand(powers, OUT_LAYOUT, INPUT)
    used = 0
    for turn in range(turns):
        # Here block 0 of the tile has its weights, and its values are not taken yet. Blocks before
        # `left` are not seen by the last row throughout, nor those from `right` on by the first.
        own = first + WHICH * ROWS
        lowest = low + first + span
        highest = gl.minimum(high + first + span, m - 1)
        left = gl.maximum(gl.maximum(low + own + ROWS - 1, 0) - begin + KEYS - 1, 0) // KEYS
        left = gl.minimum(gl.maximum(left, 1), count)
        right = gl.maximum(gl.minimum(high + own + 1, m) - begin, 0) // KEYS
        right = gl.minimum(gl.maximum(right, left), count)
        slot = turn % QUERIES
        q = q_shared.index(slot * CONSUMERS + WHICH).reshape([ROWS, D])
        out = gl.zeros([ROWS, DV], gl.float32, layout=OUT_LAYOUT)
        if KEYS < CONSUMERS * ROWS:
            weights, total, top, out = _blocks(
                *(1, left, weights, total, top, out, q, k_shared, v_shared),
                *(k_full, k_empty, v_full, v_empty, used, begin, lowest, highest, scale, OUT),
                *(order, WHICH, TURNS, "both", STAGES, PIN, LAYOUT, INPUT),
            )
        weights, total, top, out = _blocks(
            *(left, right, weights, total, top, out, q, k_shared, v_shared),
            *(k_full, k_empty, v_full, v_empty, used, begin, lowest, highest, scale, OUT),
            *(order, WHICH, TURNS, "", STAGES, PIN, LAYOUT, INPUT),
        )
        weights, total, top, out = _blocks(
            *(right, count, weights, total, top, out, q, k_shared, v_shared),
            *(k_full, k_empty, v_full, v_empty, used, begin, lowest, highest, scale, OUT),
            *(order, WHICH, TURNS, "upper", STAGES, PIN, LAYOUT, INPUT),
        )
        _let_go(q_empty.index(slot))
        used += count
        lse_at = LSE + batch.to(gl.int64) * lse_batch + head.to(gl.int64) * lse_head
        place = [batch, head, own, 0]
        if turn + 1 < turns:
            # The last values of this tile are weighed beside block 0 of the next.
            first, head, batch, begin, count = _tile(turn + 1, band, CONSUMERS * ROWS, KEYS)
            slot = (turn + 1) % QUERIES
            q = q_shared.index(slot * CONSUMERS + WHICH).reshape([ROWS, D])
            mbarrier.wait(q_full.index(slot), ((turn + 1) // QUERIES) & 1)
            if TURNS:
                mbarrier.wait(order.index(WHICH), (used & 1) ^ (1 - WHICH))
            dots = _dots(q, k_shared, k_full, used, ROWS, LAYOUT, STAGES)
            sums = _sums(weights, out, v_shared, v_full, used - 1, STAGES)
            if TURNS:
                mbarrier.arrive(order.index(1 - WHICH))
            dots = warpgroup_mma_wait(1, deps=[dots])
            _let_go(k_empty.index(used % STAGES))
            lowest = low + first + span
            highest = gl.minimum(high + first + span, m - 1)
            powers, next_top, _ = _weigh(dots, nothing, scale, lowest, highest, begin, "both")
            next_total = _pinned(gl.sum(powers, 1), OUT, PIN)
            out, weights = warpgroup_mma_wait(0, deps=[sums, weights])
            _let_go(v_empty.index((used - 1) % STAGES))
            weights = _operand(powers, OUT_LAYOUT, INPUT)
            _finish(OUTS, lse_at, o, out, total, top, scale, place, own - WHICH * ROWS + span, n)
            total = next_total
            top = next_top
        else:
            sums = _sums(weights, out, v_shared, v_full, used - 1, STAGES)
            out, weights = warpgroup_mma_wait(0, deps=[sums, weights])
            _finish(OUTS, lse_at, o, out, total, top, scale, place, own - WHICH * ROWS + span, n)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        *("OUT", "LSE", "lse_batch", "lse_head", "n", "m", "low", "high"),
        *("skipped", "tiles", "heads", "groups", "total", "scale"),
    ]
)
def forward_specialised(
    OUT,
    LSE,
    Q,
    K,
    V,
    OUTS,
    lse_batch,
    lse_head,
    n,
    m,
    low,
    high,
    skipped,
    tiles,
    heads,
    groups,
    total,
    scale,
    CONSUMERS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    QUERIES: gl.constexpr,
    STAGES: gl.constexpr,
    PIN: gl.constexpr,
    TURNS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Softmax attention in a band: query r sees the keys from `low + r` to `high + r`, of m.

    Args:
        OUT: the output, which is written through its descriptor alone.
        LSE: float32 `[B, heads, n]`, and its steps along the first two.
        Q, K, V, OUTS: descriptors of `[B, H, N, D]` in blocks of ROWS queries and KEYS keys; what
            is outside of them is read as 0, and not written.
        tiles: of CONSUMERS * ROWS queries, after `skipped` others that see nothing, as do those
            after them; for each of `heads` heads and each batch row; `total` all together, dealt
            out to the programs of the launch.
        groups: query heads of a head of K and V.
        scale: of q . k, in base 2; above 0.
    """
    INPUT: gl.constexpr = Q.dtype
    D: gl.constexpr = Q.block_type.shape[3]
    DV: gl.constexpr = V.block_type.shape[3]
    q_shared = gl.allocate_shared_memory(INPUT, [QUERIES * CONSUMERS, 1, 1, ROWS, D], Q.layout)
    k_shared = gl.allocate_shared_memory(INPUT, [STAGES, 1, 1, KEYS, D], K.layout)
    v_shared = gl.allocate_shared_memory(INPUT, [STAGES, 1, 1, KEYS, DV], V.layout)
    o_shared = gl.allocate_shared_memory(INPUT, [CONSUMERS, 1, 1, ROWS, DV], OUTS.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(QUERIES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    order = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    if TURNS:
        mbarrier.init(order.index(0), count=1)
        mbarrier.init(order.index(1), count=1)
    fence_async_shared()

    producer = (Q, K, V, q_shared, k_shared, v_shared)
    consumer = (OUT, OUTS, LSE, lse_batch, lse_head, q_shared, k_shared, v_shared, o_shared, order)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    band = (n, m, low, high, skipped, tiles, heads, total)
    # Constants in a tuple that has a name would become numbers of the running program.
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (
                    _attend,
                    (
                        consumer,
                        barriers,
                        band,
                        scale,
                        0,
                        CONSUMERS,
                        ROWS,
                        KEYS,
                        QUERIES,
                        STAGES,
                        PIN,
                        TURNS,
                    ),
                ),
                (_load, (producer, barriers, band, groups, CONSUMERS, ROWS, KEYS, QUERIES, STAGES)),
            ],
            [1],
            [24],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _attend,
                    (
                        consumer,
                        barriers,
                        band,
                        scale,
                        0,
                        CONSUMERS,
                        ROWS,
                        KEYS,
                        QUERIES,
                        STAGES,
                        PIN,
                        TURNS,
                    ),
                ),
                (
                    _attend,
                    (
                        consumer,
                        barriers,
                        band,
                        scale,
                        1,
                        CONSUMERS,
                        ROWS,
                        KEYS,
                        QUERIES,
                        STAGES,
                        PIN,
                        TURNS,
                    ),
                ),
                (_load, (producer, barriers, band, groups, CONSUMERS, ROWS, KEYS, QUERIES, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _attend,
                    (
                        consumer,
                        barriers,
                        band,
                        scale,
                        0,
                        CONSUMERS,
                        ROWS,
                        KEYS,
                        QUERIES,
                        STAGES,
                        PIN,
                        TURNS,
                    ),
                ),
                (
                    _attend,
                    (
                        consumer,
                        barriers,
                        band,
                        scale,
                        1,
                        CONSUMERS,
                        ROWS,
                        KEYS,
                        QUERIES,
                        STAGES,
                        PIN,
                        TURNS,
                    ),
                ),
                (
                    _attend,
                    (
                        consumer,
                        barriers,
                        band,
                        scale,
                        2,
                        CONSUMERS,
                        ROWS,
                        KEYS,
                        QUERIES,
                        STAGES,
                        PIN,
                        TURNS,
                    ),
                ),
                (_load, (producer, barriers, band, groups, CONSUMERS, ROWS, KEYS, QUERIES, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )
