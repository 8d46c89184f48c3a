"""A model reads windows of a text, and how far its next words are from the original's."""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .measure import wait

# Elements of one float64 slab of log-probabilities, rows x vocabulary.
_SLAB = 4 * 2**20


@dataclass
class Totals:
    """Sums over scored positions, in float64."""

    nll: float = 0.0
    kl: float = 0.0
    same: int = 0
    tokens: int = 0

    def add(self, logits: Tensor, original: Tensor, targets: Tensor) -> None:
        """Take in logits `[S, V]` of this model and of the original, and the tokens `[S]`."""
        step = max(1, _SLAB // logits.shape[-1])
        for at in range(0, len(targets), step):
            piece = slice(at, at + step)
            mine, theirs = (x[piece].double().log_softmax(-1) for x in (logits, original))
            self.nll -= float(mine.gather(-1, targets[piece, None]).sum())
            # A token that the original rules out counts nothing, whatever its logarithm.
            parts = theirs.exp() * (theirs - mine)
            self.kl += float(parts.masked_fill(theirs == -math.inf, 0.0).sum())
            self.same += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        self.tokens += len(targets)


@dataclass
class Reading:
    """The windows of the text, and one forward of the model on each.

    Attributes:
        ids: int64 `[windows, context]`.
        start, end: the scored positions.
    """

    model: Any
    ids: Tensor
    start: int
    end: int
    runs: int
    _words: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        before = torch.arange(self.start - 1, self.end - 1, device=self.ids.device)
        takes = inspect.signature(self.model.forward).parameters
        # The logits of the other positions are not needed, and are most of a forward's memory.
        self._words = {"logits_to_keep": before} if "logits_to_keep" in takes else {}

    def forward(self, window: int) -> Tensor:
        """Logits `[S, V]` at the positions before the scored tokens."""
        with torch.inference_mode():
            found = self.model(
                input_ids=self.ids[window : window + 1], use_cache=False, **self._words
            )
            logits: Tensor = found.logits[0]
        return logits if self._words else logits[self.start - 1 : self.end - 1]

    def timed(self, window: int) -> tuple[Tensor, float]:
        wait(self.ids.device)
        begun = time.perf_counter()
        logits = self.forward(window)
        wait(self.ids.device)
        return logits, time.perf_counter() - begun
