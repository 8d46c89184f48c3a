"""Which dtype to compute in: what accumulates, what has twice the digits, what is widest."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that accumulates: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def doubled(dtype: torch.dtype) -> torch.dtype:
    """A dtype of at least twice the digits: float32 for halves, else float64."""
    return wide(dtype) if dtype in (torch.float16, torch.bfloat16) else torch.float64


def widest(device: torch.device) -> torch.dtype:
    """The widest dtype that a device computes in."""
    return torch.float32 if device.type == "mps" else torch.float64


def all_finite(*tensors: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite: one pass each, in the dtype that accumulates."""
    return all(bool(torch.isfinite(x.sum(dtype=wide(x.dtype)))) for x in tensors)
