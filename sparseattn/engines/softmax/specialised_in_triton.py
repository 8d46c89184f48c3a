"""Launches of the forward kernel for Hopper, and which calls it serves: bands, without holes."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ..triton_launch import launch

if TYPE_CHECKING:
    from .in_triton import _Launcher
    from .triton.hopper_config import Cut

_MOST_RUNS = 8  # each is a launch


@lru_cache(maxsize=1)
def _version() -> tuple[int, ...]:
    import triton

    return tuple(int(x) for x in triton.__version__.split(".")[:2])


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # in a recording
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _described(x: Tensor) -> bool:
    """Whether a tensor descriptor can hold x: everything starts at a multiple of 16 bytes."""
    steps = [step * x.element_size() for step in x.stride()[:3]]
    return x.data_ptr() % 16 == 0 and all(
        size == 1 or (step % 16 == 0 and 0 < step < 2**40)
        for size, step in zip(x.shape, steps, strict=False)
    )


def tiles(shared: _Launcher) -> Cut | None:
    """How the kernel is cut, where it serves this call and is chosen."""
    from .triton import hopper_config, plan

    call: AttentionCall = shared.call
    bands = [
        plan.band(shared.mechanism, run.n, run.m, call.causal, run.offset) for run in shared.runs
    ]
    bounded = all(band is not None and None not in band for band in bands)
    widths = (call.head_dim, call.value_dim)
    found = hopper_config.cut(shared.target, shared.q.dtype, widths, bounded)
    if found is None or _version() not in hopper_config.VERSIONS:
        return None
    if shared.holes or call.softcap is not None or call.scale <= 0:
        return None
    if len(shared.runs) > _MOST_RUNS:
        return None
    if not all(_described(x) for x in (shared.q, shared.k, shared.v)):
        return None
    banded = (plan.band_ends(shared.mechanism, run, call.causal) for run in shared.runs)
    # A band that is empty in each row may still have keys between those of its first and last.
    return found if all(ends is not None and ends[0] <= ends[1] for ends in banded) else None


def _descriptor(x: Tensor, size: int) -> Any:
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


def forward(shared: _Launcher, tiles: Cut, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse."""
    from .triton import plan
    from .triton.hopper import forward_specialised

    call: AttentionCall = shared.call
    size = tiles.consumers * tiles.rows
    for run in shared.runs:
        ends = plan.band_ends(shared.mechanism, run, call.causal)
        assert ends is not None
        # Keys that no query of the run sees stand outside of the descriptors, and are read as 0.
        bottom = max(ends[0], 0)
        m = min(ends[1] + run.n, run.m) - bottom
        low, high = (end - bottom for end in ends)
        # The queries that see something.
        begin, end = max(-high, 0), min(run.n, m - low)
        q, o, part = (x[run.batch, :, run.queries] for x in (shared.q, out, lse))
        skipped, count = begin // size, -(-end // size) - begin // size
        if begin >= end or skipped > 0 or (skipped + count) * size < run.n:
            o.zero_()
            part.fill_(-torch.inf)
        if begin >= end or m <= 0:
            continue
        seen = slice(run.keys.start + bottom, run.keys.start + bottom + m)
        k, v = (x[run.batch, :, seen] for x in (shared.k, shared.v))
        total = count * call.q_heads * q.shape[0]
        programs = min(total, _processors(q.device)) if tiles.persistent else total
        launch(
            forward_specialised,
            (programs,),
            *(o, part),
            _descriptor(q, tiles.rows),
            *(_descriptor(x, tiles.keys) for x in (k, v)),
            _descriptor(o, tiles.rows),
            *(*part.stride()[:2], run.n, m, low, high, skipped, count),
            *(call.q_heads, call.groups, total, sum(shared.numbers()[:2])),
            CONSUMERS=tiles.consumers,
            ROWS=tiles.rows,
            KEYS=tiles.keys,
            QUERIES=2 if tiles.persistent else 1,
            STAGES=tiles.stages,
            PIN=tiles.pin,
            TURNS=tiles.turns,
            num_warps=tiles.rows // 16,
        )
