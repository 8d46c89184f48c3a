"""Values in words that people read: seconds, bytes, a dash where there is none, safe text."""

from __future__ import annotations


def printable(text: object) -> str:
    """One line of text without control codes: a plugin's words may hold any."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in str(text)
    )


def number(value: float | None, spec: str = ".3g") -> str:
    """A number, or `-` where there is none."""
    return "-" if value is None else format(value, spec)


def seconds(value: float | None) -> str:
    """A time given in seconds."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def size(value: float | None) -> str:
    """Memory given in bytes."""
    if value is None:
        return "-"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"
