"""One call that mechanisms are compared on: its inputs, its checked rows, and what is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import functional
from ..base import Mechanism
from ..call import AttentionCall
from ..reference import evaluate
from .inputs import HeadName
from .measure import Inputs
from .metrics import Exact, MeanOfValues, checked_rows, relative_l2

_SPOT_ROWS = 8


class Setting:
    """One call that all entries are measured on.

    Args:
        inputs: q, k, v in the tested dtype, on the tested device.
        scale: as in `sparseattn.attention`.
        heads: of each query head its layer (None where unknown) and its number there.
        needle_rows: the first query that must find a planted key, or None.
        seed: of the sampled rows and of the gradients that are sent back.
    """

    def __init__(
        self,
        inputs: Inputs,
        causal: bool,
        scale: float | None,
        seed: int,
        backward: bool,
        heads: Sequence[HeadName],
        needle_rows: int | None = None,
    ) -> None:
        self.inputs = inputs
        self.causal, self.scale, self.seed = causal, scale, seed
        self.heads = heads
        self.needle_rows = needle_rows
        q, k, v = inputs
        self.call = AttentionCall.make(q, k, v, causal=causal, scale=scale)
        self.rows = checked_rows(self.call.n, seed)
        if self.rows is not None:
            self.rows = self.rows.to(q.device)
        shuffled = np.random.default_rng(seed + 1).permutation(self.call.n)[:_SPOT_ROWS]
        self.spot_rows = torch.from_numpy(np.sort(shuffled)).to(q.device)
        self.grad = self._gradient() if backward else None
        self._exact: Exact | None = None
        self._mean_error: float | None = None

    def _gradient(self) -> Tensor:
        """The gradient of the output: normal numbers, 0 in rows that are not checked."""
        q, _, v = self.inputs
        shape = (*q.shape[:3], v.shape[3])
        made = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + 2))
        made = made.to(q.device, q.dtype)
        if self.rows is None:
            return made
        return torch.zeros_like(made).index_copy(2, self.rows, made[:, :, self.rows])

    def part(self, x: Tensor) -> Tensor:
        """The checked rows of `[B, H, N, D]`."""
        return x if self.rows is None else x[:, :, self.rows]

    def part_of(self, call: AttentionCall) -> AttentionCall:
        """A call of the checked rows alone, at their own positions."""
        return call if self.rows is None else call.take_rows(self.rows)

    @property
    def exact(self) -> Exact:
        """Exact attention of the checked rows, made when first needed."""
        if self._exact is None:
            q, k, v = self.inputs
            self._exact = Exact(self.part(q), k, v, self.part_of(self.call))
        return self._exact

    @property
    def mean_error(self) -> float:
        """rel_l2 of the mean of the visible values."""
        if self._mean_error is None:
            exact = self.exact
            mean, _ = evaluate(MeanOfValues(), exact.q, exact.k, exact.v, exact.call)
            self._mean_error = relative_l2(mean, exact.out)
        return self._mean_error

    def run(self, mechanism: Mechanism, impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The public call, as a user would make it: what it costs is what a user pays."""

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return functional.attention(
                q, k, v, mechanism, causal=self.causal, scale=self.scale, impl=impl
            )

        return run
