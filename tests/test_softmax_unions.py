"""Unions taken apart into pieces: every visible pair in exactly one piece, whatever the grid."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

import sparseattn as sa
from sparseattn.call import AttentionCall
from sparseattn.engines.softmax import blocks, in_torch, pieces, unions
from sparseattn.layout import Grid, Layout

GRIDS = [
    (1, 1, None),
    (23, 23, None),
    (7, 31, None),
    (31, 7, None),
    (5, 20, -3),
    (12, 9, -20),
    (6, 10, 40),
    (130, 130, None),
    (100, 160, None),
    (160, 100, None),
    (90, 200, 33),
    (150, 90, -20),
]


def shown(plan: tuple[pieces.Piece, ...], n: int, m: int) -> Tensor:
    """How many pieces show each pair, from what the pieces say of themselves."""
    count = torch.zeros(n, m, dtype=torch.int64)
    for piece in plan:
        if isinstance(piece, pieces.Comb):
            inner = shown(piece.inner, piece.rows, piece.keys)
            for c in range(piece.classes):
                rows = piece.r0 + c + piece.step * torch.arange(piece.rows)
                keys = piece.k0 + c + piece.step * torch.arange(piece.keys)
                count[rows[:, None], keys[None]] += inner
        elif isinstance(piece, pieces.Stack):
            square = torch.ones(piece.size, piece.size, dtype=torch.int64)
            for t in range(piece.tiles):
                r, k = piece.r0 + t * piece.size, piece.k0 + t * piece.size
                count[r : r + piece.size, k : k + piece.size] += (
                    square.tril() if piece.causal else square
                )
        elif isinstance(piece, pieces.Fold):
            ahead = torch.arange(piece.width)[None] - torch.arange(piece.size)[:, None] - piece.left
            band = (ahead >= -piece.left) & (ahead <= piece.right)
            for t in range(piece.tiles):
                r, k = piece.r0 + t * piece.size, piece.k0 + t * piece.size
                count[r : r + piece.size, k : k + piece.width] += band
        else:
            rows, keys = piece.r1 - piece.r0, piece.k1 - piece.k0
            seen = torch.ones(rows, keys, dtype=torch.bool)
            if piece.causal:
                seen = seen.tril()
            if piece.band is not None:
                ahead = torch.arange(keys)[None] - torch.arange(rows)[:, None] + piece.shift
                seen = (ahead >= -piece.band[0]) & (ahead <= piece.band[1])
            count[piece.r0 : piece.r1, piece.k0 : piece.k1] += seen
    return count


def drawn(grid: Grid, rng: random.Random) -> Layout:
    """A union of one to four random terms."""

    def term() -> Layout:
        part = rng.choice(
            [
                lambda: grid.band(rng.randint(-5, 20), rng.randint(-5, 20)),
                lambda: grid.band(None, rng.randint(-30, 5)),
                lambda: grid.first_keys(rng.randint(0, 30)),
                lambda: grid.first_queries(rng.randint(0, 30)),
                lambda: grid.first_keys(rng.randint(0, 30)) & grid.first_queries(rng.randint(0, 9)),
            ]
        )()
        return part & grid.band(rng.randint(0, 40), None) if rng.random() < 0.3 else part

    layout = term()
    for _ in range(rng.randint(0, 2)):
        layout = layout | term()
    if rng.random() < 0.5:
        step = grid.step(rng.randint(2, 9))
        layout = layout | (step & term() if rng.random() < 0.5 else step)
    return layout


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(("n", "m", "offset"), GRIDS)
def test_pieces_are_the_mask(n: int, m: int, offset: int | None, causal: bool) -> None:
    rng = random.Random(f"{n} {m} {offset}")
    grid = Grid(n, m, causal, offset)
    chunks = [grid.chunks(size) for size in (32, 40, 64)]
    served = 0
    for layout in chunks + [drawn(grid, rng) for _ in range(60)]:
        plan = unions.plan(layout)
        if plan is not None:
            served += 1
            assert torch.equal(shown(plan, n, m), layout.mask().to(torch.int64)), layout
    assert served > 30


@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        ("windowed(window=20, sinks=3)", {pieces.Fold, pieces.Rect}),
        ("longformer(window=10, global_tokens=4)", {pieces.Fold, pieces.Rect}),
        ("strided(stride=16)", {pieces.Fold, pieces.Rect, pieces.Comb}),
        ("dilated(window=9, dilation=3)", {pieces.Comb}),
        ("chunked(chunk=40)", {pieces.Stack, pieces.Rect}),
    ],
)
def test_output_and_gradients(spec: str, kinds: set[type]) -> None:
    """In float64 against the definition; the plan has the pieces it was meant to have."""
    mechanism = sa.mechanism(spec)
    g = torch.Generator().manual_seed(0)
    for (n, m, offset), causal in itertools.product(GRIDS, (True, False)):
        call = AttentionCall.make(
            *(torch.zeros(1, 1, x, 2) for x in (n, m, m)), causal=causal, q_offset=offset
        )
        path, plan = in_torch._path(mechanism, call)
        assert path == "pieces"
        if (n, m, offset, causal) == (130, 130, None, True):
            assert {type(piece) for piece in plan} == kinds
        q, k, v = (
            torch.randn(2, h, x, 8, dtype=torch.float64, generator=g).requires_grad_()
            for h, x in ((4, n), (2, m), (2, m))
        )
        results = []
        for impl in ("torch", "reference"):
            out, lse = sa.attention(
                q, k, v, mechanism, causal=causal, q_offset=offset, impl=impl, return_lse=True
            )
            total = out.sin().sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()
            results.append((out, lse, *torch.autograd.grad(total, (q, k, v))))
        for got, want in zip(*results, strict=True):
            same = got == want  # an lse of -inf
            error = (got - want).masked_fill(same, 0.0).abs().max()
            scale = want.masked_fill(want.isinf(), 0.0).abs().max().clamp(min=1.0)
            # Sums of up to m or n terms, each rounded once.
            assert error <= (n + m) * torch.finfo(torch.float64).eps * scale


def test_alike_blocks_share_a_mask() -> None:
    """A layout of N / 64 rows keeps a handful of bit tiles, and none where all is visible."""
    grid = Grid(4096, 4096, True)
    csr = (grid.band(64, 64) | grid.key_blocks(64, step=7)).lower(64, 64)
    tiles = blocks.plan(csr).tiles
    assert tiles is not None and len(tiles) <= 3
    assert blocks.plan(csr) is blocks.plan(csr)


def test_too_many_different_masks_are_made_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Grid(200, 200, True).pattern(lambda i, j: (i * i + 3 * j * j) % 7 < 3)
    q, k, v = (torch.randn(2, 200, 8, dtype=torch.float64) for _ in range(3))
    plain = blocks.forward(layout.lower(64, 64), q[:, None], k, v, 0.3)
    monkeypatch.setattr(blocks, "_MOST_TILES", 2)
    csr = layout.lower(64, 64)
    assert blocks.plan(csr).tiles is None
    batchwise = blocks.forward(csr, q[:, None], k, v, 0.3)
    eps = torch.finfo(torch.float64).eps
    for a, b in zip(plain, batchwise, strict=True):
        assert (a - b).abs().max() <= 64 * eps * a.abs().max()
