"""Checks of options, in words."""

from __future__ import annotations

import sparseattn as sa

MOST = 2**31 - 1  # tokens in a run


def refuse(mechanism: sa.Mechanism, option: str, value: object, expected: str) -> None:
    """Raise InvalidInputError: which option, what came, what was expected."""
    raise sa.InvalidInputError(
        f"{mechanism.name}: option {option} got {value!r:.80}, expected {expected}"
    )


def check_count(mechanism: sa.Mechanism, option: str, least: int, most: int = MOST) -> None:
    """Refuse an option that is not an int from `least` to `most`."""
    value = getattr(mechanism, option)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        refuse(mechanism, option, value, f"an int from {least} to {most}")
