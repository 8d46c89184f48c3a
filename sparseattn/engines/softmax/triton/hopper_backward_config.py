"""How the backward kernels for Hopper are cut, and where they are chosen."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from ...triton_launch import Target
from .hopper_config import WIDTHS


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
    """The cuts where the kernels serve and are chosen, by `SPARSEATTN_TRITON_SPECIALISED` as the
    forward is.

    Args:
        widths: of a key and of a value.
    """
    asked = os.environ.get("SPARSEATTN_TRITON_SPECIALISED", "")
    serves = target.backend == "cuda" and target.arch == 90
    if not serves or not (asked == "1" or (asked != "0" and target.arch in _ON)):
        return None
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    if any(width not in WIDTHS for width in widths):
        return None
    return _CUTS[max(widths)]
