"""Decoding: a few queries over many keys, cut along the keys and merged by their log normalisers.

All query heads of a group, and all queries, are rows of one tile, so each key is read once. The cut
depends on the number of keys alone, so that a row has the same bits in any batch (Flash-Decoding).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import factors, softmax_of, take_keys
from .weights import LN2, LOG2E, in_width


@triton.jit(
    do_not_specialize=[
        *("n", "low", "high", "begin", "end", "splits", "groups"),
        *("mask_batch", "mask_head", "mask_row"),
    ]
)
def part_of_keys(
    Q,
    K,
    V,
    MASK,
    PART,
    PART_LSE,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    mask_batch,
    mask_head,
    mask_row,
    scale,
    scale_rest,
    cap,
    cap_rest,
    head_dim,
    value_dim,
    groups,
    n,
    low,
    high,
    begin,
    end,
    splits,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program (split, key-value head, batch row): keys `begin + split * SPLIT` and on, up to `end`.

    Query i sees the keys from `low + i` to `high + i` for which MASK `[B, Hq, n, keys]`, if MASKED,
    is not 0. PART is `[B, Hkv, splits, ROWS, DV]`, PART_LSE the same without its last axis, in
    `NUMBER`; row r is query `r // groups` of head `r % groups` in the group.
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    scale = tl.cast(scale, NUMBER) + tl.cast(scale_rest, NUMBER)
    cap = tl.cast(cap, NUMBER) + tl.cast(cap_rest, NUMBER)
    row = tl.arange(0, ROWS)
    query = row // groups
    head = kv_head * groups + row % groups
    real = query < n
    d = tl.arange(0, D)
    e = tl.arange(0, DV)
    span = tl.arange(0, KEYS)
    q_at = batch * q_batch + (head * q_head + query.to(tl.int64) * q_row)[:, None] + d[None, :]
    q = tl.load(Q + q_at, in_width(real, d, head_dim, EVEN), 0.0).to(INPUT)
    q, by = factors(q, scale, cap, SOFTCAP, NUMBER, INPUT)
    k_offset = span[:, None] * k_row + d[None, :]
    v_offset = span[:, None] * v_row + e[None, :]
    key_at = K + batch * k_batch + kv_head * k_head
    value_at = V + batch * v_batch + kv_head * v_head
    mask_at = MASK + batch * mask_batch + head * mask_head + query.to(tl.int64) * mask_row
    top = tl.full([ROWS], float("-inf"), NUMBER)
    total = tl.zeros([ROWS], NUMBER)
    out = tl.zeros([ROWS, DV], NUMBER)
    first = begin + split * SPLIT
    for at in range(first, tl.minimum(first + SPLIT, end), KEYS):
        key = at + span
        inside = key < end
        seen = (key[None, :] >= low + query[:, None]) & (key[None, :] <= high + query[:, None])
        seen = seen & inside[None, :] & real[:, None]
        some = inside & (key >= low) & (key <= high + n - 1)
        if MASKED:
            bits = tl.load(mask_at[:, None] + key[None, :], real[:, None] & inside[None, :], 0)
            seen = seen & (bits != 0)
            # What no query sees may be NaN.
            some = some & (tl.max(seen.to(tl.int32), 0) > 0)
        base = tl.cast(at, tl.int64)
        k = tl.load(key_at + base * k_row + k_offset, in_width(some, d, head_dim, EVEN), 0.0)
        v = tl.load(value_at + base * v_row + v_offset, in_width(some, e, value_dim, EVEN), 0.0)
        total, top, out = take_keys(
            *(total, top, out, q, k.to(INPUT), v.to(INPUT), seen, scale, by),
            *(True, SOFTCAP, PRECISION, NUMBER, INPUT),
        )
    out, lse = softmax_of(total, top, out)
    part = ((batch * tl.num_programs(1) + kv_head) * splits + split) * ROWS + row
    tl.store(PART + part[:, None] * DV + e[None, :], out, mask=real[:, None])
    tl.store(PART_LSE + part, lse, mask=real)


@triton.jit(do_not_specialize=["n", "splits", "value_dim", "groups", "lse_batch", "lse_head"])
def merge_parts(
    PART,
    PART_LSE,
    OUT,
    LSE,
    out_batch,
    out_head,
    out_row,
    lse_batch,
    lse_head,
    value_dim,
    groups,
    n,
    splits,
    NUMBER: tl.constexpr,
    ROWS: tl.constexpr,
    DV: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Program (row, key-value head, batch row): parts of disjoint keys, weighed by their lse."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    e = tl.arange(0, DV)
    split = tl.arange(0, AT_ONCE)
    base = (batch * tl.num_programs(1) + kv_head) * splits * ROWS + row
    total = tl.zeros([AT_ONCE], NUMBER)
    out = tl.zeros([AT_ONCE, DV], NUMBER)
    top = tl.full([AT_ONCE], float("-inf"), NUMBER)
    for at in range(0, splits, AT_ONCE):
        place = base + (at + split).to(tl.int64) * ROWS
        there = at + split < splits
        lse = tl.load(PART_LSE + place, there, float("-inf"))
        part = tl.load(PART + place[:, None] * DV + e[None, :], there[:, None], 0.0)
        higher = tl.maximum(top, lse)
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2((top - anchor) * LOG2E)
        weight = tl.exp2((lse - anchor) * LOG2E)
        total = total * shrink + weight
        out = out * shrink[:, None] + part * weight[:, None]
        top = higher
    # The lanes, too, are parts of disjoint keys.
    highest = tl.max(top, 0)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    share = tl.exp2((top - anchor) * LOG2E)
    whole = tl.sum(total * share, 0)
    result = tl.sum(out * share[:, None], 0)
    some = tl.where(whole == 0, 1.0, whole)
    query = (row // groups).to(tl.int64)
    head = kv_head * groups + row % groups
    tl.store(
        OUT + batch * out_batch + head * out_head + query * out_row + e,
        (result / some).to(OUT.dtype.element_ty),
        mask=e < value_dim,
    )
    lse = tl.where(whole == 0, float("-inf"), anchor + tl.log2(some) * LN2)
    tl.store(LSE + batch * lse_batch + head * lse_head + query, lse)
