"""The pattern of a mechanism as a picture: in characters, or as an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..base import Mechanism
from ..call import AttentionCall
from ..errors import InvalidInputError, SparseAttnError, UnsupportedCallError
from ..reference import slab_rows

LONGEST = 32_768  # the picture looks at every pair of positions once
_ROWS, _COLUMNS = 32, 64  # a character is about twice as tall as wide
_PIXELS = 1024
_BLOCKS, _ASCII = " ░▒▓█", " .:*#"


def shades(encoding: str | None) -> str:
    """From nothing to all, in characters that the encoding has."""
    try:
        _BLOCKS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return _ASCII
    return _BLOCKS


def write_image(cells: NDArray[np.float64], path: Path) -> None:
    """Write `[rows, columns]` of 0 to 1 as an image: black for 1, white for 0.

    Raises:
        SparseAttnError: pillow is not installed, or the file cannot be written.
    """
    try:
        from PIL import Image
    except ImportError:
        raise SparseAttnError(
            "--save needs pillow, which is not installed: pip install 'sparseattn[report]'"
        ) from None
    # The square root lifts thin lines, which a pixel of many pairs would swallow.
    shade = np.round(255 * (1 - np.sqrt(cells))).astype(np.uint8)
    zoom = max(1, 512 // max(shade.shape))
    image = Image.fromarray(shade.repeat(zoom, axis=0).repeat(zoom, axis=1))
    try:
        image.save(path)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"--save got {str(path)!r}: {error}") from error


@dataclass(frozen=True)
class Picture:
    """The share of pairs used in each cell of a grid.

    Attributes:
        spec, length, causal: what was drawn.
        head: "of the first head of the recorded input" for a dynamic pattern; else empty.
        density: pairs used over pairs that the call allows.
        fine: `[rows, columns]` in 0..1, as fine as an image needs.
        coarse: the same, as coarse as a terminal needs.
    """

    spec: str
    length: int
    causal: bool
    head: str
    density: float
    fine: NDArray[np.float64]
    coarse: NDArray[np.float64]

    def record(self) -> dict[str, Any]:
        return {
            "length": self.length,
            "causal": self.causal,
            "density": self.density,
            "cells": self.coarse.round(4).tolist(),
        }

    def lines(self, encoding: str | None = "utf-8") -> list[str]:
        """The picture in characters: queries downward, keys to the right."""
        marks = shades(encoding)
        # Rounded up: a cell in which any pair is used is never blank.
        levels = np.ceil(self.coarse * (len(marks) - 1)).astype(int)
        rows, columns = levels.shape
        causal = "causal" if self.causal else "not causal"
        head = f", {self.head}" if self.head else ""
        return [
            f"Pattern, {self.length} queries (down) by {self.length} keys (right), {causal}{head}",
            "+" + "-" * columns + "+",
            *("|" + "".join(marks[level] for level in row) + "|" for row in levels),
            "+" + "-" * columns + "+",
            f"A character is {self.length / rows:g} queries by {self.length / columns:g} keys: "
            f"none used {marks[0]!r}, some to all {marks[1:]!r}. "
            f"Used: {self.density:.2%} of the pairs that the call allows",
        ]

    def save(self, path: Path) -> None:
        """Write an image: black where every pair is used, white where none is.

        Raises:
            SparseAttnError: pillow is not installed, or the file cannot be written.
        """
        write_image(self.fine, path)


def draw(
    mech: Mechanism,
    length: int,
    causal: bool,
    progress: Callable[[int, int, str], None] | None = None,
) -> Picture:
    """The pattern of a mechanism for `length` queries and keys.

    A dynamic pattern is the one that the first head of the recorded input gets.

    Raises:
        InvalidInputError: the length is out of range.
        UnsupportedCallError: the mechanism refuses the call.
    """
    if not 1 <= length <= LONGEST:
        raise InvalidInputError(f"--length got {length}; a pattern is drawn for 1 to {LONGEST}")
    dynamic = bool(getattr(mech, "is_dynamic", False))
    if dynamic:
        from ..harness.inputs import source

        recorded = source("recorded")
        recorded.check_length(length)
        sample = recorded.make(length, 0, causal)
        groups = sample.q.shape[1] // sample.k.shape[1]
        # A mechanism may choose once for all heads of a group, so the whole group is kept.
        q, k = sample.q[:1, :groups].float(), sample.k[:1, :1].float()
    else:
        q = k = torch.zeros(1, 1, 1, 64).expand(1, 1, length, 64)
    call = AttentionCall.make(q, k, k, causal=causal)
    reasons = mech.refusals(call)
    if reasons:
        raise UnsupportedCallError.of(f"mechanism {mech!r}", reasons)
    call = mech.with_selection(q, k, call)
    pixels, rows, columns = (min(length, most) for most in (_PIXELS, _ROWS, _COLUMNS))
    fine, coarse = np.zeros((pixels, pixels)), np.zeros((rows, columns))
    used = allowed = 0
    step = slab_rows(call)
    for start in range(0, length, step):
        part = call.take_rows(slice(start, min(start + step, length)))
        mask = mech.mask(part)[0, 0].cpu().numpy()
        used += int(mask.sum())
        allowed += int(part.allowed()[0, 0].sum())
        _pool(mask, start, length, fine)
        _pool(mask, start, length, coarse)
        if progress is not None:
            progress(min(start + step, length), length, "queries")
    head = "of the first head of the recorded input" if dynamic else ""
    return Picture(
        repr(mech),
        length,
        causal,
        head,
        used / allowed if allowed else 0.0,
        _shares(fine, length),
        _shares(coarse, length),
    )


def _pool(mask: NDArray[np.bool_], start: int, length: int, into: NDArray[np.float64]) -> None:
    """Add the pairs of some rows to the cells they lie in."""
    rows, columns = into.shape
    edges = np.arange(columns) * length // columns
    counts = np.add.reduceat(mask, edges, axis=1, dtype=np.int64)
    edges = np.append(np.arange(rows) * length // rows, length)
    which = np.searchsorted(edges, start + np.arange(len(mask)), side="right") - 1
    np.add.at(into, which, counts)


def _shares(counts: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Pairs used in each cell over the pairs in it."""
    sizes = [np.diff(np.append(np.arange(s) * length // s, length)) for s in counts.shape]
    return counts / np.outer(*sizes)
