"""Logarithmic axes whose pixels are known: the domain, the ticks, and where a value lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Ticks of times and errors, and of bytes; fewer of each decade where there are many decades.
_STEPS = ((1, 2, 5), (1, 3), (1,))


@dataclass(frozen=True)
class LogAxis:
    """From `low` to `high` over `pixels`, to the right or, with `up`, upwards."""

    low: float
    high: float
    pixels: float
    up: bool = False

    @classmethod
    def over(
        cls, values: Sequence[float], pixels: float, up: bool = False, margin: float = 0.06
    ) -> LogAxis:
        """The axis that holds all the values, which are positive, and a margin at each end."""
        # The least of floats are below what their own margin can be taken of.
        low, high = (math.log10(max(f(values), 1e-200)) for f in (min, max))
        # A single value gets half a decade to each side.
        extra = max((high - low) * margin, (1.0 - (high - low)) / 2 if high - low < 0.3 else 0.0)
        return cls(10 ** (low - extra), 10 ** (high + extra), pixels, up)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high = math.log(self.low), math.log(self.high)
        share = (math.log(value) - low) / (high - low)
        return self.pixels * (1 - share if self.up else share)

    def back(self, pixel: float) -> float:
        """The value at a pixel."""
        share = pixel / self.pixels
        return self.low * (self.high / self.low) ** (1 - share if self.up else share)

    def ticks(self) -> list[float]:
        """Round values within, as many as have room."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        room = max(2, int(self.pixels / 45))
        found: list[float] = []
        for steps in _STEPS:
            found = [
                step * 10.0**power
                for power in range(first, last + 1)
                for step in steps
                if self.low <= step * 10.0**power <= self.high
            ]
            if len(found) <= room:
                return found
        return found[:: math.ceil(len(found) / room)]

    def byte_ticks(self) -> list[float]:
        """Powers of two within, as many as have room."""
        first, last = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
        found = [2.0**power for power in range(first, last + 1)]
        return found[:: max(1, math.ceil(len(found) / max(2, int(self.pixels / 45))))]
