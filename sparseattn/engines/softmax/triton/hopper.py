"""Forward on Hopper in Gluon: warps that only load, and warpgroups whose softmax overlaps products.

FlashAttention-3 (Shah and others 2024) for bands and lists of blocks; a program has one tile. One
warp loads blocks of keys and values by TMA into rings, whose places have two barriers each: `full`
completes when a block has arrived, and `empty` when both consumers have let go of it. A consumer is
a warpgroup with rows of its own. It issues the next product of queries and keys before it weighs
the last values, so that both products run while it takes powers.

Barriers have phases. Block `j` is in place `j % S` of a ring of S, as that place's use `j // S`;
who reads it waits for phase `j // S % 2` of `full`, and who fills it for the other phase of
`empty`, which a new barrier counts as complete.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
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
)


@gluon.jit
def _tile(band, lists, ROWS: gl.constexpr, KEYS: gl.constexpr, LISTS: gl.constexpr):
    """A program's tile: its first query, head and batch row, where the keys begin that it sees or
    the list of their blocks, and how many blocks there are.

    A band has at least one; of its tiles the last queries come first, which under causal see the
    most keys.
    """
    n, m, low, high, skipped, tiles, heads = band
    tile = gl.program_id(0) % tiles
    rest = gl.program_id(0) // tiles
    if LISTS:
        row = lists[0] + tile * 8
        first = gl.load(row + 1) * ROWS
        begin = gl.load(row + 2)
        count = gl.load(row + 4) - begin
    else:
        first = (skipped + tiles - 1 - tile) * ROWS
        last = gl.minimum(first + ROWS, n) - 1
        begin = gl.maximum(low + first, 0)
        end = gl.minimum(high + last + 1, m)
        count = (end - begin + KEYS - 1) // KEYS
    return first, rest % heads, rest // heads, begin, count


@gluon.jit
def _load(descriptors, memory, barriers, band, lists, groups, LISTS: gl.constexpr):
    """The producer."""
    Q, K, V = descriptors
    q_shared, k_shared, v_shared, _ = memory
    q_full, k_full, k_empty, v_full, v_empty, _ = barriers
    ROWS: gl.constexpr = q_shared.shape[3]
    STAGES: gl.constexpr = k_shared.shape[0]
    KEYS: gl.constexpr = k_shared.shape[3]
    first, head, batch, begin, count = _tile(band, lists, 2 * ROWS, KEYS, LISTS)
    mbarrier.expect(q_full, 2 * Q.block_type.nbytes)
    for c in gl.static_range(2):
        _to_shared(Q, [batch, head, first + c * ROWS, 0], q_full, q_shared.index(c))
    for j in range(gl.maximum(count, 1)):
        if LISTS:
            # An empty list stands for a block after all keys, which is read as 0.
            listed = gl.load(lists[1] + begin + j, mask=count > 0, other=0) * KEYS
            key = gl.where(count > 0, listed, band[1])
        else:
            key = begin + j * KEYS
        slot = j % STAGES
        phase = ((j // STAGES) & 1) ^ 1
        place = [batch, head // groups, key, 0]
        mbarrier.wait(k_empty.index(slot), phase)
        mbarrier.expect(k_full.index(slot), K.block_type.nbytes)
        _to_shared(K, place, k_full.index(slot), k_shared.index(slot))
        mbarrier.wait(v_empty.index(slot), phase)
        mbarrier.expect(v_full.index(slot), V.block_type.nbytes)
        _to_shared(V, place, v_full.index(slot), v_shared.index(slot))


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
    _, k_full, k_empty, v_full, v_empty, order = barriers
    begin, lowest, highest = view
    STAGES: gl.constexpr = k_shared.shape[0]
    KEYS: gl.constexpr = k_shared.shape[3]
    OUT_LAYOUT: gl.constexpr = out.type.layout
    for j in range(start, stop):
        if TURNS:
            mbarrier.wait(order.index(WHICH), (j & 1) ^ (1 - WHICH))
        dots = _dots(q, k_shared, k_full, j, LAYOUT)
        sums = _sums(weights, out, v_shared, v_full, j - 1)
        if TURNS:
            mbarrier.arrive(order.index(1 - WHICH))
        dots = warpgroup_mma_wait(1, deps=[dots])
        _let_go(k_empty.index(j % STAGES))
        at = begin + j * KEYS
        powers, top, shrink = _weigh(dots, top, scale, lowest, highest, at, MASK)
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
    """Consumer WHICH: its rows of the tile."""
    OUTS, LSE, lse_batch, lse_head = results
    q_shared, k_shared, v_shared, o_shared = memory
    q_full, k_full, k_empty, v_full, _, order = barriers
    n, m, low, high, _, _, _ = band
    ROWS: gl.constexpr = q_shared.shape[3]
    KEYS: gl.constexpr = k_shared.shape[3]
    DV: gl.constexpr = v_shared.shape[4]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, KEYS, 16])
    OUT_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    FIRST: gl.constexpr = "" if LISTS else "both"
    first, head, batch, begin, count = _tile(band, lists, 2 * ROWS, KEYS, LISTS)
    own = first + WHICH * ROWS
    row = own + gl.arange(0, ROWS, layout=ROW)
    lowest = low + row
    highest = gl.minimum(high + row, m - 1)
    top = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW)
    out = gl.zeros([ROWS, DV], gl.float32, layout=OUT_LAYOUT)
    q = _flat(q_shared.index(WHICH))
    mbarrier.wait(q_full, 0)
    if TURNS:
        mbarrier.wait(order.index(WHICH), 1 - WHICH)
    dots = _dots(q, k_shared, k_full, 0, LAYOUT)
    if TURNS:
        mbarrier.arrive(order.index(1 - WHICH))
    dots = warpgroup_mma_wait(0, deps=[dots])
    _let_go(k_empty.index(0))
    powers, top, _ = _weigh(dots, top, scale, lowest, highest, begin, FIRST)
    weights = _operand(powers, OUT_LAYOUT, v_shared.dtype)
    running = (weights, gl.sum(powers, 1), top, out)
    view = (begin, lowest, highest)
    if LISTS:
        running = _blocks(
            *(1, count, running, q, memory, barriers, view, scale),
            *("", WHICH, TURNS, LAYOUT),
        )
    else:
        # A tile has no more rows than a block has keys: after block 0 the first key of each row is
        # behind. From block `outer` on the last key of some row is near.
        gl.static_assert(KEYS >= 2 * ROWS)
        outer = gl.maximum(gl.minimum(high + own + 1, m) - begin, 0) // KEYS
        outer = gl.minimum(gl.maximum(outer, 1), count)
        running = _blocks(
            *(1, outer, running, q, memory, barriers, view, scale),
            *("", WHICH, TURNS, LAYOUT),
        )
        running = _blocks(
            *(outer, count, running, q, memory, barriers, view, scale),
            *("upper", WHICH, TURNS, LAYOUT),
        )
    weights, total, top, out = running
    if LISTS:
        total = gl.where(count > 0, total, 0.0)
    sums = _sums(weights, out, v_shared, v_full, gl.maximum(count, 1) - 1)
    lse_at = LSE + batch.to(gl.int64) * lse_batch + head.to(gl.int64) * lse_head
    inverse = _normalised(total, top, scale, lse_at, row, n)
    out = warpgroup_mma_wait(0, deps=[sums])
    _finish(OUTS, o_shared.index(WHICH), out, inverse, [batch, head, own, 0])


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
        *("skipped", "tiles", "heads", "groups", "scale"),
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
    scale,
    LISTS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Softmax attention in a band, where query r sees the keys from `low + r` to `high + r` of m,
    or with LISTS in the blocks of KEYS keys that a plan lists for 2 * ROWS queries.

    Args:
        OUT: the output, which is written through its descriptor alone.
        LSE: float32 `[B, heads, n]`, and its steps along the first two.
        Q, K, V, OUTS: descriptors of `[B, H, N, D]` in blocks of ROWS queries and KEYS keys; what
            is outside of them is read as 0, and not written.
        TILES, COLS: as `plan.py` has them; of lists.
        tiles: of 2 * ROWS queries, after `skipped` others that see nothing, as do those after them;
            a program for each, of each of `heads` heads and each batch row.
        groups: query heads of a head of K and V.
        scale: of q . k, in base 2; above 0.
    """
    INPUT: gl.constexpr = Q.dtype
    D: gl.constexpr = Q.block_type.shape[3]
    DV: gl.constexpr = V.block_type.shape[3]
    q_shared = gl.allocate_shared_memory(INPUT, [2, 1, 1, ROWS, D], Q.layout)
    k_shared = gl.allocate_shared_memory(INPUT, [STAGES, 1, 1, KEYS, D], K.layout)
    v_shared = gl.allocate_shared_memory(INPUT, [STAGES, 1, 1, KEYS, DV], V.layout)
    o_shared = gl.allocate_shared_memory(INPUT, [2, 1, 1, ROWS, DV], OUTS.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    order = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
    fence_async_shared()

    memory = (q_shared, k_shared, v_shared, o_shared)
    barriers = (q_full, k_full, k_empty, v_full, v_empty, order)
    band = (n, m, low, high, skipped, tiles, heads)
    lists = (TILES, COLS)
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
