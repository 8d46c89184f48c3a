"""Pieces of the forward kernel for Hopper, in Gluon: products, powers, masks, what is stored."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)

# Some names are others in later versions of Triton.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_to_shared = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_to_global = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _let_go(empty):
    """Say that this consumer has read what `empty` stands for: all of its warps have."""
    _barrier()
    mbarrier.arrive(empty)


@gluon.jit
def _flat(x):
    """A block of shared memory without its first two dimensions, which are 1."""
    ROWS: gl.constexpr = x.shape[2]
    WIDTH: gl.constexpr = x.shape[3]
    return x.reshape([ROWS, WIDTH])


@gluon.jit
def _dots(q, k_shared, k_full, j, LAYOUT: gl.constexpr):
    """Begin the product of queries and block j of the keys."""
    STAGES: gl.constexpr = k_shared.shape[0]
    k = _flat(k_shared.index(j % STAGES))
    mbarrier.wait(k_full.index(j % STAGES), (j // STAGES) & 1)
    ROWS: gl.constexpr = q.shape[0]
    KEYS: gl.constexpr = k.shape[0]
    zeros = gl.zeros([ROWS, KEYS], gl.float32, LAYOUT)
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _sums(weights, out, v_shared, v_full, j):
    """Begin to add weighed block j of the values."""
    STAGES: gl.constexpr = v_shared.shape[0]
    v = _flat(v_shared.index(j % STAGES))
    mbarrier.wait(v_full.index(j % STAGES), (j // STAGES) & 1)
    return warpgroup_mma(weights, v, out, is_async=True)


@gluon.jit
def _operand(weights, OUT_LAYOUT: gl.constexpr, INPUT: gl.constexpr):
    """Weights as the left operand of the product that gives a tensor of OUT_LAYOUT."""
    return gl.convert_layout(weights.to(INPUT), gl.DotOperandLayout(0, OUT_LAYOUT, 2))


@gluon.jit
def _power(x):
    """2 ** x, with results below the least normal number as 0."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


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
def _pinned(x):
    """Sums of powers, known by the time that what follows is waited for.

    The assembler would else move that wait ahead of the powers, which should be taken while it
    lasts. It keeps the order of a store, a barrier of the warp and a wait, and does not know that
    this store, of a sum below 0, is never made.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 p, $1, 0fBF800000;"
        " @p st.shared.f32 [a], $1; bar.warp.sync 0xffffffff; mov.b32 $0, $1; }",
        *("=f,f", [x]),
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _weigh(dots, top, scale, lowest, highest, begin, MASK: gl.constexpr):
    """Weights of a block of keys from its products with queries, the new maximum, and the factor
    for what was summed before. MASK: "both" bounds of a row's keys, the "upper" one, or ""."""
    LAYOUT: gl.constexpr = dots.type.layout
    KEYS: gl.constexpr = dots.shape[1]
    if MASK != "":
        key = begin + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
        dots = _unless_above(dots, key[None, :], highest[:, None])
        if MASK == "both":
            dots = _unless_above(dots, lowest[:, None], key[None, :])
    higher = gl.maximum(top, gl.max(dots, 1))
    base = gl.where(higher == float("-inf"), 0.0, higher) * scale
    weights = _power(dots * scale - base[:, None])
    return weights, higher, _power(top * scale - base)


@gluon.jit
def _normalised(total, top, scale, lse_at, row, n):
    """Store lse of a consumer's rows; returns what their sums of values are to be multiplied by."""
    empty = total == 0
    some = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("-inf"), (top * scale + gl.log2(some)) * _LN2)
    gl.store(lse_at + row, lse, mask=row < n)
    return 1.0 / some


@gluon.jit
def _finish(OUTS, o, out, inverse, place):
    """Store a consumer's rows."""
    by = gl.convert_layout(inverse, gl.SliceLayout(1, out.type.layout))
    _flat(o).store((out * by[:, None]).to(o.dtype))
    fence_async_shared()
    _barrier()
    _to_global(OUTS, place, o)
    tma.store_wait(0)
