"""Forward: one program a tile of queries and a head, over the keys that the tile sees.

Two patterns share the body, a loop over key blocks that are visible throughout and one over those
that are not. In a band the first is its interior, and the second its two edges, found by
arithmetic. A list names the key blocks of a query block, the full ones first; partial ones point to
tiles of bits. Softmax is taken on the way (Milakov and Gimelshein 2018; FlashAttention-2,
algorithm 1).
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
    natural_of,
    seen_in_tile,
    tanh,
)


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
    by,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
):
    """Add a block of keys to the running sums of softmax: total `[R]`, top `[R]`, out `[R, DV]`.

    q `[R, D]`, k `[L, D]`, v `[L, DV]`; seen `[R, L]`, if MASKED. A logit in base 2 is `by`, which
    is above 0, times `q . k`, or with a softcap times the tanh of `scale` times that: it and what
    is subtracted are one operation an element. `top` is the greatest, rounded; powers must be
    measured from that very number. Values that no row sees must be finite: a weight of 0 would not
    silence a NaN. They are loaded as 0.
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=NUMBER)
    if SOFTCAP:
        s = tanh(s * scale)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1) * by)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    powers = tl.exp2(s * by - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(powers, 1)
    out = out * shrink[:, None]
    out = tl.dot(powers.to(INPUT), v, out, input_precision=PRECISION, out_dtype=NUMBER)
    return total, higher, out


@triton.jit
def factors(q, scale, cap, SOFTCAP: tl.constexpr, NUMBER: tl.constexpr, INPUT: tl.constexpr):
    """q and `by` as `take_keys` has them, the latter above 0.

    For a scale below 0 the sign of q is changed, and 0 becomes a scale by which every power is 1.
    """
    if SOFTCAP:
        return q, cap
    else:
        flipped = tl.where(scale < 0, -q.to(NUMBER), q.to(NUMBER)).to(INPUT)
        return flipped, tl.maximum(tl.abs(scale), 1e-30)


@triton.jit
def softmax_of(total, top, out):
    """The quotient and the natural log normaliser; 0 and -inf for a row that saw nothing."""
    empty = total == 0
    some = tl.where(empty, 1.0, total)
    lse = natural_of(tl.where(empty, 0.0, top), tl.log2(some))
    return out / some[:, None], tl.where(empty, float("-inf"), lse)


@triton.jit(do_not_specialize=["lse_batch", "lse_head", "mask_batch"])
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
        mask=in_width(real, d, head_dim, EVEN),
        other=0.0,
    ).to(INPUT)
    q, by = factors(q, scale, cap, SOFTCAP, NUMBER, INPUT)
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
        if start < stop:  # entering a loop costs, where loads are under way before it
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
                total, top, out = take_keys(
                    *(total, top, out, q, k.to(INPUT), v.to(INPUT), seen, scale, by),
                    *(MASKED or HOLES, SOFTCAP, PRECISION, NUMBER, INPUT),
                )

    out, lse = softmax_of(total, top, out)
    tl.store(
        OUT + batch * out_batch + (head * out_head + place * out_row)[:, None] + e[None, :],
        out.to(OUT.dtype.element_ty),
        mask=in_width(real, e, value_dim, EVEN),
    )
    tl.store(LSE + batch * lse_batch + head * lse_head + place, lse, mask=real)
