"""A pattern's clauses as arithmetic that FlexAttention can trace."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sparseattn as sa

_MOST_TABLE = 2**28  # bytes of a table of blocks: a million tokens in blocks of 64


@dataclass(frozen=True)
class Listed:
    """A list of blocks, of which tracing needs the block's size alone: its table is an input."""

    block: int


class Table(NamedTuple):
    """A list of blocks, a byte for each pair of blocks.

    Attributes:
        listed: bool `[rows * columns]`.
        shape: int32 `[2]`, rows and columns: a tensor, since FlexAttention's CPU template computes
            wrongly with sizes that are symbols.
    """

    listed: Tensor
    shape: Tensor


def table_of(clause: sa.BlockLayout, device: torch.device) -> Table:
    """A list of blocks as a table."""
    columns = int(clause.indices.max()) + 1 if len(clause.indices) else 1
    table = torch.zeros(max(clause.rows, 1), columns, dtype=torch.bool)
    rows = torch.repeat_interleave(torch.arange(clause.rows), torch.tensor(clause.indptr).diff())
    table[rows, torch.tensor(clause.indices, dtype=torch.int64)] = True
    shape = torch.tensor(table.shape, dtype=torch.int32, device=device)
    return Table(table.flatten().to(device), shape)


def lists_of(layout: sa.Layout) -> list[sa.BlockLayout]:
    """The lists of blocks among a layout's clauses, in their order."""
    clauses = (clause for term in layout.terms for clause in term)
    return [clause for clause in clauses if isinstance(clause, sa.BlockLayout)]


def terms_of(layout: sa.Layout) -> tuple[tuple[Any, ...], ...]:
    """A layout's union of terms, causality included, without the contents of its lists."""
    return tuple(
        tuple(Listed(c.block) if isinstance(c, sa.BlockLayout) else c for c in term)
        for term in layout.terms
    )


def reasons_against(layout: sa.Layout) -> list[str]:
    """Why a layout cannot become a `mask_mod`; empty when it can."""
    if any(hasattr(clause, "visible") for term in layout.terms for clause in term):
        return ["its pattern is a function, which is not traced: give it a layout(grid) of clauses"]
    for listed in lists_of(layout):
        columns = int(listed.indices.max(initial=-1)) + 1
        if listed.rows * columns > _MOST_TABLE:
            return [
                f"its list is of {listed.rows} x {columns} blocks of {listed.block}, and its table "
                f"may have {_MOST_TABLE} entries: take larger blocks"
            ]
    return []


def depends_on_distance_only(layout: sa.Layout) -> bool:
    """Whether moving all positions alike changes nothing, as far as the clauses show."""
    kinds = {type(clause).__name__ for term in layout.terms for clause in term}
    return kinds <= {"Band", "Step"}


def visible(terms: Any, tables: tuple[Table, ...], i: Tensor, j: Tensor) -> Tensor:
    """Whether query position i sees key position j; traced.

    Args:
        terms: from `terms_of`. tables: of each `Listed` among them, in order.
    """
    left = iter(tables)
    union = []
    for term in terms:
        holds = []
        for clause in term:
            if isinstance(clause, Listed):
                holds.append(_listed(clause.block, next(left), i, j))
            elif type(clause).__name__ == "Band":
                holds += _band(clause, i, j)
            else:
                holds.append(clause.holds(i, j))
        if not holds:
            return i == i
        union.append(functools.reduce(operator.and_, holds))
    return functools.reduce(operator.or_, union) if union else i != i


def _band(band: Any, i: Tensor, j: Tensor) -> list[Tensor]:
    # Its own `holds` works in place, which FlexAttention does not trace.
    ends = []
    if band.left is not None:
        ends.append(j - i >= -band.left)
    if band.right is not None:
        ends.append(j - i <= band.right)
    return ends


def _listed(block: int, table: Table, i: Tensor, j: Tensor) -> Tensor:
    row, column = i // block, j // block
    rows, columns = table.shape[0], table.shape[1]
    real = (row >= 0) & (row < rows) & (column < columns)
    return real & table.listed[torch.where(real, row * columns + column, 0)]
