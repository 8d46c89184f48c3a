"""The checks of raw arguments: each names the argument, what came and what was expected.

They read values only where these are on the host already, so that a traced call stays traced.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from .errors import InvalidInputError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_OFFSET = 2**40  # of a query from the first key, so that products of positions fit int64
_INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def is_readable(tensor: Tensor) -> bool:
    """Whether values can be read on the host now: not while tracing, nor under vmap."""
    return not (
        torch.compiler.is_compiling()
        or tensor.device.type == "meta"
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or isinstance(tensor, torch._subclasses.FakeTensor)
    )


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    return f"{value!r:.80} ({type(value).__name__})"


def check_number(name: str, value: object) -> None:
    # torch.SymFloat and SymInt stand for numbers while compiling.
    symbolic = isinstance(value, (torch.SymFloat, torch.SymInt))
    if symbolic:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidInputError(f"{name} must be a number, got {describe(value)}")
    if not math.isfinite(value):
        raise InvalidInputError(f"{name} must be finite, got {value}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise InvalidInputError(
                f"{name} must be a torch.Tensor [batch, heads, length, width], got "
                f"{describe(tensor)}"
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            raise InvalidInputError(
                f"{name} must be a dense strided tensor, got layout {tensor.layout}; convert it "
                "with .to_dense() or pad it and give key_mask"
            )
        if tensor.ndim != 4:
            raise InvalidInputError(
                f"{name} must have 4 dimensions [batch, heads, length, width], got "
                f"{tensor.ndim} with shape {list(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise InvalidInputError(
                f"{name} has dtype {tensor.dtype}; expected float64, float32, bfloat16 or float16"
            )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise InvalidInputError(
                f"{name} has dtype {tensor.dtype} but q has {q.dtype}; q, k and v must share one "
                f"dtype: cast them with .to()"
            )
        if tensor.device != q.device:
            raise InvalidInputError(
                f"{name} is on {tensor.device} but q is on {q.device}; move them to one device"
            )
        if tensor.shape[0] != q.shape[0]:
            raise InvalidInputError(
                f"{name} has batch {tensor.shape[0]} but q has {q.shape[0]}: shapes "
                f"q {list(q.shape)}, {name} {list(tensor.shape)}"
            )
    if k.shape[1] != v.shape[1]:
        raise InvalidInputError(f"v has {v.shape[1]} heads but k has {k.shape[1]}")
    if k.shape[2] != v.shape[2]:
        raise InvalidInputError(
            f"v has length {v.shape[2]} but k has {k.shape[2]}; each key needs one value"
        )
    if q.shape[3] != k.shape[3]:
        raise InvalidInputError(
            f"k has width {k.shape[3]} but q has {q.shape[3]}; q . k needs one width"
        )
    if q.shape[3] == 0:
        raise InvalidInputError("q has width D = 0; expected at least 1: no logit is defined")
    q_heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0:
        if q_heads != 0:
            raise InvalidInputError(f"k has 0 heads but q has {q_heads}")
    elif q_heads % kv_heads != 0:
        raise InvalidInputError(
            f"q has {q_heads} heads, which is not a multiple of the {kv_heads} heads of k and v; "
            "grouped heads need Hq = groups * Hkv"
        )


def check_key_mask(mask: object, batch: int, m: int, device: torch.device) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise InvalidInputError(
            f"key_mask must be a bool tensor [B, M], True where a key may be seen, got "
            f"{describe(mask)}; for 0/1 masks use mask.bool(), for additive ones mask == 0"
        )
    if tuple(mask.shape) != (batch, m):
        raise InvalidInputError(
            f"key_mask must have shape [B, M] = [{batch}, {m}], got {list(mask.shape)}; masks are "
            "not broadcast: use .expand()"
        )
    if mask.device != device:
        raise InvalidInputError(f"key_mask is on {mask.device} but q is on {device}")


def check_segments(
    name: str, ids: object, axes: str, shape: tuple[int, int], device: torch.device
) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in _INT_DTYPES:
        raise InvalidInputError(f"{name} must be an int tensor {axes}, got {describe(ids)}")
    if tuple(ids.shape) != shape:
        raise InvalidInputError(
            f"{name} must have shape {axes} = {list(shape)}, got {list(ids.shape)}; segments are "
            "not broadcast: use .expand()"
        )
    if ids.device != device:
        raise InvalidInputError(f"{name} is on {ids.device} but q is on {device}")
    if is_readable(ids):
        check_contiguous_runs(name, ids)


def check_contiguous_runs(name: str, ids: Tensor) -> None:
    """Refuse segment ids that come back after another id: a document is one run.

    Raises:
        InvalidInputError: an id is used by two runs of one row.
    """
    if ids.shape[1] < 2:
        return
    # Only where a run begins can an id come back; there are few such places.
    begins = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    row, at = begins.nonzero(as_tuple=True)
    runs = torch.stack([row, ids[row, at].to(torch.int64)])
    found, count = torch.unique(runs, dim=1, return_counts=True)
    if found.shape[1] < runs.shape[1]:
        bad = int(found[0, count > 1].min())
        raise InvalidInputError(
            f"{name} must hold each document in one contiguous run with an id of its own; row "
            f"{bad} uses an id twice: give the later run another id"
        )


def check_q_offset(offset: object, batch: int, device: torch.device) -> int | Tensor:
    if isinstance(offset, torch.SymInt):
        return offset  # type: ignore[return-value]
    if isinstance(offset, Tensor):
        if offset.dtype not in (torch.int64, torch.int32) or tuple(offset.shape) != (batch,):
            raise InvalidInputError(
                f"q_offset must be an int or an int tensor [B] = [{batch}], got {describe(offset)}"
            )
        if offset.device != device:
            raise InvalidInputError(f"q_offset is on {offset.device} but q is on {device}")
        if batch and offset.device.type == "cpu" and is_readable(offset):
            _check_far(offset.min().item(), offset.max().item())
        return offset
    if isinstance(offset, bool) or not isinstance(offset, numbers.Integral):
        raise InvalidInputError(
            f"q_offset must be an int or an int tensor [B], got {describe(offset)}"
        )
    _check_far(int(offset))
    return int(offset)


def _check_far(*offsets: float) -> None:
    for offset in offsets:
        if abs(offset) > MAX_OFFSET:
            raise InvalidInputError(
                f"q_offset must lie within 2**40 positions of the first key, got {offset}"
            )


def check_float_tensor(name: str, value: object, device: torch.device) -> None:
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        raise InvalidInputError(f"{name} must be a floating-point tensor, got {describe(value)}")
    if value.device != device:
        raise InvalidInputError(f"{name} is on {value.device} but q is on {device}")


def check_bias(
    bias: Tensor, batch: int, q_heads: int, n: int, m: int, device: torch.device
) -> None:
    check_float_tensor("bias", bias, device)
    shape = tuple(bias.shape)
    fits = (
        len(shape) == 4
        and shape[0] in (1, batch)
        and shape[1] in (1, q_heads)
        and shape[2] in (1, n)
        and shape[3] == m
    )
    if not fits:
        raise InvalidInputError(
            f"bias must have shape [B or 1, Hq or 1, N or 1, M] with B={batch}, Hq={q_heads}, "
            f"N={n}, M={m}, got {list(shape)}"
        )
