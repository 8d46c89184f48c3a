"""Which implementations `impl="auto"` tries first: what `sa.prefer` leaves behind."""

from __future__ import annotations

import threading

_lock = threading.Lock()
_active: list[Preference] = []
_preferred: tuple[str, ...] = ()


class Preference:
    """A preference in force, process-wide: until its `with` block ends, or `undo()`."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.__enter__()

    def __enter__(self) -> Preference:
        with _lock:
            if self not in _active:
                _active.append(self)
            _refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Prefer what was preferred before; does nothing the second time."""
        with _lock:
            if self in _active:
                _active.remove(self)
            _refresh()

    def __repr__(self) -> str:
        return f"prefer({', '.join(map(repr, self.names))})"


def _refresh() -> None:
    # Ready-made, because every call of attention reads it, and compiled ones trace that.
    global _preferred
    _preferred = _active[-1].names if _active else ()


def preferred() -> tuple[str, ...]:
    """The implementation names that `sa.prefer` put first."""
    return _preferred
