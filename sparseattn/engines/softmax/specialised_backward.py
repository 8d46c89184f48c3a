"""Launches of the backward kernels for Hopper, and which calls they serve: bands, without holes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ...call import AttentionCall
from ..triton_launch import launch
from . import plan
from .specialised_in_triton import descriptor, serves

if TYPE_CHECKING:
    from .in_triton import _Launcher
    from .triton.hopper_backward_config import Cut, Cuts

_Slices = tuple[slice, slice, slice]


def cuts(shared: _Launcher, grad: Tensor) -> Cuts | None:
    """How the kernels are cut, where they serve this call and are chosen."""
    from .triton import hopper_backward_config

    call: AttentionCall = shared.call
    widths = (call.head_dim, call.value_dim)
    found = hopper_backward_config.cuts(shared.target, shared.q.dtype, widths)
    if found is None or not serves(shared, grad, shared.q, shared.k, shared.v):
        return None
    banded = (plan.band_ends(shared.mechanism, run, call.causal) for run in shared.runs)
    return found if all(ends is not None and ends[0] <= ends[1] for ends in banded) else None


class _Piece(NamedTuple):
    """The queries and keys of a run that see something or are seen: the others stand outside of the
    descriptors, are read as 0, and have no gradient.

    Attributes:
        rows, keys: of tensors with heads; `run_rows`, `run_keys` those of the run.
        low, high: query r sees the keys from `low + r` to `high + r`.
        some: whether there are any.
    """

    rows: _Slices
    keys: _Slices
    run_rows: _Slices
    run_keys: _Slices
    low: int
    high: int
    some: bool


def _pieces(shared: _Launcher) -> Iterator[_Piece]:
    for run in shared.runs:
        ends = plan.band_ends(shared.mechanism, run, shared.call.causal)
        assert ends is not None
        low, high = ends
        begin, end = max(-high, 0), min(run.n, run.m - low)
        bottom, top = max(low + begin, 0), min(high + end, run.m)

        def cut(first: int, start: int, stop: int, batch: slice = run.batch) -> _Slices:
            return batch, slice(None), slice(first + start, first + stop)

        yield _Piece(
            cut(run.queries.start, begin, end),
            cut(run.keys.start, bottom, top),
            cut(run.queries.start, 0, run.n),
            cut(run.keys.start, 0, run.m),
            low + begin - bottom,
            high + begin - bottom,
            begin < end and bottom < top,
        )


def make_deltas(grad: Tensor, out: Tensor, grad_lse: Tensor | None, delta: Tensor) -> None:
    """Fill delta, `grad . out - grad_lse`."""
    from .triton.hopper_backward_queries import deltas

    batch, heads, n, width = grad.shape
    launch(
        deltas,
        (-(-n // 64), heads, batch),
        *(grad, out, delta if grad_lse is None else grad_lse, delta),
        *(*grad.stride()[:3], *out.stride()[:3], *delta.stride()[:2], n),
        LSE_GRAD=grad_lse is not None,
        ROWS=64,
        DV=width,
        num_warps=4,
    )


def grad_queries(
    shared: _Launcher, tiles: Cut, grad: Tensor, lse: Tensor, delta: Tensor, dq: Tensor
) -> None:
    """Fill dq."""
    from .triton.hopper_backward_queries import grad_queries_specialised

    call: AttentionCall = shared.call
    for piece in _pieces(shared):
        if not piece.some or piece.rows != piece.run_rows:
            dq[piece.run_rows].zero_()
        if not piece.some:
            continue
        q, g, d_q = (x[piece.rows] for x in (shared.q, grad, dq))
        k, v = (x[piece.keys] for x in (shared.k, shared.v))
        many = -(-q.shape[2] // 128)
        launch(
            grad_queries_specialised,
            (many * call.q_heads * q.shape[0],),
            *(lse[piece.rows], delta[piece.rows]),
            *(descriptor(x, 64) for x in (g, q)),
            *(descriptor(x, tiles.size) for x in (k, v)),
            descriptor(d_q, 64),
            *(*lse.stride()[:2], q.shape[2], k.shape[2], piece.low, piece.high),
            *(many, call.q_heads, call.groups, sum(shared.numbers()[:2]), call.scale),
            ROWS=64,
            SIZE=tiles.size,
            STAGES=tiles.stages,
            LATE=tiles.late,
            num_warps=4,
        )


def grad_keys(
    shared: _Launcher, tiles: Cut, grad: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Fill dk and dv."""
    from .triton.hopper_backward import grad_keys_specialised

    call: AttentionCall = shared.call
    for piece in _pieces(shared):
        if not piece.some or piece.keys != piece.run_keys:
            dk[piece.run_keys].zero_()
            dv[piece.run_keys].zero_()
        if not piece.some:
            continue
        q, g = (x[piece.rows] for x in (shared.q, grad))
        k, v, d_k, d_v = (x[piece.keys] for x in (shared.k, shared.v, dk, dv))
        many = -(-k.shape[2] // 128)
        launch(
            grad_keys_specialised,
            (many * call.kv_heads * k.shape[0],),
            *(lse[piece.rows], delta[piece.rows]),
            *(descriptor(x, tiles.size) for x in (g, q)),
            *(descriptor(x, 64) for x in (k, v, d_k, d_v)),
            *(*lse.stride()[:2], q.shape[2], k.shape[2], -piece.high, -piece.low),
            *(many, call.kv_heads, call.groups, sum(shared.numbers()[:2]), call.scale),
            ROWS=64,
            SIZE=tiles.size,
            STAGES=tiles.stages,
            LATE=tiles.late,
            num_warps=4,
        )
