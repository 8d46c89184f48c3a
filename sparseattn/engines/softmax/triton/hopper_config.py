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
        turns: whether the two take turns at issuing products.
    """

    rows: int = 64
    keys: int = 128
    stages: int = 2
    turns: bool = False


WIDTHS = (64, 128)
# Versions of Triton with which it was compiled and run.
VERSIONS = frozenset({(3, 6)})
# Capabilities on which it was measured to be right, and faster than `forward`.
_ON = frozenset({90})
# What was fastest on an H100, by the wider of keys and values and by the pattern: bands of fewer
# keys than `config.NARROW`, other bands, and lists of blocks.
_CUTS = {
    (64, "narrow"): Cut(turns=True),
    (64, "wide"): Cut(turns=True),
    (64, "lists"): Cut(),
    (128, "narrow"): Cut(),
    (128, "wide"): Cut(turns=True),
    (128, "lists"): Cut(),
}


def chosen(target: Target, dtype: torch.dtype, widths: tuple[int, int], on: frozenset[int]) -> bool:
    """Whether a kernel for Hopper serves, and is chosen: `SPARSEATTN_TRITON_SPECIALISED=1` chooses
    it wherever it serves, 0 nowhere, and else it is on the capabilities `on`."""
    asked = os.environ.get("SPARSEATTN_TRITON_SPECIALISED", "")
    if target != Target("cuda", 90) or not (asked == "1" or (asked != "0" and target.arch in on)):
        return False
    return dtype in (torch.float16, torch.bfloat16) and all(x in WIDTHS for x in widths)


def cut(target: Target, dtype: torch.dtype, widths: tuple[int, int], pattern: str) -> Cut | None:
    """The cut where the kernel serves and is chosen.

    Args:
        widths: of a key and of a value.
        pattern: "narrow", "wide" or "lists".
    """
    return _CUTS[max(widths), pattern] if chosen(target, dtype, widths, _ON) else None
