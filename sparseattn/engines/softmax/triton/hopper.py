"""Forward on Hopper, with warps that only load: bands, through tensor descriptors.

The body is that of `forward`, for bands without holes and one query head a tile. Everything comes
and goes through descriptors made in the kernel, in one loop: the compiler then gives the loads to
warps of their own, and deals the rows of a tile out to two groups of others. It does so for tiles
of 128 rows and 4 warps, and for no function that also loads by pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import softmax_of, take_keys
from .weights import seen_in_band


@triton.jit(do_not_specialize=["lse_batch", "lse_head", "head_dim", "value_dim"])
def forward_specialised(
    Q,
    K,
    V,
    OUT,
    LSE,
    RUNS,
    TILES,
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
    scale,
    scale_rest,
    cap,
    cap_rest,
    head_dim,
    value_dim,
    groups,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
):
    """Program (tile, query head, batch row); arguments as `forward` has them."""
    tile = TILES + tl.program_id(0) * 8
    run = RUNS + tl.load(tile) * 8
    first = tl.load(tile + 1) * ROWS
    batch = (tl.load(run) + tl.program_id(2)).to(tl.int64)
    q_first = tl.load(run + 1).to(tl.int64)
    n = tl.load(run + 2)
    k_first = tl.load(run + 3).to(tl.int64)
    m = tl.load(run + 4)
    low = tl.load(run + 5)
    high = tl.load(run + 6)
    scale = tl.cast(scale, NUMBER) + tl.cast(scale_rest, NUMBER)
    cap = tl.cast(cap, NUMBER) + tl.cast(cap_rest, NUMBER)
    head = tl.program_id(1).to(tl.int64)
    kv_head = (tl.program_id(1) // groups).to(tl.int64)
    query = first + tl.arange(0, ROWS)
    span = tl.arange(0, KEYS)

    # Keys that no query sees stand outside of the descriptors, and are loaded as 0; so are queries
    # past the end of their run, which are not stored.
    bottom = tl.maximum(low, 0)
    height = tl.maximum(tl.minimum(high + n, m) - bottom, 0)
    k_place = k_first + bottom
    queries = tl.make_tensor_descriptor(
        Q + batch * q_batch + head * q_head + q_first * q_row, [n, head_dim], [q_row, 1], [ROWS, D]
    )
    keys = tl.make_tensor_descriptor(
        K + batch * k_batch + kv_head * k_head + k_place * k_row,
        *([height, head_dim], [k_row, 1], [KEYS, D]),
    )
    values = tl.make_tensor_descriptor(
        V + batch * v_batch + kv_head * v_head + k_place * v_row,
        *([height, value_dim], [v_row, 1], [KEYS, DV]),
    )
    outs = tl.make_tensor_descriptor(
        OUT + batch * out_batch + head * out_head + q_first * out_row,
        *([n, value_dim], [out_row, 1], [ROWS, DV]),
    )
    q = queries.load([first, 0]).to(INPUT)
    top = tl.full([ROWS], float("-inf"), NUMBER)
    total = tl.zeros([ROWS], NUMBER)
    out = tl.zeros([ROWS, DV], NUMBER)
    last = tl.minimum(first + ROWS, n) - 1
    begin = (tl.maximum(low + first, 0) - bottom) // KEYS * KEYS
    end = tl.minimum(high + last + 1, m) - bottom
    # One loop, edges and interior alike: the compiler deals a whole function out to its warps.
    for at in tl.range(begin, end, KEYS, warp_specialize=True):
        key = bottom + at + span
        k = keys.load([at, 0]).to(INPUT)
        v = values.load([at, 0]).to(INPUT)
        seen = seen_in_band(low, high, query[:, None], key[None, :], n, m)
        total, top, out = take_keys(
            *(total, top, out, q, k, v, seen, scale, cap),
            *(True, SOFTCAP, PRECISION, NUMBER, INPUT),
        )
    out, lse = softmax_of(total, top, out)
    outs.store([first, 0], out.to(OUT.dtype.element_ty))
    place = q_first + query
    tl.store(LSE + batch * lse_batch + head * lse_head + place, lse, mask=query < n)
