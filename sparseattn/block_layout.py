"""`BlockLayout`: a block pattern that the user made, listed block by block."""

from __future__ import annotations

import hashlib
import os
import zipfile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .clauses import (
    CellClause,
    Ints,
    Rect,
    as_int,
    ragged,
    refuse,
)

MAX_TOKENS = 2**31 - 1  # block columns are int32, and blocks may be one key wide


class BlockLayout(CellClause):
    """A block pattern that the user made: query block I sees the listed key blocks.

    Frozen; hashable and comparable by content. It is in absolute positions and tied to no length:
    queries past the last row, or before position 0, see nothing; blocks past the last key are cut.

    Args:
        indptr: int `[rows + 1]`, from 0 up to `len(indices)`, nowhere falling.
        indices: int `[nnz]`, all >= 0: row I sees blocks `indices[indptr[I]:indptr[I + 1]]`, in any
            order; repeats count once.
        block: positions in a block, on both axes, >= 1.

    Raises:
        InvalidInputError: arrays that are not such a list.
    """

    block: int
    indptr: Ints  # int64 [rows + 1], read-only
    indices: NDArray[np.int32]  # int32 [nnz], read-only, sorted and unique in a row
    _keys: torch.Tensor  # int64 [nnz]: row * width + column, ascending

    def __init__(self, indptr: Any, indices: Any, block: int) -> None:
        way_out = "pass CSR: row I sees blocks indices[indptr[I]:indptr[I + 1]]"
        block = as_int("block", block, 1, "give the number of positions in a block")
        if block > MAX_TOKENS:  # products of block numbers and sizes stay within int64
            refuse("block", block, f"at most {MAX_TOKENS}", way_out)
        starts, cols = int_array("indptr", indptr), int_array("indices", indices)
        if len(starts) == 0 or starts[0] != 0 or starts[-1] != len(cols):
            ends = (int(starts[0]), int(starts[-1])) if len(starts) else ()
            refuse("indptr", ends, f"to go from 0 to len(indices) = {len(cols)}", way_out)
        if (starts[1:] < starts[:-1]).any():
            at = int(np.flatnonzero(starts[1:] < starts[:-1])[0])
            refuse("indptr", starts[at : at + 2].tolist(), f"no fall, as at row {at}", way_out)
        if len(cols) and (cols.min() < 0 or cols.max() > MAX_TOKENS):
            wrong = cols[(cols < 0) | (cols > MAX_TOKENS)]
            refuse("indices", int(wrong[0]), "block numbers from 0 to 2**31 - 1", way_out)
        rows, width = len(starts) - 1, int(cols.max(initial=-1)) + 1
        keys = np.repeat(np.arange(rows), np.diff(starts)) * width + cols
        if not (keys[1:] > keys[:-1]).all():
            # Stable, for rows that are sorted or nearly so; np.unique hashes, ten times slower.
            keys = np.sort(keys, kind="stable")
            keys = keys[np.append(True, keys[1:] != keys[:-1])]
            starts = np.searchsorted(keys, np.arange(rows + 1) * width)
        columns = (keys % max(width, 1)).astype(np.int32)
        sha = hashlib.sha256(np.array([block, rows], dtype="<i8").tobytes())
        sha.update(starts.astype("<i8").tobytes())
        sha.update(columns.astype("<i4").tobytes())
        for name, value in {
            "block": block,
            "indptr": starts,
            "indices": columns,
            "_keys": torch.from_numpy(keys),
            "_width": width,
            "_sha": sha.hexdigest(),
        }.items():
            object.__setattr__(self, name, value)
        for array in (starts, columns):
            array.setflags(write=False)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"BlockLayout is frozen: make another one instead of setting {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"BlockLayout is frozen: {name} cannot be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockLayout, (self.indptr, self.indices, self.block)

    @classmethod
    def from_mask(cls, mask: Any, block: int) -> BlockLayout:
        """The layout of a bool `[I, J]` mask of blocks: True where query block I sees key block J.

        Raises:
            InvalidInputError: not two-dimensional, or not bool.
        """
        array = np.asarray(mask.detach().cpu() if isinstance(mask, torch.Tensor) else mask)
        if array.ndim != 2 or array.dtype != np.bool_:
            came = f"{array.dtype} {list(array.shape)}"
            refuse("mask", came, "bool [I, J]", "compare first, as in `scores > 0`")
        rows, cols = np.nonzero(array)
        counts = np.bincount(rows, minlength=len(array))
        return cls(np.concatenate(([0], np.cumsum(counts))).astype(np.int64), cols, block)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layout to exactly `path`, as npz with `indptr`, `indices` and `block`."""
        with open(path, "wb") as file:
            np.savez(file, indptr=self.indptr, indices=self.indices, block=np.int64(self.block))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BlockLayout:
        """Read what `save` wrote. Nothing in the file is executed.

        Raises:
            InvalidInputError: the file is no such npz, or its arrays are not a block list.
            OSError: the file cannot be read.
        """
        expected, way_out = (
            "an npz with indptr, indices and block",
            "write it with BlockLayout.save",
        )
        try:
            with np.load(path, allow_pickle=False) as file:
                indptr, indices, block = file["indptr"], file["indices"], file["block"]
        except (KeyError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile):
            refuse("path", os.fspath(path), expected, way_out)
        if block.shape != () or block.dtype.kind not in "iu":
            refuse("path", os.fspath(path), expected, way_out)
        return cls(indptr, indices, int(block))

    @property
    def rows(self) -> int:
        """The number of query blocks in the list."""
        return len(self.indptr) - 1

    @property
    def digest(self) -> str:
        """Twelve hex digits of the sha256 of the content."""
        return self._sha[:12]

    _sha: str
    _width: int

    def contains(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Whether pairs of positions are visible: integer tensors in, their broadcast bool out."""
        i, j = position_tensors(i, j)
        return self.holds(i, j)

    def holds(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        row, col = i // self.block, j // self.block
        # Rows outside the list need no test: their keys lie below or above all that are listed.
        real = (col >= 0) & (col < self._width)
        if len(self.indices) == 0:
            return torch.zeros_like(real & (row == 0))
        keys, wanted = self._keys.to(i.device), row * self._width + col
        found = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        return real & (keys[found] == wanted)

    def _blocks(self, rect: Rect) -> Rect:
        """Rectangles in blocks, cut to the list."""
        q0, q1, k0, k1 = (x // self.block for x in rect)
        q0, q1 = np.maximum(q0, 0), np.minimum(q1, self.rows - 1)
        return q0, q1, np.maximum(k0, 0), np.minimum(k1, self._width - 1)

    def _listed(self, rect: Rect) -> Ints:
        """The number of listed cells that meet each rectangle."""
        q0, q1, k0, k1 = self._blocks(rect)
        at, row = ragged(q0, np.where(k0 <= k1, q1 - q0 + 1, 0))
        keys = self._keys.numpy()
        first = np.searchsorted(keys, row * self._width + k0[at])
        last = np.searchsorted(keys, row * self._width + k1[at], side="right")
        # Exact in the float64 of bincount's weights: counts stay far below 2**53.
        return np.bincount(at, weights=last - first, minlength=len(q0)).astype(np.int64)

    def clip(self, rect: Rect) -> Rect:
        q0, q1, k0, k1 = rect
        return q0, np.where(self._listed(rect) > 0, q1, np.minimum(q1, q0 - 1)), k0, k1

    def covers(self, rect: Rect) -> NDArray[np.bool_]:
        q0, q1, k0, k1 = (x // self.block for x in rect)
        full: NDArray[np.bool_] = self._listed(rect) == (q1 - q0 + 1) * (k1 - k0 + 1)
        return full

    def cell_count(self, q0: Ints, q1: Ints) -> Ints:
        first, last, _, _ = self._blocks((q0, q1, q0, q1))
        return np.where(
            first <= last,
            self.indptr[np.maximum(last, -1) + 1] - self.indptr[np.minimum(first, self.rows)],
            0,
        )

    def cells(self, q0: Ints, q1: Ints) -> tuple[Ints, Rect]:
        first, last, _, _ = self._blocks((q0, q1, q0, q1))
        at, row = ragged(first, last - first + 1)
        owner, entry = ragged(self.indptr[row], self.indptr[row + 1] - self.indptr[row])
        at, row, col = at[owner], row[owner], self.indices[entry].astype(np.int64)
        start = row * self.block
        top, bottom = np.maximum(q0[at], start), np.minimum(q1[at], start + self.block - 1)
        return at, (top, bottom, col * self.block, col * self.block + self.block - 1)

    @property
    def cell_width(self) -> int:
        return self.block

    def __eq__(self, other: object) -> bool:
        return self._sha == other._sha if isinstance(other, BlockLayout) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._sha)

    def __repr__(self) -> str:
        return f"BlockLayout({self.digest}, block={self.block})"


def position_tensors(i: torch.Tensor, j: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    for name, x in (("i", i), ("j", j)):
        if not isinstance(x, torch.Tensor) or x.dtype.is_floating_point or x.dtype == torch.bool:
            came = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            refuse(name, came, "an integer tensor of positions", "use torch.arange")
    return i.to(torch.int64), j.to(torch.int64)


def int_array(name: str, value: Any) -> Ints:
    """A copy of a list, numpy array or tensor of ints, int64 and one-dimensional."""
    array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        came = f"{array.dtype} {list(array.shape)}"
        refuse(
            name, came, "a one-dimensional list of integers", "flatten it, or convert it to int64"
        )
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        refuse(name, int(array.max()), "numbers below 2**63", "check how the list was made")
    return np.array(array, dtype=np.int64)
