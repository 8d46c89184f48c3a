"""Forward: one program a tile of queries and a head, over the keys that the tile sees.

Two patterns share the body. A band is arithmetic: its left edge, its interior and its right edge are
three loops, of which only the edges look at masks. A list names the key blocks of a query block, the
full ones first; partial ones point to tiles of bits. Softmax is taken on the way (Milakov and
Gimelshein 2018; FlashAttention-2, algorithm 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .weights import LN2, logits, seen_in_tile


@triton.jit
def _take_keys(
    total,
    top,
    out,
    q,
    key_at,
    value_at,
    key_step,
    value_step,
    key,
    seen,
    m,
    scale,
    cap,
    head_dim,
    value_dim,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Add one block of keys to the running sums of softmax."""
    d = tl.arange(0, D)
    e = tl.arange(0, DV)
    key_rows = key_at + key.to(tl.int64)[:, None] * key_step + d[None, :]
    value_rows = value_at + key.to(tl.int64)[:, None] * value_step + e[None, :]
    if EVEN and not MASKED:
        k = tl.load(key_rows)
        v = tl.load(value_rows)
    else:
        real = (key < m)[:, None]
        k = tl.load(key_rows, mask=real & (d < head_dim)[None, :], other=0.0)
        v = tl.load(value_rows, mask=real & (e < value_dim)[None, :], other=0.0)
    k = k.to(INPUT)
    v = v.to(INPUT)
    dots = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=NUMBER)
    s, _ = logits(dots, scale, cap, SOFTCAP)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
        # What no row of the tile sees may be NaN: a weight of 0 would not silence it.
        some = tl.max(seen.to(tl.int32), 0) > 0
        v = tl.where(some[:, None], v, 0.0)
    higher = tl.maximum(top, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    powers = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(powers, 1)
    out = out * shrink[:, None]
    out = tl.dot(powers.to(INPUT), v, out, input_precision=PRECISION, out_dtype=NUMBER)
    return total, higher, out


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
    start = tl.load(tile + 2)
    partial = tl.load(tile + 3)
    stop = tl.load(tile + 4)
    batch = (tl.load(run) + tl.program_id(2)).to(tl.int64)
    q_first = tl.load(run + 1)
    n = tl.load(run + 2)
    k_first = tl.load(run + 3)
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
    place = (q_first + query).to(tl.int64)
    d = tl.arange(0, D)
    e = tl.arange(0, DV)
    q = tl.load(
        Q + batch * q_batch + (head * q_head + place * q_row)[:, None] + d[None, :],
        mask=real[:, None] & (d < head_dim)[None, :],
        other=0.0,
    ).to(INPUT)
    key_at = K + batch * k_batch + kv_head * k_head + k_first.to(tl.int64) * k_row
    value_at = V + batch * v_batch + kv_head * v_head + k_first.to(tl.int64) * v_row
    hole_at = KEY_MASK + batch * mask_batch + k_first

    top = tl.full([ROWS], float("-inf"), NUMBER)
    total = tl.zeros([ROWS], NUMBER)
    out = tl.zeros([ROWS, DV], NUMBER)
    span = tl.arange(0, KEYS)

    if BAND:
        last = tl.minimum(first + QUERIES, n) - 1
        begin = tl.maximum(low + first, 0) // KEYS * KEYS
        end = tl.minimum(high + last + 1, m)
        inner = tl.maximum((tl.maximum(low + last, 0) + KEYS - 1) // KEYS * KEYS, begin)
        outer = tl.maximum(tl.maximum(tl.minimum(high + first + 1, m), 0) // KEYS * KEYS, inner)
        if HOLES:
            outer = inner
        for at in range(begin, tl.minimum(inner, end), KEYS):
            key = at + span
            seen = (key[None, :] >= low + query[:, None]) & (key[None, :] <= high + query[:, None])
            seen = seen & (key < m)[None, :] & real[:, None]
            if HOLES:
                seen = seen & (tl.load(hole_at + key, mask=key < m, other=0) != 0)[None, :]
            total, top, out = _take_keys(
                total, top, out, q, key_at, value_at, k_row, v_row, key, seen, m, scale, cap,
                head_dim, value_dim, True, SOFTCAP, PRECISION, NUMBER, INPUT, D, DV, EVEN,
            )  # fmt: skip
        if not HOLES:
            for at in range(inner, outer, KEYS):
                total, top, out = _take_keys(
                    total, top, out, q, key_at, value_at, k_row, v_row, at + span, True, m, scale,
                    cap, head_dim, value_dim, False, SOFTCAP, PRECISION, NUMBER, INPUT, D, DV, EVEN,
                )  # fmt: skip
        for at in range(outer, end, KEYS):
            key = at + span
            seen = (key[None, :] >= low + query[:, None]) & (key[None, :] <= high + query[:, None])
            seen = seen & (key < m)[None, :] & real[:, None]
            if HOLES:
                seen = seen & (tl.load(hole_at + key, mask=key < m, other=0) != 0)[None, :]
            total, top, out = _take_keys(
                total, top, out, q, key_at, value_at, k_row, v_row, key, seen, m, scale, cap,
                head_dim, value_dim, True, SOFTCAP, PRECISION, NUMBER, INPUT, D, DV, EVEN,
            )  # fmt: skip
    else:
        for entry in range(start, partial):
            key = tl.load(COLS + entry) * KEYS + span
            if HOLES:
                seen = (tl.load(hole_at + key) != 0)[None, :] & real[:, None]
                total, top, out = _take_keys(
                    total, top, out, q, key_at, value_at, k_row, v_row, key, seen, m, scale, cap,
                    head_dim, value_dim, True, SOFTCAP, PRECISION, NUMBER, INPUT, D, DV, EVEN,
                )  # fmt: skip
            else:
                total, top, out = _take_keys(
                    total, top, out, q, key_at, value_at, k_row, v_row, key, True, m, scale, cap,
                    head_dim, value_dim, False, SOFTCAP, PRECISION, NUMBER, INPUT, D, DV, EVEN,
                )  # fmt: skip
        for entry in range(partial, stop):
            key = tl.load(COLS + entry) * KEYS + span
            seen = seen_in_tile(
                MASKS, tl.load(LOOKS + entry), (row // PACK)[:, None], span[None, :], QUERIES, KEYS
            )
            if HOLES:
                seen = seen & (tl.load(hole_at + key, mask=key < m, other=0) != 0)[None, :]
            total, top, out = _take_keys(
                total, top, out, q, key_at, value_at, k_row, v_row, key, seen, m, scale, cap,
                head_dim, value_dim, True, SOFTCAP, PRECISION, NUMBER, INPUT, D, DV, EVEN,
            )  # fmt: skip

    empty = total == 0
    out = out / tl.where(empty, 1.0, total)[:, None]
    tl.store(
        OUT + batch * out_batch + (head * out_head + place * out_row)[:, None] + e[None, :],
        out.to(OUT.dtype.element_ty),
        mask=real[:, None] & (e < value_dim)[None, :],
    )
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(LSE + batch * lse_batch + head * lse_head + place, lse, mask=real)
