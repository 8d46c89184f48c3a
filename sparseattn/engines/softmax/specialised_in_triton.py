"""Launches of the forward kernel for Hopper, and which calls it serves: bands, and lists of
blocks that are seen throughout, without holes."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...call import AttentionCall
from ...runs import Run
from ..triton_launch import launch
from . import plan

if TYPE_CHECKING:
    from .in_triton import _Launcher
    from .triton.hopper_config import Cut

_MOST_RUNS = 8  # each is a launch


@lru_cache(maxsize=1)
def _version() -> tuple[int, ...]:
    import triton

    return tuple(int(x) for x in triton.__version__.split(".")[:2])


def _described(x: Tensor) -> bool:
    """Whether a tensor descriptor can hold x: everything starts at a multiple of 16 bytes."""
    steps = [step * x.element_size() for step in x.stride()[:3]]
    return x.data_ptr() % 16 == 0 and all(
        size == 1 or (step % 16 == 0 and 0 < step < 2**40)
        for size, step in zip(x.shape, steps, strict=False)
    )


def serves(shared: _Launcher, *tensors: Tensor) -> bool:
    """Whether the kernels for Hopper serve a call of some tensors, but for its pattern."""
    from .triton import hopper_config

    call: AttentionCall = shared.call
    plain = not shared.holes and call.softcap is None and call.scale > 0
    if not plain or len(shared.runs) > _MOST_RUNS or _version() not in hopper_config.VERSIONS:
        return False
    return all(_described(x) for x in tensors)


class Chosen(NamedTuple):
    """How a call is launched: the kernel's cut, and a plan for each run whose pattern is a list of
    blocks instead of a band."""

    cut: Cut
    lists: list[plan.Plan] | None


def tiles(shared: _Launcher) -> Chosen | None:
    """How the kernel is launched, where it serves this call and is chosen."""
    from .triton import config, hopper_config

    call: AttentionCall = shared.call
    if len(shared.runs) > _MOST_RUNS:
        return None
    bands = [plan.band_ends(shared.mechanism, run, call.causal) for run in shared.runs]
    narrow = any(
        plan.narrow(shared.mechanism, run, call.causal, config.NARROW) for run in shared.runs
    )
    listed = None in bands
    pattern = "lists" if listed else "narrow" if narrow else "wide"
    widths = (call.head_dim, call.value_dim)
    cut = hopper_config.cut(shared.target, shared.q.dtype, widths, pattern)
    if cut is None or not serves(shared, shared.q, shared.k, shared.v):
        return None
    if listed:
        size = (2 * cut.rows, cut.keys)
        lists = [plan.make(shared.mechanism, call, [run], *size) for run in shared.runs]
        # Blocks that are seen in part have masks.
        whole = all(made.masks.dim() == 1 and not made.band for made in lists)
        return Chosen(cut, lists) if whole else None
    # A band that is empty in each row may still have keys between its first and last rows'.
    empty = any(ends is not None and ends[0] > ends[1] for ends in bands)
    return None if empty else Chosen(cut, None)


def descriptor(x: Tensor, size: int) -> Any:
    """Of `[B, H, N, D]`, in blocks of `size` rows."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, size, x.shape[3]]
    kind = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    # The step along a dimension of one place is any number, and must be one that is allowed.
    steps = [
        step if many > 1 else x.shape[3]
        for step, many in zip(x.stride()[:3], x.shape, strict=False)
    ]
    return TensorDescriptor(x, list(x.shape), [*steps, 1], block, layout)


class _Part(NamedTuple):
    """What a launch has of a run: its keys that some query sees, its band relative to the first of
    them, the tiles before the first that sees any, and how many do."""

    keys: slice
    band: tuple[int, int]
    skipped: int
    tiles: int


def _part(ends: tuple[int, int], run: Run, size: int) -> _Part | None:
    """The part of a run that a band has, from `plan.band_ends`; None where it sees nothing."""
    bottom = max(ends[0], 0)
    m = min(ends[1] + run.n, run.m) - bottom
    low, high = ends[0] - bottom, ends[1] - bottom
    begin, end = max(-high, 0), min(run.n, m - low)  # the queries that see something
    if m <= 0 or begin >= end:
        return None
    keys = slice(run.keys.start + bottom, run.keys.start + bottom + m)
    return _Part(keys, (low, high), begin // size, -(-end // size) - begin // size)


def forward(shared: _Launcher, chosen: Chosen, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse."""
    from .triton.hopper import forward_specialised

    call: AttentionCall = shared.call
    cut, lists = chosen
    size = 2 * cut.rows
    for at, run in enumerate(shared.runs):
        q, o, some = (x[run.batch, :, run.queries] for x in (shared.q, out, lse))
        tables = (o, o)  # pointers to something
        part: _Part | None
        if lists is not None:
            part = _Part(run.keys, (0, 0), 0, len(lists[at].tiles))
            tables = (lists[at].tiles, lists[at].cols)
        else:
            ends = plan.band_ends(shared.mechanism, run, call.causal)
            assert ends is not None
            part = _part(ends, run, size)
        if part is None or part.skipped > 0 or part.tiles * size < run.n:
            o.zero_()
            some.fill_(-torch.inf)
        if part is None:
            continue
        # Keys that no query sees stand outside of the descriptors, and are read as 0.
        k, v = (x[run.batch, :, part.keys] for x in (shared.k, shared.v))
        launch(
            forward_specialised,
            (part.tiles * call.q_heads * q.shape[0],),
            *(o, some, descriptor(q, cut.rows)),
            *(descriptor(x, cut.keys) for x in (k, v)),
            *(descriptor(o, cut.rows), *tables, *some.stride()[:2]),
            *(run.n, k.shape[2], *part.band, part.skipped, part.tiles),
            *(call.q_heads, call.groups, sum(shared.numbers()[:2])),
            LISTS=lists is not None,
            ROWS=cut.rows,
            KEYS=cut.keys,
            STAGES=cut.stages,
            TURNS=cut.turns,
            num_warps=cut.rows // 16,
        )
