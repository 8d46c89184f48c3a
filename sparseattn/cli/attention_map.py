"""A mechanism's attention map on a recorded head, beside the exact one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base import Mechanism
from ..errors import InvalidInputError
from ..functional import attention_weights
from ..harness.inputs import head_names, source
from .output import printable
from .picture import shades, write_image

DEFAULT_LENGTH = 256
_ROWS, _COLUMNS = 18, 36  # two maps fit a terminal of 80 columns
_PIXELS = 1024
_GAP = 8  # pixels between the maps of an image

Map = NDArray[np.float64]


@dataclass(frozen=True)
class AttentionMaps:
    """Two maps of one head; a row holds the shares of a query's weight, by absolute value.

    Attributes:
        spec, layer, head, length, causal: what was drawn; layer and head of the recorded model.
        exact, own: `[N, N]`, of `full` and of the mechanism. Rows sum to 1, or to 0 where a query
            sees no key.
    """

    spec: str
    layer: int | None
    head: int
    length: int
    causal: bool
    exact: Map
    own: Map

    @property
    def shared(self) -> Map:
        """`[N]`: how much of each query's weight the two maps have in common, 0 to 1."""
        return np.minimum(self.exact, self.own).sum(axis=1)

    def _cells(self, rows: int, columns: int) -> tuple[Map, Map]:
        rows, columns = min(rows, self.length), min(columns, self.length)
        return _pool(self.exact, rows, columns), _pool(self.own, rows, columns)

    def record(self) -> dict[str, Any]:
        exact, own = self._cells(_ROWS, _COLUMNS)
        return {
            "layer": self.layer,
            "head": self.head,
            "length": self.length,
            "causal": self.causal,
            "shared_mean": float(self.shared.mean()),
            "shared_least": float(self.shared.min()),
            "cells": own.round(4).tolist(),
            "exact_cells": exact.round(4).tolist(),
        }

    def lines(self, encoding: str | None = "utf-8") -> list[str]:
        """Both maps in characters, side by side: queries downward, keys to the right."""
        marks = shades(encoding)
        cells = self._cells(_ROWS, _COLUMNS)
        top = len(marks) - 1
        peak = max(float(x.max()) for x in cells) or 1.0
        # The square root lifts what is spread thin over many keys beside a key that takes most.
        drawn = [np.rint(top * np.sqrt(x / peak)).astype(int) for x in cells]
        rows, columns = cells[0].shape
        edge = "  ".join(["+" + "-" * columns + "+"] * 2)
        body = [
            "  ".join("|" + "".join(marks[level] for level in row) + "|" for row in pair)
            for pair in zip(*drawn, strict=True)
        ]
        least, most = (peak * ((at - 0.5) / top) ** 2 for at in (1, top))
        causal = "causal" if self.causal else "not causal"
        layer = "" if self.layer is None else f"layer {self.layer} "
        return [
            f"Attention of {layer}head {self.head} of the recorded input, {self.length} queries "
            f"(down) by {self.length} keys (right), {causal}",
            f"Left: exact. Right: {printable(self.spec)}",
            *(edge, *body, edge),
            f"A character is {self.length / rows:.3g} queries by {self.length / columns:.3g} keys "
            f"and shows the share of a query's weight that lies there: {marks[0]!r} under "
            f"{least:.2%}, {marks[-1]!r} from {most:.2%}",
            f"In common: {self.shared.mean():.1%} of a query's weight on average, "
            f"{self.shared.min():.1%} at least",
        ]

    def save(self, path: Path) -> None:
        """Write an image: the exact map, and the mechanism's to its right; black is the most.

        Raises:
            SparseAttnError: pillow is not installed, or the file cannot be written.
        """
        cells = self._cells(_PIXELS, _PIXELS)
        peak = max(float(x.max()) for x in cells) or 1.0
        framed = [np.pad(x / peak, 1, constant_values=1.0) for x in cells]
        gap = np.zeros((len(framed[0]), _GAP))
        write_image(np.hstack([framed[0], gap, framed[1]]), path)


def draw(
    mech: Mechanism,
    length: int = DEFAULT_LENGTH,
    causal: bool = True,
    layer: int | None = None,
    head: int | None = None,
) -> AttentionMaps:
    """The maps of a recorded head, on its first `length` positions.

    Args:
        layer, head: the first recorded head that fits; None fits any.

    Raises:
        InvalidInputError: the length, or such a head, was not recorded.
        UnsupportedCallError: the mechanism refuses the call.
    """
    recorded = source("recorded")
    recorded.check_length(length)
    sample = recorded.make(length, 0, causal)
    names = head_names(sample.provenance, sample.q.shape[1])
    fits = [
        at for at, name in enumerate(names) if layer in (None, name[0]) and head in (None, name[1])
    ]
    if not fits:
        asked = [f"--{word} {x}" for word, x in (("layer", layer), ("head", head)) if x is not None]
        known = ", ".join(f"layer {at} head {number}" for at, number in names)
        raise InvalidInputError(f"{' '.join(asked)}: recorded are {known:.400}")
    at = fits[0]
    groups = sample.q.shape[1] // sample.k.shape[1]
    group = at // groups
    # A mechanism may choose once for all heads of a group, so the whole group is asked.
    q = sample.q[:, group * groups : (group + 1) * groups].double()
    k = sample.k[:, group : group + 1].double()

    def shares(mechanism: str | Mechanism) -> Map:
        weights = attention_weights(q, k, mechanism, causal=causal, scale=sample.scale)
        found = weights[0, at % groups].abs()
        return (found / found.sum(1, keepdim=True).where(found.any(1, keepdim=True), 1.0)).numpy()

    return AttentionMaps(repr(mech), *names[at], length, causal, shares("full"), shares(mech))


def _pool(weights: Map, rows: int, columns: int) -> Map:
    """In each cell, the share of a query's weight on its keys, averaged over its queries."""
    n = len(weights)
    edges = [np.arange(count) * n // count for count in (rows, columns)]
    sums = np.add.reduceat(np.add.reduceat(weights, edges[1], axis=1), edges[0], axis=0)
    return sums / np.diff(np.append(edges[0], n))[:, None]
