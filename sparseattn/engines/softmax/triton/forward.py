"""Forward: one program a tile of queries and a head, over the keys that the tile sees.

Two patterns share the body. A band is arithmetic: its left edge, its interior and its right edge
are three loops, of which only the edges look at masks. A list names the key blocks of a query
block, the full ones first; partial ones point to tiles of bits. Softmax is taken on the way
(Milakov and Gimelshein 2018; FlashAttention-2, algorithm 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .weights import LN2, any_in_tile, logits, seen_in_band, seen_in_tile


@triton.jit
def take_keys(
    total,
    top,
    out,
    q,
    k,
    v,
    seen,
    scale,
    cap,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
):
    """Add a block of keys to the running sums of softmax: total `[R]`, top `[R]`, out `[R, DV]`.

    q `[R, D]`, k `[L, D]`, v `[L, DV]`; seen `[R, L]`, if MASKED. Values that no row sees must be
    finite: a weight of 0 would not silence a NaN. They are loaded as 0.
    """
    dots = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=NUMBER)
    s, _ = logits(dots, scale, cap, SOFTCAP)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    powers = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(powers, 1)
    out = out * shrink[:, None]
    out = tl.dot(powers.to(INPUT), v, out, input_precision=PRECISION, out_dtype=NUMBER)
    return total, higher, out


@triton.jit
def softmax_of(total, top, out):
    """The quotient and the natural log normaliser; 0 and -inf for a row that saw nothing."""
    empty = total == 0
    some = tl.where(empty, 1.0, total)
    return out / some[:, None], tl.where(empty, float("-inf"), (top + tl.log2(some)) * LN2)


@triton.jit(do_not_specialize=["lse_batch", "lse_head", "mask_batch", "head_dim", "value_dim"])
def forward(
    Q,
    K,
    V,
    OUT,
    LSE,
    RUNS,
    TILES,
    COLS,
    LOOKS,
    MASKS,
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
    """Program (tile, head block, batch row); tables and shapes as `plan.py` describes them."""
    QUERIES: tl.constexpr = ROWS // PACK
    STEP: tl.constexpr = KEYS if BAND else 1
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

    row = tl.arange(0, ROWS)
    query = first + row // PACK
    head = (tl.program_id(1) * PACK + row % PACK).to(tl.int64)
    kv_head = (tl.program_id(1) * PACK // groups).to(tl.int64)
    real = query < n
    place = (tl.load(run + 1) + query).to(tl.int64)
    d = tl.arange(0, D)
    e = tl.arange(0, DV)
    q = tl.load(
        Q + batch * q_batch + (head * q_head + place * q_row)[:, None] + d[None, :],
        mask=real[:, None] & (d < head_dim)[None, :],
        other=0.0,
    ).to(INPUT)
    # Within a tile offsets are 32 bits wide: 64 for every element would spill.
    span = tl.arange(0, KEYS)
    key_at = K + batch * k_batch + kv_head * k_head + k_first * k_row
    value_at = V + batch * v_batch + kv_head * v_head + k_first * v_row
    k_offset = span[:, None] * k_row + d[None, :]
    v_offset = span[:, None] * v_row + e[None, :]
    hole_at = KEY_MASK + batch * mask_batch + k_first

    top = tl.full([ROWS], float("-inf"), NUMBER)
    total = tl.zeros([ROWS], NUMBER)
    out = tl.zeros([ROWS, DV], NUMBER)

    # What is visible throughout stands between `inner` and `outer`.
    if BAND:
        last = tl.minimum(first + QUERIES, n) - 1
        begin = tl.maximum(low + first, 0) // KEYS * KEYS
        end = tl.minimum(high + last + 1, m)
        inner = tl.maximum((tl.maximum(low + last, 0) + KEYS - 1) // KEYS * KEYS, begin)
        outer = tl.maximum(tl.maximum(tl.minimum(high + first + 1, m), 0) // KEYS * KEYS, inner)
    else:
        begin = tl.load(tile + 2)
        end = tl.load(tile + 4)
        inner = begin
        outer = tl.load(tile + 3)
    for PHASE in tl.static_range(0 if BAND else 1, 3):
        if PHASE == 0:
            start, stop = begin, tl.minimum(inner, end)
        elif PHASE == 1:
            start, stop = inner, outer
        else:
            start, stop = outer, end
        for at in tl.range(start, stop, STEP, num_stages=(None if PHASE == 1 else 1)):
            base = at if BAND else tl.load(COLS + at) * KEYS
            key = base + span
            seen = real[:, None]
            some = key < m  # seen by any row of the tile
            if PHASE != 1:
                if BAND:
                    seen = seen_in_band(low, high, query[:, None], key[None, :], n, m)
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
            if EVEN and PHASE == 1 and not HOLES:
                k = tl.load(k_at)
                v = tl.load(v_at)
            else:
                k = tl.load(k_at, some[:, None] & (d < head_dim)[None, :], 0.0)
                v = tl.load(v_at, some[:, None] & (e < value_dim)[None, :], 0.0)
            total, top, out = take_keys(
                *(total, top, out, q, k.to(INPUT), v.to(INPUT), seen, scale, cap),
                *(PHASE != 1 or HOLES, SOFTCAP, PRECISION, NUMBER, INPUT),
            )

    out, lse = softmax_of(total, top, out)
    tl.store(
        OUT + batch * out_batch + (head * out_head + place * out_row)[:, None] + e[None, :],
        out.to(OUT.dtype.element_ty),
        mask=real[:, None] & (e < value_dim)[None, :],
    )
    tl.store(LSE + batch * lse_batch + head * lse_head + place, lse, mask=real)
