"""A plugin that uses all four hooks of sparseattn."""

from __future__ import annotations

from typing import Any

import sparseattn as sa

from .by_chunk import ByChunk
from .measures import cosine, delayed
from .mechanisms import LogSparse, MirroredSoftmax

__all__ = ["ByChunk", "LogSparse", "MirroredSoftmax", "Plugin", "cosine", "delayed"]


class Plugin:
    """What the entry point names."""

    sparseattn_api = 1

    @sa.hookimpl
    def register_mechanisms(self, register: Any) -> None:
        register(LogSparse)
        register(MirroredSoftmax)

    @sa.hookimpl
    def register_implementations(self, register: Any) -> None:
        register("chunked", ByChunk())

    @sa.hookimpl
    def register_inputs(self, register: Any) -> None:
        register("delayed", delayed)

    @sa.hookimpl
    def register_metrics(self, register: Any) -> None:
        register("cosine", cosine)
