"""One token of a decode: it is added to a state in float64, and its query meets the sum."""

from __future__ import annotations

import triton
import triton.language as tl

from .features import function_of, number_of


@triton.jit
def wide_of(x):
    """x in float64; halves by way of float32, as the interpreter needs it."""
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def _phi(X, f, width, scale, position, turn, count, FUNCTION: tl.constexpr, PARTS: tl.constexpr):
    """Features f of a row, `[F]` in float64, 0 beyond the last."""
    x = tl.load(X + f % width, f < count, 0.0)
    x = wide_of(x) * scale
    phi = function_of(x, FUNCTION)
    if PARTS == 2:
        angle = position.to(tl.float64) * turn
        phi *= tl.where(f < width, tl.cos(angle), tl.sin(angle))
    return tl.where(f < count, phi, 0.0)


@triton.jit(do_not_specialize=["q_batch", "k_batch", "v_batch", "position_batch"])
def state_step(
    Q,
    K,
    V,
    STATE,
    AFTER,
    OUT,
    POSITION,
    LOGS,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    position_batch,
    width,
    value_width,
    columns,
    groups,
    scale,
    scale_rest,
    key_scale,
    key_scale_rest,
    turn,
    turn_rest,
    NORMALIZE: tl.constexpr,
    DECAY: tl.constexpr,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
):
    """Program (block of columns, query head, batch row).

    STATE and AFTER are `[B, heads, features, columns]`, with a column of ones beside the values if
    NORMALIZE; OUT is `[B, Hq, 1, Dv]`.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // groups
    scale = number_of(scale, scale_rest, tl.float64)
    key_scale = number_of(key_scale, key_scale_rest, tl.float64)
    turn = number_of(turn, turn_rest, tl.float64)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + kv_head * k_head
    V += batch * v_batch + kv_head * v_head
    position = tl.load(POSITION + batch * position_batch) if PARTS == 2 else 0
    position = tl.cast(position, tl.int64)

    heads = tl.num_programs(1)
    state_head = head
    shrink = tl.cast(1.0, tl.float64)
    if DECAY:
        shrink = tl.exp2(tl.load(LOGS + head))
    else:
        heads = heads // groups
        state_head = kv_head
    count = width * PARTS
    at = (batch * heads + state_head) * count * columns
    e = tl.program_id(0) * E + tl.arange(0, E)
    value = wide_of(tl.load(V + e, e < value_width, 0.0))
    value = tl.where(e == value_width, 1.0, value)
    out = tl.zeros([E], tl.float64)
    weight = tl.zeros([1], tl.float64)
    for first in range(0, count, F):
        f = first + tl.arange(0, F)
        phi_k = _phi(K, f, width, key_scale, position, turn, count, FUNCTION, PARTS)
        phi = _phi(Q, f, width, scale, position, turn, count, FUNCTION, PARTS)
        here = at + f[:, None] * columns + e[None, :]
        inside = (f < count)[:, None] & (e < columns)[None, :]
        state = tl.load(STATE + here, inside, 0.0) * shrink + phi_k[:, None] * value[None, :]
        if DECAY or head % groups == 0:  # one query head writes what it shares
            tl.store(AFTER + here, state, inside)
        out += tl.sum(phi[:, None] * state, 0)
        if NORMALIZE:
            ones = tl.load(STATE + at + f * columns + value_width, f < count, 0.0)
            weight += tl.sum(phi * (ones + phi_k), 0)
    if NORMALIZE:
        out /= tl.where(weight == 0, float("inf"), weight)
    out_at = OUT + (batch * tl.num_programs(1) + head) * value_width
    if OUT.dtype.element_ty.primitive_bitwidth < 32:
        out = out.to(tl.float32)
    tl.store(out_at + e, out.to(OUT.dtype.element_ty), e < value_width)
