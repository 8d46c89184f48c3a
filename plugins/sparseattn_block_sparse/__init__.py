"""Patterns of key blocks: drawn at random or given by the user, or selected from q and k."""

from __future__ import annotations

import sparseattn as sa

from .dynamic import OracleTopK, TopKBlocks, VerticalSlash
from .static import BigBird, BlockSparse

__all__ = ["BigBird", "BlockSparse", "OracleTopK", "Plugin", "TopKBlocks", "VerticalSlash"]


class Plugin:
    """The entry point's object."""

    sparseattn_api = 1

    @sa.hookimpl
    def register_mechanisms(self, register):  # type: ignore[no-untyped-def]
        for mechanism in (BigBird, BlockSparse, TopKBlocks, VerticalSlash, OracleTopK):
            register(mechanism)
