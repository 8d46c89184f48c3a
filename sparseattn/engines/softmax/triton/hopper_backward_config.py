"""How the backward kernels for Hopper are cut, and where they are chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...triton_launch import Target
from .hopper_config import chosen


class Cut(NamedTuple):
    """Of one kernel.

    Attributes:
        size: rows of a block in a ring: of queries for gradients of keys, of keys for those of
            queries. stages: blocks in it.
        late: whether what a block adds is summed beside the powers of the next.
    """

    size: int = 64
    stages: int = 2
    late: bool = False


class Cuts(NamedTuple):
    """Of both kernels; None where the plain one is as fast."""

    queries: Cut | None = None
    keys: Cut | None = None


# Capabilities on which they were measured to be right, and faster than those of `backward`.
_ON: frozenset[int] = frozenset({90})
# By the wider of keys and values.
_CUTS = {
    128: Cuts(Cut(64, 3, True), Cut(64, 3, True)),
    64: Cuts(None, Cut(128, 2, False)),
}


def cuts(target: Target, dtype: torch.dtype, widths: tuple[int, int]) -> Cuts | None:
    """The cuts where the kernels serve and are chosen.

    Args:
        widths: of a key and of a value.
    """
    return _CUTS[max(widths)] if chosen(target, dtype, widths, _ON) else None
