"""How the forward kernel for Hopper is cut, and where it is chosen."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from ...triton_launch import Target


class Cut(NamedTuple):
    """Of `forward_specialised`.

    Attributes:
        rows: queries of each of the two warpgroups that compute.
        keys: of a block. stages: blocks in a ring.
        turns: whether consumers take turns at issuing products.
        persistent: whether a program has many tiles, and there are as many as processors.
    """

    rows: int = 64
    keys: int = 128
    stages: int = 2
    turns: bool = False
    persistent: bool = False


WIDTHS = (64, 128)
# Versions of Triton with which it was compiled and run.
VERSIONS = frozenset({(3, 6)})
# Capabilities on which it was measured to be right, and faster than `forward`.
_ON = frozenset({90})
# By the wider of keys and values, and whether the band is bounded on both sides: if so, its tiles
# take about the same time; under causal alone they do not.
_CUTS = {
    (64, False): Cut(),
    (64, True): Cut(persistent=True),
    (128, False): Cut(turns=True),
    (128, True): Cut(persistent=True, turns=True),
}


def cut(target: Target, dtype: torch.dtype, widths: tuple[int, int], bounded: bool) -> Cut | None:
    """The cut where the kernel serves and is chosen.

    Args:
        widths: of a key and of a value.
        bounded: whether a query sees keys up to some distance alone, on both sides, or lists of
            blocks.

    `SPARSEATTN_TRITON_SPECIALISED=1` chooses it wherever it serves, and 0 nowhere.
    """
    asked = os.environ.get("SPARSEATTN_TRITON_SPECIALISED", "")
    serves = target.backend == "cuda" and target.arch == 90
    if not serves or not (asked == "1" or (asked != "0" and target.arch in _ON)):
        return None
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    if any(width not in WIDTHS for width in widths):
        return None
    return _CUTS[max(widths), bounded]
