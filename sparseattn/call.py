"""One validated attention request, and the positions that all mechanisms share.

`AttentionCall.make` turns raw arguments into a request or raises `InvalidInputError` before any
work is done. A call also knows two views of its own masks:

- `placement()` and `allowed()`: the definition, on broadcast tensors, for oracles and pictures;
- `runs()` (see `runs.py`): the same call cut into independent rectangles without padding or
  packing, for the engines.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import (
    check_bias,
    check_float_tensor,
    check_key_mask,
    check_number,
    check_q_offset,
    check_qkv,
    check_segments,
    describe,
)
from .errors import InvalidInputError


class Placement(NamedTuple):
    """Absolute positions: counted from the first allowed key of each run.

    Attributes:
        q: int64 `[B or 1, N]`, the position of each query.
        k: int64 `[B or 1, M]`, the position of each key in its own run.
        extent: int64 `[B or 1, N]`, how many key positions the query's run spans.
    """

    q: Tensor
    k: Tensor
    extent: Tensor


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention request. Build it with `AttentionCall.make`.

    Attributes:
        batch, q_heads, kv_heads, n, m, head_dim, value_dim: sizes of q `[B, Hq, N, D]`,
            k `[B, Hkv, M, D]` and v `[B, Hkv, M, Dv]`.
        causal: keys after a query's position are invisible.
        scale: the number that multiplies `q . k`; `scale_given` says whether the caller chose it.
        q_offset: position of query 0 in key coordinates: an int, an int tensor `[B]`, or None for
            the bottom-right default `M - N`.
        key_mask: bool `[B, M]`, True where a key may be seen, or None.
        q_segments, kv_segments: int `[B, N]` and `[B, M]`; attend only where equal. Both or none.
        softcap, sink_logits `[Hq]`, bias `[B or 1, Hq or 1, N or 1, M]`: or None.
        dtype, device: of q, k and v.
        needs_grad, needs_lse, cached: what the caller will want of the result.
        selection: int32 `[B, Hq, N, S]`: a dynamic mechanism's choice, made once and shared by the
            definition and every implementation; None until it is made.
    """

    batch: int
    q_heads: int
    kv_heads: int
    n: int
    m: int
    head_dim: int
    value_dim: int
    causal: bool
    scale: float
    dtype: torch.dtype
    device: torch.device
    scale_given: bool = False
    q_offset: int | Tensor | None = None
    key_mask: Tensor | None = None
    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    bias: Tensor | None = None
    needs_grad: bool = False
    needs_lse: bool = False
    cached: bool = False
    selection: Tensor | None = None
    # Set by `take_rows`: the positions of a subset of the queries, fixed before they were cut out.
    fixed_placement: Placement | None = None

    @staticmethod
    def make(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
        key_mask: Tensor | None = None,
        q_segments: Tensor | None = None,
        kv_segments: Tensor | None = None,
        q_offset: int | Tensor | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        bias: Tensor | None = None,
        needs_lse: bool = False,
        cached: bool = False,
    ) -> AttentionCall:
        """Validate raw arguments (the shapes are in the class docstring) into a call.

        Raises:
            InvalidInputError: it names the argument, what came and what was expected.
        """
        check_qkv(q, k, v)
        batch, q_heads, n, head_dim = q.shape
        kv_heads, m, value_dim = k.shape[1], k.shape[2], v.shape[3]
        if not isinstance(causal, bool):
            raise InvalidInputError(f"causal must be True or False, got {describe(causal)}")
        if not isinstance(needs_lse, bool):
            raise InvalidInputError(f"return_lse must be True or False, got {describe(needs_lse)}")
        if scale is not None:
            check_number("scale", scale)
            scale = float(scale)
        if softcap is not None:
            check_number("softcap", softcap)
            if softcap <= 0:
                raise InvalidInputError(
                    f"softcap must be greater than 0, got {softcap}; leave it out for no cap"
                )
            softcap = float(softcap)
        if key_mask is not None:
            check_key_mask(key_mask, batch, m, q.device)
        if q_segments is not None or kv_segments is not None:
            if q_offset is not None:
                raise InvalidInputError(
                    "q_offset cannot be combined with segments: each packed document places its "
                    "own queries bottom-right; leave q_offset out"
                )
            if q_segments is None or kv_segments is None:
                given = "kv_segments" if q_segments is None else "q_segments"
                if n != m:
                    raise InvalidInputError(
                        f"{given} alone serves queries and keys only when N == M, got N={n}, "
                        f"M={m}; give both q_segments [B, N] and kv_segments [B, M]"
                    )
            if q_segments is not None:
                check_segments("q_segments", q_segments, "[B, N]", (batch, n), q.device)
            if kv_segments is not None:
                check_segments("kv_segments", kv_segments, "[B, M]", (batch, m), q.device)
            q_segments = kv_segments if q_segments is None else q_segments
            kv_segments = q_segments if kv_segments is None else kv_segments
        if q_offset is not None:
            q_offset = check_q_offset(q_offset, batch, q.device)
        if sink_logits is not None:
            check_float_tensor("sink_logits", sink_logits, q.device)
            if tuple(sink_logits.shape) != (q_heads,):
                raise InvalidInputError(
                    f"sink_logits must have shape [Hq] = [{q_heads}], got {list(sink_logits.shape)}"
                )
        if bias is not None:
            check_bias(bias, batch, q_heads, n, m, q.device)
        needs_grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (q, k, v, sink_logits, bias)
        )
        return AttentionCall(
            batch=batch,
            q_heads=q_heads,
            kv_heads=kv_heads,
            n=n,
            m=m,
            head_dim=head_dim,
            value_dim=value_dim,
            causal=causal,
            scale=head_dim**-0.5 if scale is None else scale,
            scale_given=scale is not None,
            dtype=q.dtype,
            device=q.device,
            q_offset=q_offset,
            key_mask=key_mask,
            q_segments=q_segments,
            kv_segments=kv_segments,
            softcap=softcap,
            sink_logits=sink_logits,
            bias=bias,
            needs_grad=needs_grad,
            needs_lse=needs_lse,
            cached=cached,
        )

    @property
    def groups(self) -> int:
        """Query heads a key-value head."""
        return self.q_heads // self.kv_heads if self.kv_heads else 1

    @property
    def offset(self) -> int | Tensor:
        """Position of query 0 in key coordinates: `q_offset`, or `M - N`."""
        return self.m - self.n if self.q_offset is None else self.q_offset

    def replace(self, **changes: Any) -> AttentionCall:
        """A copy with some fields changed; nothing is validated again."""
        return dataclasses.replace(self, **changes)

    def to_dtype(self, dtype: torch.dtype) -> AttentionCall:
        """The same request for inputs of another dtype (`bias` and `sink_logits` follow)."""
        if dtype == self.dtype:
            return self
        return self.replace(
            dtype=dtype,
            bias=None if self.bias is None else self.bias.to(dtype),
            sink_logits=None if self.sink_logits is None else self.sink_logits.to(dtype),
        )

    def take_rows(self, index: Tensor | slice) -> AttentionCall:
        """The same request for some of the queries; positions stay what they were.

        Args:
            index: int64 `[R]`, or a slice, into the N queries.
        """
        place = self.placement()
        place = Placement(place.q[:, index], place.k, place.extent[:, index])
        bias = self.bias
        if bias is not None and bias.shape[2] != 1:
            bias = bias[:, :, index]
        return self.replace(
            n=place.q.shape[1],
            fixed_placement=place,
            bias=bias,
            q_segments=None if self.q_segments is None else self.q_segments[:, index],
            selection=None if self.selection is None else self.selection[:, :, index],
        )

    def placement(self) -> Placement:
        """Positions of queries and keys, as tensors; no host read."""
        if self.fixed_placement is not None:
            return self.fixed_placement
        q_index = torch.arange(self.n, device=self.device)[None]
        k_index = torch.arange(self.m, device=self.device)[None]
        if self.q_segments is not None:
            return self._packed_placement(q_index, k_index)
        offset = self.offset
        offset = offset.to(torch.int64)[:, None] if isinstance(offset, Tensor) else offset
        if self.key_mask is None or self.m == 0:
            extent = torch.full_like(q_index, self.m)
            return Placement(q_index + offset, k_index, extent)
        first, last = _span(self.key_mask)
        extent = (last - first + 1)[:, None].expand(-1, self.n)
        return Placement(q_index + offset - first[:, None], k_index - first[:, None], extent)

    def _packed_placement(self, q_index: Tensor, k_index: Tensor) -> Placement:
        assert self.q_segments is not None and self.kv_segments is not None
        if self.m == 0 or self.n == 0:
            shape = (self.batch, self.n)
            zeros = torch.zeros(shape, dtype=torch.int64, device=self.device)
            return Placement(zeros, k_index, zeros)
        q_ids = self.q_segments.to(torch.int64).contiguous()
        k_ids = self.kv_segments.to(torch.int64).contiguous()
        own_start, _ = _run_of(q_ids, q_ids)
        own_length = _run_of(q_ids, q_ids)[1]
        start, length = _run_of(k_ids, q_ids)
        key_start, _ = _run_of(k_ids, k_ids)
        keys = k_index.expand(self.batch, -1)
        first, last = key_start, key_start + _run_of(k_ids, k_ids)[1] - 1
        # By run start, then spread back: the first and last allowed key of each document.
        if self.key_mask is not None:
            far = torch.full_like(keys, self.m)
            low = far.scatter_reduce(1, key_start, keys.where(self.key_mask, far), "amin")
            high = (-far).scatter_reduce(1, key_start, keys.where(self.key_mask, -far), "amax")
            some = low < self.m
            low = low.where(some, keys)
            high = high.where(some, keys - 1)
            first, last = low.gather(1, key_start), high.gather(1, key_start)
        q_first, q_last = first.gather(1, start), last.gather(1, start)
        q_first = q_first.where(length > 0, start)
        extent = (q_last - q_first + 1).where(length > 0, torch.zeros_like(length))
        q_pos = (q_index - own_start) + (length - own_length) - (q_first - start)
        return Placement(q_pos, keys - first, extent)

    def allowed(self) -> Tensor:
        """What the call's own masks allow: bool `[B or 1, 1, N, M]`, dense."""
        place = self.placement()
        mask = torch.ones(1, self.n, self.m, dtype=torch.bool, device=self.device)
        if self.causal:
            mask = mask & (place.k[:, None, :] <= place.q[:, :, None])
        if self.key_mask is not None:
            mask = mask & self.key_mask[:, None, :]
        if self.q_segments is not None and self.kv_segments is not None:
            mask = mask & (self.q_segments[:, :, None] == self.kv_segments[:, None, :])
        return mask[:, None]


def _span(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First and last True of each row, int64 `[B]`; (0, -1) where there is none."""
    as_int = mask.to(torch.int8)
    first = as_int.argmax(1)
    last = mask.shape[1] - 1 - as_int.flip(1).argmax(1)
    return first, torch.where(mask.any(1), last, -1)


def _run_of(ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Start and length of the run of `ids` `[B, L]` that bears each `wanted` id; length 0 if none.

    A stable sort keeps a run's indices in order, so its first index in the sorted order is the
    start of the run.
    """
    ordered, index = ids.sort(dim=1, stable=True)
    low = torch.searchsorted(ordered, wanted)
    high = torch.searchsorted(ordered, wanted, right=True)
    start = index.gather(1, low.clamp(max=ids.shape[1] - 1))
    return start, high - low
