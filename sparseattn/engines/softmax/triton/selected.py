"""Selections: every query and head has its own list of key blocks.

Rows of a tile are the query heads of a group and, for blocks of 16 keys or more, neighbouring
queries: a tensor core takes 16 rows at once anyway. A tile goes once over the union of what its
rows chose, and a bit a row says who chose what, so that a block that many rows share is read once.
The other rows' blocks change no bit of a row: a step lies within one block, and a row sees its
choice or nothing. For narrower blocks a step takes several blocks, and a tile has one query alone.

The gradients of keys and values go over the transposed lists: for each block the rows that chose
it, gathered into dense tiles. Every sum is taken by one program in one order: no atomics, the same
bits every time. Softmax and its gradient are as in `forward` and `backward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import factors, softmax_of, take_keys
from .weights import any_of, in_width, logits, norm_of


@triton.jit
def step_of_list(
    AT,
    BITS,
    KEY_MASK,
    at,
    count,
    row,
    stop,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    KEYS: tl.constexpr,
    HOLES: tl.constexpr,
):
    """Step `at` of a tile's list: a first key, the KEYS keys after it, and who sees them.

    AT, BITS: the tile's list, of `count` entries. stop `[ROWS]`: where the visible keys of a row
    end. A block takes SPAN places of the list, of which the first BLOCK are its keys.

    Returns:
        base: a position. ahead `[KEYS]`: the keys less base. seen: bool `[ROWS, KEYS]`.
    """
    span = tl.arange(0, KEYS)
    if SPAN % KEYS == 0:
        # One block, or a part of it: offsets from its start are 32 bits wide.
        part = at % SPAN
        base = tl.load(AT + at // SPAN) + part
        ahead = span
        bits = tl.load(BITS + at // SPAN)
        if SPAN > BLOCK:
            bits = tl.where(part + span < BLOCK, bits, 0)
        else:
            bits = tl.broadcast_to(bits, [KEYS])
    else:
        place = at + span
        there = place < count * SPAN
        base = tl.full([], 0, tl.int32)
        ahead = (tl.load(AT + place // SPAN, mask=there, other=0) + place % SPAN).to(tl.int64)
        bits = tl.load(BITS + place // SPAN, mask=there, other=0)
    key = base + ahead
    if HOLES:
        # A block may reach past the keys, where no row sees.
        bits = tl.where(key < tl.max(stop, 0), bits, 0)
        bits = tl.where(tl.load(KEY_MASK + key, mask=bits != 0, other=0) != 0, bits, 0)
    chosen = ((bits[None, :] >> row[:, None]) & 1) != 0
    return base, ahead, chosen & (key[None, :] < stop[:, None])


@triton.jit(
    do_not_specialize=[
        *("n", "tiles", "width", "lse_batch", "lse_head", "mask_batch"),
    ]
)
def forward_selected(
    Q,
    K,
    V,
    OUT,
    LSE,
    AT,
    BITS,
    COUNTS,
    STOPS,
    KEY_MASK,
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
    lse_batch,
    lse_head,
    mask_batch,
    scale,
    scale_rest,
    cap,
    cap_rest,
    head_dim,
    value_dim,
    groups,
    n,
    tiles,
    width,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
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
    """Program (tile of queries, head block, batch row); `selected_in_triton.Lists`.

    `n` queries in `tiles` tiles; lists are `width` wide. Rows of a tile: QUERIES times PACK heads.
    """
    batch = tl.program_id(2).to(tl.int64)
    scale = tl.cast(scale, NUMBER) + tl.cast(scale_rest, NUMBER)
    cap = tl.cast(cap, NUMBER) + tl.cast(cap_rest, NUMBER)
    row = tl.arange(0, ROWS)
    query = tl.program_id(0) * QUERIES + row // PACK
    real = (row < QUERIES * PACK) & (query < n)
    place = query.to(tl.int64)
    head = (tl.program_id(1) * PACK + row % PACK).to(tl.int64)
    kv_head = (tl.program_id(1) * PACK // groups).to(tl.int64)
    stop = tl.load(STOPS + batch * n + place, mask=real, other=0)
    d = tl.arange(0, D)
    e = tl.arange(0, DV)
    q_at = batch * q_batch + (head * q_head + place * q_row)[:, None] + d[None, :]
    q = tl.load(Q + q_at, mask=in_width(real, d, head_dim, EVEN), other=0.0).to(INPUT)
    q, by = factors(q, scale, cap, SOFTCAP, NUMBER, INPUT)
    key_at = K + batch * k_batch + kv_head * k_head
    value_at = V + batch * v_batch + kv_head * v_head
    hole_at = KEY_MASK + batch * mask_batch
    own = (batch * tl.num_programs(1) + tl.program_id(1)) * tiles + tl.program_id(0)
    count = tl.load(COUNTS + own)

    top = tl.full([ROWS], float("-inf"), NUMBER)
    total = tl.zeros([ROWS], NUMBER)
    out = tl.zeros([ROWS, DV], NUMBER)
    for at in tl.range(0, count * SPAN, KEYS):
        base, ahead, seen = step_of_list(
            *(AT + own * width, BITS + own * width, hole_at, at, count, row, stop),
            *(BLOCK, SPAN, KEYS, HOLES),
        )
        some = any_of(seen, 0)
        k_at = key_at + tl.cast(base, tl.int64) * k_row + (ahead[:, None] * k_row + d[None, :])
        v_at = value_at + tl.cast(base, tl.int64) * v_row + (ahead[:, None] * v_row + e[None, :])
        k = tl.load(k_at, in_width(some, d, head_dim, EVEN), 0.0)
        v = tl.load(v_at, in_width(some, e, value_dim, EVEN), 0.0)
        total, top, out = take_keys(
            *(total, top, out, q, k.to(INPUT), v.to(INPUT), seen, scale, by),
            *(True, SOFTCAP, PRECISION, NUMBER, INPUT),
        )

    out, lse = softmax_of(total, top, out)
    tl.store(
        OUT + batch * out_batch + (head * out_head + place * out_row)[:, None] + e[None, :],
        out.to(OUT.dtype.element_ty),
        mask=in_width(real, e, value_dim, EVEN),
    )
    tl.store(LSE + batch * lse_batch + head * lse_head + place, lse, mask=real)


@triton.jit(
    do_not_specialize=[
        *("n", "tiles", "width", "lse_batch", "lse_head", "mask_batch"),
    ]
)
def grad_queries_selected(
    GRAD,
    Q,
    K,
    V,
    OUT,
    LSE,
    GRAD_LSE,
    DELTA,
    DQ,
    AT,
    BITS,
    COUNTS,
    STOPS,
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
    n,
    tiles,
    width,
    LSE_GRAD: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
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
    """Program as in `forward_selected`; writes DQ and DELTA, `grad . out - grad_lse`.

    LSE, GRAD_LSE (if LSE_GRAD) and DELTA share their strides; `slope` is the scale itself.
    """
    batch = tl.program_id(2).to(tl.int64)
    scale = tl.cast(scale, NUMBER) + tl.cast(scale_rest, NUMBER)
    cap = tl.cast(cap, NUMBER) + tl.cast(cap_rest, NUMBER)
    slope = tl.cast(slope, NUMBER) + tl.cast(slope_rest, NUMBER)
    row = tl.arange(0, ROWS)
    query = tl.program_id(0) * QUERIES + row // PACK
    real = (row < QUERIES * PACK) & (query < n)
    place = query.to(tl.int64)
    head = (tl.program_id(1) * PACK + row % PACK).to(tl.int64)
    kv_head = (tl.program_id(1) * PACK // groups).to(tl.int64)
    stop = tl.load(STOPS + batch * n + place, mask=real, other=0)
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
    key_at = K + batch * k_batch + kv_head * k_head
    value_at = V + batch * v_batch + kv_head * v_head
    hole_at = KEY_MASK + batch * mask_batch
    own = (batch * tl.num_programs(1) + tl.program_id(1)) * tiles + tl.program_id(0)
    count = tl.load(COUNTS + own)

    dq = tl.zeros([ROWS, D], NUMBER)
    for at in tl.range(0, count * SPAN, KEYS):
        base, ahead, seen = step_of_list(
            *(AT + own * width, BITS + own * width, hole_at, at, count, row, stop),
            *(BLOCK, SPAN, KEYS, HOLES),
        )
        some = any_of(seen, 0)
        k_at = key_at + tl.cast(base, tl.int64) * k_row + (ahead[:, None] * k_row + d[None, :])
        v_at = value_at + tl.cast(base, tl.int64) * v_row + (ahead[:, None] * v_row + e[None, :])
        k = tl.load(k_at, in_width(some, d, head_dim, EVEN), 0.0)
        v = tl.load(v_at, in_width(some, e, value_dim, EVEN), 0.0)
        k = k.to(INPUT)
        dots = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=NUMBER)
        s, bend = logits(dots, scale, cap, SOFTCAP)
        d_weights = tl.dot(grad, tl.trans(v.to(INPUT)), input_precision=PRECISION, out_dtype=NUMBER)
        d_dots = tl.exp2(s - norm[:, None]) * (d_weights - delta[:, None]) * bend
        d_dots = tl.where(seen, d_dots, 0.0)
        dq = tl.dot(d_dots.to(INPUT), k, dq, input_precision=PRECISION, out_dtype=NUMBER)

    dq_at = batch * dq_batch + (head * dq_head + place * dq_row)[:, None] + d[None, :]
    tl.store(DQ + dq_at, (dq * slope).to(DQ.dtype.element_ty), mask=in_d)


@triton.jit(do_not_specialize=["n", "lse_batch", "mask_batch"])
def grad_keys_selected(
    GRAD,
    Q,
    K,
    V,
    LSE,
    DELTA,
    DK,
    DV_,
    BLOCKS,
    ORDER,
    STARTS,
    MEMBERS,
    STOPS,
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
    mask_batch,
    scale,
    scale_rest,
    cap,
    cap_rest,
    slope,
    slope_rest,
    head_dim,
    value_dim,
    kv_heads,
    n,
    BLOCK: tl.constexpr,
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
    """Program (list, part of its block); `selected_in_triton.Members`.

    LSE and DELTA are `[B, Hq * n]`, as members count. Writes DK and DV_.
    """
    own = tl.load(ORDER + tl.program_id(0))
    block = BLOCKS + own // kv_heads * 3
    kv_head = (own % kv_heads).to(tl.int64)
    batch = tl.load(block).to(tl.int64)
    scale = tl.cast(scale, NUMBER) + tl.cast(scale_rest, NUMBER)
    cap = tl.cast(cap, NUMBER) + tl.cast(cap_rest, NUMBER)
    slope = tl.cast(slope, NUMBER) + tl.cast(slope_rest, NUMBER)

    within = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key = tl.load(block + 1) + within
    there = (within < BLOCK) & (key < tl.load(block + 2))
    allowed = there
    if HOLES:
        allowed = tl.load(KEY_MASK + batch * mask_batch + key, mask=there, other=0) != 0
    at_key = key.to(tl.int64)
    d = tl.arange(0, D)
    e = tl.arange(0, DV)
    k_at = batch * k_batch + (kv_head * k_head + at_key * k_row)[:, None] + d[None, :]
    k = tl.load(K + k_at, mask=in_width(allowed, d, head_dim, EVEN), other=0.0).to(INPUT)
    v_at = batch * v_batch + (kv_head * v_head + at_key * v_row)[:, None] + e[None, :]
    v = tl.load(V + v_at, mask=in_width(allowed, e, value_dim, EVEN), other=0.0).to(INPUT)
    dk = tl.zeros([KEYS, D], NUMBER)
    dv = tl.zeros([KEYS, DV], NUMBER)

    start = tl.load(STARTS + own)
    stop = tl.load(STARTS + own + 1)
    for at in tl.range(start, stop, ROWS):
        place = at + tl.arange(0, ROWS)
        member = tl.load(MEMBERS + place, mask=place < stop, other=0)
        query = (member % n).to(tl.int64)
        head = (member // n).to(tl.int64)
        end = tl.load(STOPS + batch * n + query, mask=place < stop, other=0)
        seen = allowed[:, None] & (key[:, None] < end[None, :])
        # A row that sees nothing passes nothing on, whatever it holds.
        some = any_of(seen, 0)
        lse = tl.load(LSE + batch * lse_batch + member, mask=some, other=float("-inf"))
        some = some & (lse != float("-inf"))
        norm = norm_of(tl.where(some, lse, float("inf")))
        delta = tl.load(DELTA + batch * lse_batch + member, mask=some, other=0.0)
        q_at = batch * q_batch + (head * q_head + query * q_row)[:, None] + d[None, :]
        in_q = in_width(some, d, head_dim, EVEN)
        q = tl.load(Q + q_at, in_q, 0.0).to(INPUT)
        grad_at = batch * grad_batch + (head * grad_head + query * grad_row)[:, None] + e[None, :]
        in_grad = in_width(some, e, value_dim, EVEN)
        grad = tl.load(GRAD + grad_at, in_grad, 0.0).to(INPUT)
        dots = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=NUMBER)
        s, bend = logits(dots, scale, cap, SOFTCAP)
        powers = tl.where(seen, tl.exp2(s - norm[None, :]), 0.0)
        dv = tl.dot(powers.to(INPUT), grad, dv, input_precision=PRECISION, out_dtype=NUMBER)
        d_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION, out_dtype=NUMBER)
        d_dots = tl.where(seen, powers * (d_weights - delta[None, :]) * bend, 0.0)
        dk = tl.dot(d_dots.to(INPUT), q, dk, input_precision=PRECISION, out_dtype=NUMBER)

    dk_at = batch * dk_batch + (kv_head * dk_head + at_key * dk_row)[:, None] + d[None, :]
    dk_in = in_width(there, d, head_dim, EVEN)
    tl.store(DK + dk_at, (dk * slope).to(DK.dtype.element_ty), mask=dk_in)
    dv_at = batch * dv_batch + (kv_head * dv_head + at_key * dv_row)[:, None] + e[None, :]
    dv_in = in_width(there, e, value_dim, EVEN)
    tl.store(DV_ + dv_at, dv.to(DV_.dtype.element_ty), mask=dv_in)
