"""Bands as pieces: rectangles and folds, each a few large calls to torch's fused CPU kernel.

A plan is a list of pieces that cover every visible pair exactly once. Pieces that share rows are
merged by their lse, and each backward takes the total lse, so pieces never know of one another.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...digits import wide
from .bands import Comb, Fold, Piece, Rect, Stack
from .primitive import additive, flash_backward, flash_forward

# Elements of one slab of folded key gradients.
_SLAB_ELEMENTS = 2**21


@lru_cache(maxsize=128)
def _band_mask(
    rows: int, cols: int, left: int, right: int, shift: int, dtype: torch.dtype
) -> Tensor:
    # Shared by all tiles and heads; built outside autograd and never returned by an operator.
    distance = torch.arange(cols)[None] - torch.arange(rows)[:, None] + shift
    return additive((distance >= -left) & (distance <= right), dtype)


def _mask_of(piece: Rect | Fold, dtype: torch.dtype) -> Tensor | None:
    if isinstance(piece, Fold):
        # Column 0 of a tile is `left` keys before its first query.
        return _band_mask(piece.size, piece.width, piece.left, piece.right, -piece.left, dtype)
    if piece.band is None:
        return None
    rows, cols = piece.r1 - piece.r0, piece.k1 - piece.k0
    return _band_mask(rows, cols, *piece.band, piece.shift, dtype)


def _fold_keys(x: Tensor, piece: Fold, start: int, tiles: int) -> Tensor:
    """`[Z, m, D]` as overlapping tiles `[Z, tiles, width, D]`, without a copy."""
    z, _, d = x.shape
    offset = x.storage_offset() + (piece.k0 + start * piece.size) * x.stride(1)
    strides = (x.stride(0), piece.size * x.stride(1), x.stride(1), x.stride(2))
    return x.as_strided((z, tiles, piece.width, d), strides, offset)


def forward(
    pieces: tuple[Piece, ...], q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over a plan: q `[Z, G, n, D]` (G query heads share a key head), k, v `[Z, m, .]`.

    Returns:
        out `[Z, G, n, Dv]` and lse `[Z, G, n]`; rows in no piece are 0 and -inf.
    """
    z, g, n, _ = q.shape
    only = pieces[0] if g == len(pieces) == 1 else None
    if isinstance(only, Rect) and (only.r0, only.r1) == (0, n):
        o, s = _piece(only, q[:, 0], k, v, scale)
        return o[:, None], s[:, None]
    out = q.new_empty(z, g, n, v.shape[-1])
    lse = q.new_empty(z, g, n, dtype=wide(q.dtype))
    done: list[tuple[int, int]] = []
    for piece in pieces:
        shared = _blank(out, lse, done, piece)
        done.append((piece.r0, piece.r1))
        if isinstance(piece, Comb):
            o, s = forward(piece.inner, *_teeth(piece, q, k, v), scale)
            parts = [(_comb(out, piece, True), _comb(lse, piece, True), o, s)]
            parts = [(a, b, o.view(a.shape), s.view(b.shape)) for a, b, o, s in parts]
        else:
            rows = slice(piece.r0, piece.r1)
            parts = [
                (
                    out[:, head, rows],
                    lse[:, head, rows],
                    *_piece(piece, q[:, head, rows], k, v, scale),
                )
                for head in range(g)
            ]
        for into, into_lse, o, s in parts:
            if shared:
                _merge(into, into_lse, o, s)
            else:
                into.copy_(o)
                into_lse.copy_(s)
    _blank(out, lse, done, None)
    return out, lse


def _piece(
    piece: Rect | Fold | Stack, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One piece for one query head of each group: its rows of q `[Z, rows, D]`."""
    if isinstance(piece, Rect):
        keys = slice(piece.k0, piece.k1)
        mask = _mask_of(piece, q.dtype)
        # As rows of a batch, not heads of one: the kernel then returns them contiguous.
        parts = (q[:, None], k[:, None, keys], v[:, None, keys])
        o, s = flash_forward(*parts, scale, mask, piece.causal)
        return o[:, 0], s[:, 0]
    tiled = q.unflatten(1, (piece.tiles, piece.size))
    if isinstance(piece, Stack):
        o, s = flash_forward(
            tiled, _stacked(k, piece), _stacked(v, piece), scale, None, piece.causal
        )
    else:
        o, s = flash_forward(
            tiled,
            _fold_keys(k, piece, 0, piece.tiles),
            _fold_keys(v, piece, 0, piece.tiles),
            scale,
            _mask_of(piece, q.dtype),
        )
    return o.flatten(1, 2), s.flatten(1, 2)


def _blank(out: Tensor, lse: Tensor, done: list[tuple[int, int]], piece: Piece | None) -> bool:
    """Empty the rows that no piece has served yet: all at the end, or those of a piece that serves
    no rows in between, or that shares only some of its own. Returns whether the piece's rows hold
    something now, so that it must be merged."""
    first, last = (0, out.shape[2]) if piece is None else (piece.r0, piece.r1)
    inside = sorted((max(a, first), min(b, last)) for a, b in done if a < last and first < b)
    if piece is not None and not inside and not isinstance(piece, Comb):
        return False
    start = first
    for a, b in [*inside, (last, last)]:
        if a > start:
            out[:, :, start:a] = 0
            lse[:, :, start:a] = -torch.inf
        start = max(start, b)
    return True


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add the part `more` to `out` in place: `[..., Dv]` and lse `[...]` of disjoint keys.

    Only the difference of the two counts, so that a rounding of either moves weight between the
    parts and changes no sum of weights: a small part brings a small error.
    """
    new = torch.sigmoid(more_lse - lse).masked_fill_(more_lse == -torch.inf, 0.0)[..., None]
    old = 1 - new
    if out.dtype == old.dtype:
        out.mul_(old).addcmul_(more, new)
    else:
        out.copy_(out * old + more * new)
    lse.copy_(torch.logaddexp(lse, more_lse))


def _stacked(x: Tensor, piece: Stack) -> Tensor:
    """`[Z, m, D]` as the squares' keys `[Z, tiles, size, D]`."""
    keys = x[:, piece.k0 : piece.k0 + piece.tiles * piece.size]
    return keys.unflatten(1, (piece.tiles, piece.size))


def _comb(x: Tensor, piece: Comb, rows: bool) -> Tensor:
    """A view by classes: `[Z, G, n, ...]` as `[Z, classes, G, rows, ...]`, or `[Z, m, D]` as
    `[Z, classes, keys, D]`."""
    axis, start, count = (2, piece.r0, piece.rows) if rows else (1, piece.k0, piece.keys)
    stride = x.stride()
    inner = (*x.shape[1:axis], count, *x.shape[axis + 1 :])
    strides = (*stride[1:axis], piece.step * stride[axis], *stride[axis + 1 :])
    return x.as_strided(
        (x.shape[0], piece.classes, *inner),
        (stride[0], stride[axis], *strides),
        x.storage_offset() + start * stride[axis],
    )


def _teeth(piece: Comb, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies by class: the classes join Z."""
    return tuple(  # type: ignore[return-value]
        _comb(x, piece, x.ndim == 4).flatten(0, 1).contiguous() for x in (q, k, v)
    )


def backward(
    pieces: tuple[Piece, ...],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, wide; shapes as `forward`."""
    acc = wide(q.dtype)
    dq = torch.zeros(q.shape, dtype=acc)
    dk, dv = torch.zeros(k.shape, dtype=acc), torch.zeros(v.shape, dtype=acc)
    for piece in pieces:
        if isinstance(piece, Comb):
            _comb_backward(piece, (grad_out, grad_lse, q, k, v, out, lse), scale, dq, dk, dv)
            continue
        mask = None if isinstance(piece, Stack) else _mask_of(piece, q.dtype)
        for head in range(q.shape[1]):
            dlse = None if grad_lse is None else grad_lse[:, head]
            args = (grad_out[:, head], dlse, q[:, head], k, v, out[:, head], lse[:, head])
            rows = slice(piece.r0, piece.r1)
            if isinstance(piece, Fold):
                _fold_backward(piece, mask, args, scale, dq[:, head], dk, dv)
                continue
            if isinstance(piece, Stack):
                tile = (piece.tiles, piece.size)
                keys = slice(piece.k0, piece.k0 + piece.tiles * piece.size)
                cut = (rows, rows, rows, keys, keys, rows, rows)
                part = [
                    None if x is None else x[:, c].unflatten(1, tile)
                    for x, c in zip(args, cut, strict=True)
                ]
                found = flash_backward(*part, scale, None, piece.causal)  # type: ignore[arg-type,call-arg]
                grads = [x.flatten(1, 2) for x in found]
            else:
                keys = slice(piece.k0, piece.k1)
                cut = (rows, rows, rows, keys, keys, rows, rows)
                part = [
                    None if x is None else x[None, :, c] for x, c in zip(args, cut, strict=True)
                ]
                found = flash_backward(*part, scale, mask, piece.causal)  # type: ignore[arg-type,call-arg]
                grads = [x[0] for x in found]
            dq[:, head, rows] += grads[0]
            dk[:, keys] += grads[1]
            dv[:, keys] += grads[2]
    return dq, dk, dv


def _comb_backward(
    piece: Comb,
    args: tuple[Tensor | None, ...],
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    by_row = (True, True, True, False, False, True, True)
    parts = (
        None if x is None else _comb(x, piece, rows).flatten(0, 1).contiguous()
        for x, rows in zip(args, by_row, strict=True)
    )
    grads = backward(piece.inner, *parts, scale)  # type: ignore[arg-type,call-arg]
    for total, grad, rows in zip((dq, dk, dv), grads, (True, False, False), strict=True):
        view = _comb(total, piece, rows)
        view += grad.view(view.shape)


def _fold_backward(
    piece: Fold,
    mask: Tensor | None,
    args: tuple[Tensor | None, ...],
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    grad_out, grad_lse, q, k, v, out, lse = args
    assert q is not None and k is not None and v is not None
    # Folded key gradients are width / size times as large as keys: only a slab at a time.
    per_tile = k.shape[0] * piece.width * k.shape[-1]
    step = max(1, _SLAB_ELEMENTS // per_tile)
    for start in range(0, piece.tiles, step):
        tiles = min(step, piece.tiles - start)
        rows = slice(piece.r0 + start * piece.size, piece.r0 + (start + tiles) * piece.size)
        tile = (tiles, piece.size)
        g, s, qt, o, t = (
            None if x is None else x[:, rows].unflatten(1, tile)
            for x in (grad_out, grad_lse, q, out, lse)
        )
        kt, vt = _fold_keys(k, piece, start, tiles), _fold_keys(v, piece, start, tiles)
        a, b, c = flash_backward(g, s, qt, kt, vt, o, t, scale, mask)  # type: ignore[arg-type]
        dq[:, rows] += a.flatten(1, 2)
        base = piece.k0 + start * piece.size
        _overlap_add(dk, b, base, piece.size)
        _overlap_add(dv, c, base, piece.size)


def _overlap_add(total: Tensor, tiles: Tensor, base: int, size: int) -> None:
    """Add tiles `[Z, T, width, D]`, tile t from row `base + t * size`, into `[Z, m, D]`.

    Strip by strip: strips of one index never overlap, so each is one plain, deterministic addition.
    """
    count, width = tiles.shape[1], tiles.shape[2]
    for at in range(0, width, size):
        strip = tiles[:, :, at : at + size]
        length = strip.shape[2]
        if length == size:
            rows = total[:, base + at : base + at + count * size]
            rows.unflatten(1, (count, size)).add_(strip)
        else:  # the last strip is narrower than its step
            z, _, d = total.shape
            view = total.as_strided(
                (z, count, length, d),
                (total.stride(0), size * total.stride(1), total.stride(1), total.stride(2)),
                total.storage_offset() + (base + at) * total.stride(1),
            )
            view.add_(strip)
