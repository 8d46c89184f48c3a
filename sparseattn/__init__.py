"""Every attention mechanism under one name, one contract and one honest measurement."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

# Names are loaded when first used (PEP 562), so that `import sparseattn` and the command line's
# --help do not wait for torch.
_HOMES = {
    "AttentionCall": "call",
    "BlockLayout": "layout",
    "FusedMap": "engines.linear.maps",
    "Grid": "layout",
    "Implementation": "implementation",
    "InvalidInputError": "errors",
    "KernelizedLinear": "base",
    "Layout": "layout",
    "MaskedSoftmax": "base",
    "Mechanism": "base",
    "MultiheadAttention": "modules",
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
    "make_cache": "integrations.decoding",
    "mechanism": "registry",
    "prefer": "registry",
    "register_mechanism": "registry",
    "swap": "integrations.swapping",
}

__all__ = [
    "AttentionCall",
    "BlockLayout",
    "FusedMap",
    "Grid",
    "Implementation",
    "InvalidInputError",
    "KernelizedLinear",
    "Layout",
    "MaskedSoftmax",
    "Mechanism",
    "MultiheadAttention",
    "PluginError",
    "SparseAttnError",
    "SwapError",
    "UnknownMechanismError",
    "UnknownOptionError",
    "UnsupportedCallError",
    "__version__",
    "attention",
    "attention_weights",
    "explain",
    "hookimpl",
    "list_mechanisms",
    "make_cache",
    "mechanism",
    "prefer",
    "register_mechanism",
    "swap",
]

if TYPE_CHECKING:
    from .base import KernelizedLinear, MaskedSoftmax, Mechanism
    from .call import AttentionCall
    from .engines.linear.maps import FusedMap
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
    from .implementation import Implementation
    from .integrations.decoding import make_cache
    from .integrations.swapping import swap
    from .layout import BlockLayout, Grid, Layout
    from .modules import MultiheadAttention
    from .registry import list_mechanisms, mechanism, prefer, register_mechanism

    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("sparseattn")
        except metadata.PackageNotFoundError:  # a checkout on the path, not installed
            return "0+unknown"
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{home}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    # A loaded export calls the operator by name, and touches nothing here. Where torch is not there
    # yet, the operator comes with the first name that is used.
    importlib.import_module(".engines.op", __name__)
