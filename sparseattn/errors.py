"""Typed errors. Every one derives from `SparseAttnError`; messages stay under 600 characters."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_MESSAGE_LIMIT = 599


def _shorten(message: str) -> str:
    if len(message) <= _MESSAGE_LIMIT:
        return message
    return message[: _MESSAGE_LIMIT - 4].rstrip() + " ..."


class SparseAttnError(Exception):
    """Base of all errors of sparseattn.

    Attributes:
        reasons: the complete list of reasons, however short the message had to be.
    """

    reasons: list[str]

    def __init__(self, message: str, reasons: Iterable[str] = ()) -> None:
        super().__init__(_shorten(message))
        self.reasons = list(reasons) or [message]


class InvalidInputError(SparseAttnError, ValueError):
    """An argument is malformed: wrong shape, dtype, device, value or combination."""


class UnsupportedCallError(SparseAttnError):
    """A well-formed call that this mechanism or implementation cannot serve; lists reasons."""

    @classmethod
    def of(cls, subject: str, reasons: Sequence[str], way_out: str = "") -> UnsupportedCallError:
        """An error that says `subject` cannot serve the call, with every reason."""
        text = f"{subject} does not support this call: " + "; ".join(reasons)
        tail = f". {way_out}" if way_out else ""
        keep = _MESSAGE_LIMIT - len(tail)
        if len(text) > keep:
            text = text[: keep - 4].rstrip() + " ..."
        return cls(text + tail, reasons)


class UnknownMechanismError(SparseAttnError):
    """No mechanism of that name is registered."""


class UnknownOptionError(SparseAttnError):
    """A mechanism has no option of that name, or the option's value has the wrong type."""


class PluginError(SparseAttnError):
    """A plugin broke the contract: what it registered would fail later."""


class SwapError(SparseAttnError):
    """A mechanism could not be swapped into a model."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest of the `known` words, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
