"""What is worked out once and kept: by key, the least recently used dropped beyond a limit."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_Value = TypeVar("_Value", bound=Sized)


class Held(Generic[_Value]):
    """Values by key, of at most so many bytes together; the last one made is always kept."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._values: dict[Hashable, _Value] = {}
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """The value of a key, made now if it is not held."""
        value = self._values.pop(key, None)
        if value is None:
            value = make()
            self._bytes += value.nbytes
            while self._bytes > self._most and self._values:
                oldest = self._values.pop(next(iter(self._values)), None)
                self._bytes -= oldest.nbytes if oldest is not None else 0
        self._values[key] = value
        return value
