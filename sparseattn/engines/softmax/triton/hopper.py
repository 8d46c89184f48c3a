"""Forward on Hopper in Gluon: warps that only load, and warpgroups whose softmax overlaps products.

FlashAttention-3 (Shah and others 2024) for a band. One warp loads blocks of keys and values by TMA
into rings, whose places have two barriers each: `full` completes when a block has arrived, and
`empty` when every consumer has let go of it. A consumer is a warpgroup with rows of its own. It
issues the next product of queries and keys before it weighs the last values, so that both products
run while it takes powers, and goes on like that from one tile to the next.

Barriers have phases. Use `j` of a ring of S places is in place `j % S`, and is that place's use
`j // S`; who reads it waits for phase `j // S % 2` of `full`, and who fills it for the other phase
of `empty`, which a new barrier counts as complete.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from .hopper_parts import (
    _dots,
    _finish,
    _flat,
    _let_go,
    _normalised,
    _operand,
    _pinned,
    _sums,
    _to_shared,
    _weigh,
    _words,
)


@gluon.jit
def _tiles(total):
    """How many tiles a program has."""
    return (total - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _tile(at, band, lists, ROWS: gl.constexpr, KEYS: gl.constexpr, LISTS: gl.constexpr):
    """A program's tile: its first query, head and batch row, where the keys begin that it sees or
    the list of their blocks, and how many blocks there are; and in a list where those begin that
    are seen in part.

    A band has at least one; of its tiles the last queries come first, which under causal see the
    most keys.
    """
    n, m, low, high, skipped, tiles, heads, _ = band
    index = gl.program_id(0) + at * gl.num_programs(0)
    tile = index % tiles
    rest = index // tiles
    if LISTS:
        row = lists[0] + tile * 8
        first = gl.load(row + 1) * ROWS
        begin = gl.load(row + 2)
        outer = gl.load(row + 3)
        count = gl.load(row + 4) - begin
    else:
        outer = 0
        first = (skipped + tiles - 1 - tile) * ROWS
        last = gl.minimum(first + ROWS, n) - 1
        begin = gl.maximum(low + first, 0)
        end = gl.minimum(high + last + 1, m)
        count = (end - begin + KEYS - 1) // KEYS
    return first, rest % heads, rest // heads, begin, count, outer


@gluon.jit
def _load(descriptors, memory, barriers, band, lists, groups, LISTS: gl.constexpr):
    """The producer."""
    Q, K, V = descriptors
    q_shared, k_shared, v_shared, _ = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    QUERIES: gl.constexpr = q_full.shape[0]
    CONSUMERS: gl.constexpr = q_shared.shape[0] // QUERIES
    ROWS: gl.constexpr = q_shared.shape[3]
    STAGES: gl.constexpr = k_shared.shape[0]
    KEYS: gl.constexpr = k_shared.shape[3]
    used = 0
    for at in range(_tiles(band[7])):
        first, head, batch, begin, count, _outer = _tile(
            at, band, lists, CONSUMERS * ROWS, KEYS, LISTS
        )
        blocks = gl.maximum(count, 1)
        slot = at % QUERIES
        mbarrier.wait(q_empty.index(slot), ((at // QUERIES) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), CONSUMERS * Q.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            place = [batch, head, first + c * ROWS, 0]
            _to_shared(Q, place, q_full.index(slot), q_shared.index(slot * CONSUMERS + c))
        for block in range(blocks):
            if LISTS:
                # An empty list stands for a block after all keys, which is read as 0.
                listed = gl.load(lists[1] + begin + block, mask=count > 0, other=0) * KEYS
                key = gl.where(count > 0, listed, band[1])
            else:
                key = begin + block * KEYS
            j = used + block
            slot = j % STAGES
            phase = ((j // STAGES) & 1) ^ 1
            place = [batch, head // groups, key, 0]
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), K.block_type.nbytes)
            _to_shared(K, place, k_full.index(slot), k_shared.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), V.block_type.nbytes)
            _to_shared(V, place, v_full.index(slot), v_shared.index(slot))
        used += blocks


@gluon.jit
def _bounds(band, first, span):
    """The first and last keys that rows of a band see."""
    _, m, low, high, _, _, _, _ = band
    return low + first + span, gl.minimum(high + first + span, m - 1)


@gluon.jit
def _sight(band, lists, first, begin, count, outer, span, LISTS: gl.constexpr):
    """What rows see of block 0 of a tile, for `_weigh`."""
    if LISTS == 2:
        return _words(lists, begin, outer, begin + count, span)
    else:
        return _bounds(band, first, span)


@gluon.jit
def _blocks(
    start,
    stop,
    running,
    q,
    memory,
    barriers,
    view,
    scale,
    MASK: gl.constexpr,
    WHICH: gl.constexpr,
    TURNS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Take blocks of keys, while the values of the block before are weighed."""
    weights, total, top, out = running
    _, k_shared, v_shared, _ = memory
    _, _, k_full, k_empty, v_full, v_empty, order = barriers
    used, begin, count, outer, first, span, band, lists = view
    STAGES: gl.constexpr = k_shared.shape[0]
    KEYS: gl.constexpr = k_shared.shape[3]
    OUT_LAYOUT: gl.constexpr = out.type.layout
    for block in range(start, stop):
        j = used + block
        if MASK == "bits":
            sight = _words(lists, begin + block, outer, begin + count, span)
        else:
            sight = _bounds(band, first, span)
        if TURNS:
            mbarrier.wait(order.index(WHICH), (j & 1) ^ (1 - WHICH))
        dots = _dots(q, k_shared, k_full, j, LAYOUT)
        sums = _sums(weights, out, v_shared, v_full, j - 1)
        if TURNS:
            mbarrier.arrive(order.index(1 - WHICH))
        dots = warpgroup_mma_wait(1, deps=[dots])
        _let_go(k_empty.index(j % STAGES))
        at = begin + block * KEYS
        powers, top, shrink = _weigh(dots, top, scale, sight, at, MASK)
        total = _pinned(total * shrink + gl.sum(powers, 1))
        out = warpgroup_mma_wait(0, deps=[sums])
        _let_go(v_empty.index((j - 1) % STAGES))
        out = out * gl.convert_layout(shrink, gl.SliceLayout(1, OUT_LAYOUT))[:, None]
        weights = _operand(powers, OUT_LAYOUT, v_shared.dtype)
    return weights, total, top, out


@gluon.jit
def _attend(
    results,
    memory,
    barriers,
    band,
    lists,
    scale,
    LISTS: gl.constexpr,
    TURNS: gl.constexpr,
    WHICH: gl.constexpr,
):
    """Consumer WHICH: its rows of each tile."""
    OUTS, LSE, lse_batch, lse_head = results
    q_shared, k_shared, v_shared, o_shared = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty, order = barriers
    n, m, low, high, _, _, _, all_tiles = band
    QUERIES: gl.constexpr = q_full.shape[0]
    CONSUMERS: gl.constexpr = q_shared.shape[0] // QUERIES
    ROWS: gl.constexpr = q_shared.shape[3]
    STAGES: gl.constexpr = k_shared.shape[0]
    KEYS: gl.constexpr = k_shared.shape[3]
    DV: gl.constexpr = v_shared.shape[4]
    INPUT: gl.constexpr = q_shared.dtype
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, KEYS, 16])
    OUT_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    FIRST: gl.constexpr = "both" if LISTS == 0 else "" if LISTS == 1 else "bits"
    o = o_shared.index(WHICH)
    tiles = _tiles(all_tiles)
    nothing = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW)
    span = WHICH * ROWS + gl.arange(0, ROWS, layout=ROW)
    first, head, batch, begin, count, outer = _tile(0, band, lists, CONSUMERS * ROWS, KEYS, LISTS)
    sight = _sight(band, lists, first, begin, count, outer, span, LISTS)
    q = _flat(q_shared.index(WHICH))
    mbarrier.wait(q_full.index(0), 0)
    if TURNS:
        mbarrier.wait(order.index(WHICH), 1 - WHICH)
    dots = _dots(q, k_shared, k_full, 0, LAYOUT)
    if TURNS:
        mbarrier.arrive(order.index(1 - WHICH))
    dots = warpgroup_mma_wait(0, deps=[dots])
    _let_go(k_empty.index(0))
    powers, top, _ = _weigh(dots, nothing, scale, sight, begin, FIRST)
    total = gl.sum(powers, 1)
    weights = _operand(powers, OUT_LAYOUT, INPUT)
    used = 0
    for at in range(tiles):
        # Here block 0 of the tile has its weights, and its values are not taken yet.
        own = first + WHICH * ROWS
        slot = at % QUERIES
        q = _flat(q_shared.index(slot * CONSUMERS + WHICH))
        out = gl.zeros([ROWS, DV], gl.float32, layout=OUT_LAYOUT)
        running = (weights, total, top, out)
        view = (used, begin, count, outer, first, span, band, lists)
        if LISTS:
            whole = count
            if LISTS == 2:
                whole = gl.maximum(outer - begin, 1)
            running = _blocks(
                *(1, gl.minimum(whole, count), running, q, memory, barriers, view, scale),
                *("", WHICH, TURNS, LAYOUT),
            )
            if LISTS == 2:
                running = _blocks(
                    *(whole, count, running, q, memory, barriers, view, scale),
                    *("bits", WHICH, TURNS, LAYOUT),
                )
            blocks = gl.maximum(count, 1)
        else:
            # Blocks before `left` are not seen by the last row throughout, nor those from `right`
            # on by the first.
            left = gl.maximum(gl.maximum(low + own + ROWS - 1, 0) - begin + KEYS - 1, 0) // KEYS
            left = gl.minimum(gl.maximum(left, 1), count)
            right = gl.maximum(gl.minimum(high + own + 1, m) - begin, 0) // KEYS
            right = gl.minimum(gl.maximum(right, left), count)
            if KEYS < CONSUMERS * ROWS:
                running = _blocks(
                    *(1, left, running, q, memory, barriers, view, scale),
                    *("both", WHICH, TURNS, LAYOUT),
                )
            running = _blocks(
                *(left, right, running, q, memory, barriers, view, scale),
                *("", WHICH, TURNS, LAYOUT),
            )
            running = _blocks(
                *(right, count, running, q, memory, barriers, view, scale),
                *("upper", WHICH, TURNS, LAYOUT),
            )
            blocks = count
        weights, total, top, out = running
        _let_go(q_empty.index(slot))
        used += blocks
        if LISTS:
            total = gl.where(count > 0, total, 0.0)
        place = [batch, head, own, 0]
        lse_at = LSE + batch.to(gl.int64) * lse_batch + head.to(gl.int64) * lse_head
        row = first + span
        if at + 1 < tiles:
            # The last values of this tile are weighed beside block 0 of the next.
            first, head, batch, begin, count, outer = _tile(
                *(at + 1, band, lists, CONSUMERS * ROWS, KEYS, LISTS)
            )
            sight = _sight(band, lists, first, begin, count, outer, span, LISTS)
            slot = (at + 1) % QUERIES
            q = _flat(q_shared.index(slot * CONSUMERS + WHICH))
            mbarrier.wait(q_full.index(slot), ((at + 1) // QUERIES) & 1)
            if TURNS:
                mbarrier.wait(order.index(WHICH), (used & 1) ^ (1 - WHICH))
            dots = _dots(q, k_shared, k_full, used, LAYOUT)
            sums = _sums(weights, out, v_shared, v_full, used - 1)
            if TURNS:
                mbarrier.arrive(order.index(1 - WHICH))
            inverse = _normalised(total, top, scale, lse_at, row, n)
            dots = warpgroup_mma_wait(1, deps=[dots])
            _let_go(k_empty.index(used % STAGES))
            powers, top, _ = _weigh(dots, nothing, scale, sight, begin, FIRST)
            total = _pinned(gl.sum(powers, 1))
            out = warpgroup_mma_wait(0, deps=[sums])
            _let_go(v_empty.index((used - 1) % STAGES))
            weights = _operand(powers, OUT_LAYOUT, INPUT)
            _finish(OUTS, o, out, inverse, place)
        else:
            sums = _sums(weights, out, v_shared, v_full, used - 1)
            inverse = _normalised(total, top, scale, lse_at, row, n)
            out = warpgroup_mma_wait(0, deps=[sums])
            _finish(OUTS, o, out, inverse, place)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        *(
            "OUT",
            "LSE",
            "TILES",
            "COLS",
            "LOOKS",
            "MASKS",
            "lse_batch",
            "lse_head",
            "n",
            "m",
            "low",
            "high",
        ),
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
    TILES,
    COLS,
    LOOKS,
    MASKS,
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
    LISTS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    QUERIES: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Softmax attention in a band, where query r sees the keys from `low + r` to `high + r` of m,
    or in the blocks of KEYS keys that a plan lists for 2 * ROWS queries.

    Args:
        OUT: the output, which is written through its descriptor alone.
        LSE: float32 `[B, heads, n]`, and its steps along the first two.
        Q, K, V, OUTS: descriptors of `[B, H, N, D]` in blocks of ROWS queries and KEYS keys; what
            is outside of them is read as 0, and not written.
        TILES, COLS, LOOKS, MASKS: as `plan.py` has them; of lists.
        tiles: of 2 * ROWS queries, after `skipped` others that see nothing, as do those after them;
            for each of `heads` heads and each batch row; `total` all together, dealt out to the
            programs of the launch.
        groups: query heads of a head of K and V.
        scale: of q . k, in base 2; above 0.
        LISTS: 0 for a band, 1 for blocks that are seen throughout, 2 for others.
    """
    INPUT: gl.constexpr = Q.dtype
    D: gl.constexpr = Q.block_type.shape[3]
    DV: gl.constexpr = V.block_type.shape[3]
    q_shared = gl.allocate_shared_memory(INPUT, [QUERIES * 2, 1, 1, ROWS, D], Q.layout)
    k_shared = gl.allocate_shared_memory(INPUT, [STAGES, 1, 1, KEYS, D], K.layout)
    v_shared = gl.allocate_shared_memory(INPUT, [STAGES, 1, 1, KEYS, DV], V.layout)
    o_shared = gl.allocate_shared_memory(INPUT, [2, 1, 1, ROWS, DV], OUTS.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    order = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(QUERIES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
    fence_async_shared()

    memory = (q_shared, k_shared, v_shared, o_shared)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, order)
    band = (n, m, low, high, skipped, tiles, heads, total)
    lists = (TILES, COLS, LOOKS, MASKS)
    results = (OUTS, LSE, lse_batch, lse_head)
    descriptors = (Q, K, V)
    # Constants in a tuple that has a name would become numbers of the running program.
    gl.warp_specialize(
        [
            (_attend, (results, memory, barriers, band, lists, scale, LISTS, TURNS, 0)),
            (_attend, (results, memory, barriers, band, lists, scale, LISTS, TURNS, 1)),
            (_load, (descriptors, memory, barriers, band, lists, groups, LISTS)),
        ],
        [4, 1],
        [240, 24],
    )
