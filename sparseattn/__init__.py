"""Every attention mechanism under one name, one contract and one honest measurement."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Names are loaded when first used (PEP 562), so that `import sparseattn` and the command line's
# --help do not wait for torch.
_HOMES = {
    "AttentionCall": "call",
    "BlockLayout": "layout",
    "Grid": "layout",
    "Implementation": "base",
    "InvalidInputError": "errors",
    "KernelizedLinear": "base",
    "Layout": "layout",
    "MaskedSoftmax": "base",
    "Mechanism": "base",
    "PluginError": "errors",
    "SparseAttnError": "errors",
    "SwapError": "errors",
    "UnknownMechanismError": "errors",
    "UnknownOptionError": "errors",
    "UnsupportedCallError": "errors",
    "attention": "functional",
    "attention_weights": "functional",
    "explain": "functional",
    "hookimpl": "hookspecs",
    "list_mechanisms": "registry",
    "mechanism": "registry",
    "prefer": "registry",
    "register_mechanism": "registry",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604

if TYPE_CHECKING:
    from .base import Implementation, KernelizedLinear, MaskedSoftmax, Mechanism
    from .call import AttentionCall
    from .errors import (
        InvalidInputError,
        PluginError,
        SparseAttnError,
        SwapError,
        UnknownMechanismError,
        UnknownOptionError,
        UnsupportedCallError,
    )
    from .functional import attention, attention_weights, explain
    from .hookspecs import hookimpl
    from .layout import BlockLayout, Grid, Layout
    from .registry import list_mechanisms, mechanism, prefer, register_mechanism

    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("sparseattn")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{home}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
