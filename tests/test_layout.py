"""Layouts against dense masks that are written from the formulas, and their lowering to blocks."""

from __future__ import annotations

import copy
import operator
import pickle
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseattn.errors import InvalidInputError
from sparseattn.layout import BlockCSR, BlockLayout, Grid, Layout
from sparseattn.lowering import count_pairs

Dense = np.ndarray  # bool [n, m], written without sparseattn
Build = tuple[Callable[[Grid], Layout], Callable[[int, int], bool]]

MILLION = 1_000_000
BLOCKS = [(1, 1), (16, 16), (64, 64), (16, 64), (64, 16), (1, 64), (7, 5)]


def dense(grid: Grid, visible: Callable[[int, int], bool]) -> Dense:
    """The mask by two loops over positions, causality included."""
    assert grid.offset is not None
    mask = np.zeros((grid.n, grid.m), dtype=bool)
    for q in range(grid.n):
        i = q + grid.offset
        for j in range(grid.m):
            mask[q, j] = visible(i, j) and (j <= i or not grid.causal)
    return mask


def from_csr(csr: BlockCSR) -> Dense:
    """The mask that a CSR says: full blocks are filled in, partial ones evaluated."""
    frame = csr.frame
    rows, cols = frame.shape
    padded = np.zeros((rows * frame.query_block, cols * frame.key_block), dtype=bool)
    tiles = padded.reshape(rows, frame.query_block, cols, frame.key_block)
    row, col = csr.row_ids(), csr.indices.astype(np.int64)
    partial = np.flatnonzero(~csr.full)
    tiles[row[csr.full], :, col[csr.full]] = True
    tiles[row[partial], :, col[partial]] = csr.entry_masks(row[partial], col[partial, None]).numpy()
    return padded[: frame.n, : frame.m]


def well_formed(csr: BlockCSR) -> None:
    rows, cols = csr.shape
    assert csr.indptr.dtype == np.int64 and csr.indptr.shape == (rows + 1,)
    assert csr.indices.dtype == np.int32 and csr.full.dtype == bool and csr.terms.dtype == np.int64
    assert len(csr.indices) == len(csr.full) == len(csr.terms) == csr.indptr[-1] == csr.nnz
    assert csr.indptr[0] == 0 and (np.diff(csr.indptr) >= 0).all()
    assert ((csr.indices >= 0) & (csr.indices < max(cols, 1))).all()
    key = csr.row_ids() * max(cols, 1) + csr.indices
    assert (np.diff(key) > 0).all()
    assert (csr.full | (csr.terms != 0)).all()


def check_lowering(layout: Layout, want: Dense, query_block: int, key_block: int) -> BlockCSR:
    """Full entries are full, missing ones empty, partial ones exact, and so is the transpose."""
    csr = layout.lower(query_block, key_block)
    well_formed(csr)
    np.testing.assert_array_equal(from_csr(csr), want)
    back = csr.transpose()
    well_formed(back)
    assert back.shape == csr.shape[::-1] and back.transposed
    pairs = sorted(zip(back.indices.tolist(), back.row_ids().tolist(), strict=True))
    assert pairs == list(zip(csr.row_ids().tolist(), csr.indices.tolist(), strict=True))
    again = back.transpose()
    for name in ("indptr", "indices", "full", "terms"):
        np.testing.assert_array_equal(getattr(again, name), getattr(csr, name))
    assert not again.transposed
    if csr.nnz:
        rows, cols = csr.row_ids(), csr.indices[:, None]
        there = csr.entry_masks(rows, cols)
        here = back.entry_masks(cols[:, 0], rows[:, None])
        assert torch.equal(there, here.transpose(1, 2))
    return csr


def tile(want: Dense, row: int, col: int, query_block: int, key_block: int) -> Dense:
    return want[row * query_block :, col * key_block :][:query_block, :key_block]


def check_exact(csr: BlockCSR, want: Dense) -> None:
    """No partial entry is really full or really empty."""
    for row, col, full in zip(csr.row_ids(), csr.indices, csr.full, strict=True):
        block = tile(want, row, col, csr.frame.query_block, csr.frame.key_block)
        assert block.any() and block.all() == full


# Strategies: a layout and, apart from it, its formula.

grids = st.builds(
    Grid,
    n=st.integers(0, 80),
    m=st.integers(0, 80),
    causal=st.booleans(),
    offset=st.none() | st.integers(-90, 90),
)
sizes = st.sampled_from([1, 2, 3, 5, 8, 16, 17, 64, 100])
ends = st.none() | st.integers(-20, 100)


@st.composite
def block_lists(draw: st.DrawFn) -> Build:
    rows = draw(st.integers(0, 12))
    lists = draw(st.lists(st.lists(st.integers(0, 11), max_size=8), min_size=rows, max_size=rows))
    size = draw(sizes)
    indptr = np.cumsum([0] + [len(x) for x in lists]).tolist()
    flat = [x for row in lists for x in row]

    def visible(i: int, j: int) -> bool:
        row = i // size
        return 0 <= row < rows and j // size in lists[row]

    return (lambda grid: grid.blocks(indptr, flat, size)), visible


def bands(left: int | None, right: int | None) -> Build:
    return (
        lambda grid: grid.band(left, right),
        lambda i, j: (left is None or -left <= j - i) and (right is None or j - i <= right),
    )


simple = st.one_of(
    st.builds(bands, ends, ends),
    st.integers(0, 100).map(lambda c: (lambda g: g.first_keys(c), lambda i, j: j < c)),
    st.integers(0, 100).map(lambda c: (lambda g: g.first_queries(c), lambda i, j: i < c)),
    sizes.map(lambda s: (lambda g: g.chunks(s), lambda i, j: i // s == j // s)),
    st.tuples(sizes, st.integers(1, 9)).map(
        lambda x: (lambda g: g.key_blocks(x[0], x[1]), lambda i, j: j // x[0] % x[1] == 0)
    ),
    block_lists(),
)
clauses = st.one_of(
    simple,
    st.integers(1, 70).map(lambda e: (lambda g: g.step(e), lambda i, j: (i - j) % e == 0)),
    st.just((lambda g: g.everything(), lambda i, j: True)),
    st.integers(1, 7).map(
        lambda p: (
            lambda g: g.pattern(lambda i, j: (i * j) % p == 0),
            lambda i, j: (i * j) % p == 0,
        )
    ),
)


def joined(op: Callable, a: Build, b: Build) -> Build:
    return (lambda g: op(a[0](g), b[0](g))), (lambda i, j: op(bool(a[1](i, j)), bool(b[1](i, j))))


layouts = st.recursive(
    clauses,
    lambda inner: st.builds(joined, st.sampled_from([operator.or_, operator.and_]), inner, inner),
    max_leaves=6,
)
blocks = st.sampled_from(BLOCKS)


# The pattern itself.


@settings(max_examples=300, deadline=None)
@given(grids, layouts, blocks)
def test_any_layout_matches_its_formula(grid: Grid, build: Build, block: tuple[int, int]) -> None:
    layout, want = build[0](grid), dense(grid, build[1])
    np.testing.assert_array_equal(layout.mask().numpy(), want)
    check_lowering(layout, want, *block)
    assert layout.pairs() == want.sum()
    allowed = dense(grid, lambda i, j: True).sum()
    assert layout.density() == (want.sum() / allowed if allowed else 0.0)


@settings(max_examples=300, deadline=None)
@given(grids, simple, blocks)
def test_single_clauses_lower_exactly(grid: Grid, build: Build, block: tuple[int, int]) -> None:
    layout, want = build[0](grid), dense(grid, build[1])
    check_exact(check_lowering(layout, want, *block), want)


@settings(max_examples=200, deadline=None)
@given(grids, layouts)
def test_contains_has_no_causality_and_reduced_has(grid: Grid, build: Build) -> None:
    layout = build[0](grid)
    free = Grid(grid.n, grid.m, causal=False, offset=grid.offset)
    i = torch.arange(grid.n)[:, None] + (grid.offset or 0)
    j = torch.arange(grid.m)[None]
    got = layout.contains(i, j)
    assert got.dtype == torch.bool and got.shape == (grid.n, grid.m)
    np.testing.assert_array_equal(got.numpy(), dense(free, build[1]))
    np.testing.assert_array_equal(
        layout.reduced().contains(i, j).numpy() & (~np.array(grid.causal) | (j <= i).numpy()),
        dense(grid, build[1]),
    )


@settings(max_examples=200, deadline=None)
@given(grids, layouts)
def test_as_band_is_that_band(grid: Grid, build: Build) -> None:
    layout, want = build[0](grid), dense(grid, build[1])
    band = layout.as_band()
    if band is not None:
        both_ends = bands(*band)[1]
        free = Grid(grid.n, grid.m, causal=False, offset=grid.offset)
        np.testing.assert_array_equal(dense(free, both_ends), want)


@settings(max_examples=300, deadline=None)
@given(grids, ends, ends)
def test_a_band_is_known_for_one(grid: Grid, left: int | None, right: int | None) -> None:
    want = dense(grid, bands(left, right)[1])
    band = grid.band(left, right).as_band()
    if want.all():
        assert band == (None, None)
    elif want.any():
        assert band is not None
        # An end that is given cuts something off.
        for at, looser in enumerate(((None, band[1]), (band[0], None))):
            if band[at] is not None:
                free = Grid(grid.n, grid.m, causal=False, offset=grid.offset)
                assert dense(free, bands(*looser)[1]).sum() > want.sum()
    else:
        assert band is None


def test_as_band_normalises() -> None:
    grid, causal = Grid(100, 100), Grid(100, 100, causal=True)
    assert grid.everything().as_band() == (None, None)
    assert causal.everything().as_band() == (None, 0)
    assert causal.band(255, 255).as_band() == (None, 0)
    assert grid.band(99, 99).as_band() == (None, None)
    assert grid.band(98, 99).as_band() == (98, None)
    assert causal.band(15, 15).as_band() == (15, 0)
    assert (grid.band(5, 0) | grid.band(0, 5)).as_band() == (5, 5)
    assert (grid.band(5, -1) | grid.band(0, 5)).as_band() == (5, 5)
    assert (grid.band(5, -2) | grid.band(0, 5)).as_band() is None
    assert (grid.band(3, 9) & grid.band(9, 3)).as_band() == (3, 3)
    assert grid.first_keys(100).as_band() == (None, None)
    assert grid.first_keys(99).as_band() is None
    assert grid.chunks(100).as_band() == (None, None)
    assert (causal.band(255, 255) | causal.first_keys(4)).as_band() == (None, 0)
    assert grid.blocks([0, 2, 4], [0, 1, 1, 0], 50).as_band() == (None, None)
    assert grid.blocks([0, 2, 3], [0, 1, 1], 50).as_band() is None
    # One query at the end sees every key: causality cuts nothing off.
    assert Grid(1, 100, causal=True).everything().as_band() == (None, None)
    assert Grid(0, 5).band(1, 1).as_band() == (None, None)
    assert Grid(5, 0, causal=True).step(2).as_band() == (None, None)


def test_unions_and_intersections_are_simplified() -> None:
    grid = Grid(50, 50)
    band, first, chunks = grid.band(4, 4), grid.first_keys(3), grid.chunks(4)
    assert band | band == band and band & band == band
    assert band | first == first | band and hash(band | first) == hash(first | band)
    assert band & first == first & band
    assert band | grid.everything() == grid.everything()
    assert band & grid.everything() == band
    assert grid.band(9, 9) | band == grid.band(9, 9) and grid.band(9, 9) & band == band
    assert band | chunks == band and band & chunks == chunks  # a chunk of 4 is within distance 3
    assert chunks | grid.chunks(8) == grid.chunks(8)
    assert first | (band & first) == first
    assert first & grid.first_keys(7) == first and first | grid.first_keys(7) == grid.first_keys(7)
    assert (band & grid.band(-10, 20)).terms == () and grid.first_keys(0).terms == ()
    assert (band | first) & (chunks | grid.step(2)) == (
        chunks | (band & grid.step(2)) | (first & grid.step(2)) | (first & chunks)
    )
    assert grid.step(1) == grid.key_blocks(8) == grid.band(None, None) == grid.everything()
    assert band != first and band != Grid(50, 51).band(4, 4) and band != "band"
    blocks = grid.blocks([0, 2, 3], [1, 0, 1], 16)
    assert blocks == grid.blocks(np.array([0, 3, 4]), torch.tensor([0, 1, 1, 1]), 16)
    assert len({blocks, grid.blocks([0, 2, 3], [0, 1, 1], 16), band}) == 2
    assert repr((band & first) | blocks).startswith("Layout(first_keys(3) & band(4, 4) | BlockLay")
    for copied in (pickle.loads(pickle.dumps(band | blocks)), copy.deepcopy(band | blocks)):
        assert copied == band | blocks
    with pytest.raises(AttributeError):
        band.terms = ()  # type: ignore[misc]


def test_more_than_63_terms_share_the_last_bit() -> None:
    grid = Grid(150, 200, causal=True)
    layout = grid.first_keys(0)
    for at in range(70):
        layout = layout | grid.band(2 * at, -2 * at)
    layout = layout | (grid.step(5) & grid.key_blocks(3, 2))
    assert len(layout.reduced().terms) > 63
    want = dense(
        grid,
        lambda i, j: (
            ((i - j) % 2 == 0 and 0 <= i - j < 140) or ((i - j) % 5 == 0 and j // 3 % 2 == 0)
        ),
    )
    csr = check_lowering(layout, want, 16, 16)
    assert (csr.terms >> 62).any()
    # Blocks in which the last bit stands alone are no single band.
    assert (csr.terms == 1 << 62).any()
    assert count_pairs(csr.union, csr.frame) == layout.pairs() == want.sum()


@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize("block", [8, 16, 64])
@pytest.mark.parametrize("offset", [0, -16, 5])
def test_block_lists_are_full_where_all_their_cells_are(size: int, block: int, offset: int) -> None:
    generator = np.random.default_rng(size + block)
    chosen = generator.random((9, 9)) < 0.7
    grid = Grid(100, 150, causal=True, offset=offset)
    listed = BlockLayout.from_mask(chosen, size)
    layout = grid.blocks(listed.indptr, listed.indices, size)

    def visible(i: int, j: int) -> bool:
        return 0 <= i // size < 9 and j // size < 9 and bool(chosen[i // size, j // size])

    want = dense(grid, visible)
    check_exact(check_lowering(layout, want, block, block), want)


def test_entry_masks_pads_with_false_and_takes_many_rows() -> None:
    grid = Grid(37, 50, causal=True, offset=-3)
    layout = grid.band(7, 2) | grid.first_keys(2) | grid.step(11)
    csr = layout.lower(16, 8)
    padded = np.zeros((4 * 16, 9 * 8), dtype=bool)
    padded[:37, :50] = layout.mask().numpy()
    rows = np.array([2, 0, 1, 3, -1])
    cols = np.array([[0, 6, -1], [3, 2, 1], [1, 1, 8], [0, 1, 2], [0, 1, 2]])
    got = csr.entry_masks(rows, cols, device="cpu")
    assert got.shape == (5, 16, 24) and got.dtype == torch.bool
    for t, row in enumerate(rows):
        for s, col in enumerate(cols[t]):
            seen = got[t, :, s * 8 : s * 8 + 8].numpy()
            want = padded[row * 16 :][:16, col * 8 : col * 8 + 8]
            assert (seen == want).all() if row >= 0 and col >= 0 else not seen.any()
    with pytest.raises(InvalidInputError, match="rows, cols"):
        csr.entry_masks(rows, cols[:2])


@pytest.mark.parametrize("n, m", [(0, 0), (0, 5), (5, 0)])
def test_empty_grids(n: int, m: int) -> None:
    grid = Grid(n, m, causal=True)
    for layout in (grid.everything(), grid.band(3, 3) | grid.blocks([0], [], 4), grid.step(3)):
        csr = layout.lower(16, 16)
        well_formed(csr)
        assert csr.nnz == 0 and len(csr.indptr) == -(-n // 16) + 1
        assert len(csr.transpose().indptr) == -(-m // 16) + 1
        assert layout.mask().shape == (n, m) and layout.pairs() == 0 and layout.density() == 0.0
        assert not csr.entry_masks([0], [[0]]).any()


def test_no_pairs_allowed_has_density_zero() -> None:
    grid = Grid(4, 8, causal=True, offset=-20)
    assert grid.everything().pairs() == 0 and grid.everything().density() == 0.0


def test_patterns_are_asked_about_real_positions_only() -> None:
    table = torch.arange(20) % 3
    grid = Grid(20, 20)
    layout = grid.pattern(lambda i, j: table[i] == table[j])
    csr = layout.lower(16, 16)
    assert not csr.full.any() and csr.nnz == 4
    np.testing.assert_array_equal(from_csr(csr), (table[:, None] == table).numpy())
    with pytest.raises(InvalidInputError, match="bool"):
        grid.pattern(lambda i, j: i - j).mask()


def test_the_docstring_draws_the_mask() -> None:
    grid = Grid(n=6, m=6, causal=True)
    drawn = ["100000", "110000", "111000", "101100", "100110", "100011"]
    mask = (grid.band(1, 1) | grid.first_keys(1)).mask()
    assert ["".join(str(int(x)) for x in row) for row in mask] == drawn


# A million tokens: nothing of size n x m, nor near it.


def bigbird_lists(rows: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    near = np.clip(np.arange(rows)[:, None] + [-1, 0, 1], 0, rows - 1)
    random = generator.integers(0, rows, (rows, 3))
    return np.arange(rows + 1) * 6, np.concatenate([near, random], axis=1).ravel()


def bigbird(grid: Grid) -> Layout:
    lists = grid.blocks(*bigbird_lists(-(-grid.m // 64)), 64)
    return lists | grid.first_keys(64) | grid.first_queries(64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "build, entries_a_row",
    [
        pytest.param(lambda g: g.band(255, 255), 9, id="window"),
        pytest.param(lambda g: g.band(255, 255) | g.first_keys(4), 10, id="window-and-sinks"),
        pytest.param(lambda g: g.chunks(256), 4, id="chunks"),
        pytest.param(bigbird, 8, id="bigbird"),
    ],
)
def test_a_million_tokens_take_little_memory(
    build: Callable[[Grid], Layout], entries_a_row: int, causal: bool
) -> None:
    grid = Grid(MILLION, MILLION, causal=causal)
    rows = MILLION // 64
    tracemalloc.start()
    try:
        layout = build(grid)
        csr = layout.lower(64, 64)
        pairs = layout.pairs()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # PERFORMANCE's promise for a layout of a million tokens is 64 MB.
    assert peak < 64 * 2**20
    assert csr.nnz <= rows * entries_a_row
    assert csr.nbytes <= csr.nnz * (4 + 1 + 8) + (rows + 1) * 8
    assert 0 < pairs <= csr.nnz * 64 * 64


def test_a_million_tokens_agree_with_a_piece_of_them() -> None:
    """Patterns are absolute: queries from 900,000 on are the tail of the whole."""
    whole, piece = Grid(MILLION, MILLION, True), Grid(100_000, MILLION, True)
    for build in (bigbird, lambda g: g.band(99, 99) | g.first_keys(4)):
        a, b = build(whole).lower(32, 64), build(piece).lower(32, 64)
        at = 900_000 // 32
        assert (np.diff(a.indptr)[at:] == np.diff(b.indptr)).all()
        np.testing.assert_array_equal(a.indices[a.indptr[at] :], b.indices)
        np.testing.assert_array_equal(a.full[a.indptr[at] :], b.full)


def test_scattered_keys_cost_what_they_are() -> None:
    """Every 64th key of 20,000 in blocks of one key: teeth are walked, not the keys between."""
    grid = Grid(20_000, 20_000, causal=True)
    csr = grid.step(64).lower(1, 1)
    want = sum(q // 64 + 1 for q in range(20_000))
    assert csr.nnz == want == csr.full.sum()
    wide = grid.key_blocks(4, 1000).lower(64, 4)
    assert wide.nnz <= 5 * -(-20_000 // 64)


@pytest.mark.parametrize("n, m", [(MILLION, MILLION), (3 * MILLION, 2 * MILLION)])
def test_pairs_of_a_band_in_closed_form(n: int, m: int) -> None:
    grid = Grid(n, m, causal=True)
    i = np.arange(n, dtype=np.int64) + m - n
    everything = np.clip(i + 1, 0, m)
    window = np.clip(i + 1, 0, m) - np.clip(i - 255, 0, m)
    assert grid.everything().pairs() == everything.sum()
    assert grid.band(255, 255).pairs() == window.sum()
    assert grid.band(255, 255).density() == window.sum() / everything.sum()


# Layouts that users make.


@settings(max_examples=100, deadline=None)
@given(grids, block_lists())
def test_block_layout_membership(grid: Grid, build: Build) -> None:
    (clause,) = build[0](grid).terms[0]
    assert isinstance(clause, BlockLayout)
    assert grid.blocks(clause.indptr, clause.indices, clause.block) == build[0](grid)
    i = torch.arange(-30, 120)[:, None]
    j = torch.arange(0, 130)[None]
    got = clause.contains(i, j).numpy()
    assert got.tolist() == [[build[1](a, b) for b in range(130)] for a in range(-30, 120)]


def test_block_layout_is_a_value(tmp_path) -> None:
    a = BlockLayout([0, 2, 2, 5], [3, 0, 1, 1, 0], 16)
    b = BlockLayout(torch.tensor([0, 2, 2, 4]), np.array([0, 3, 0, 1], dtype=np.uint8), 16)
    assert a == b and hash(a) == hash(b) and a.digest == b.digest and a.rows == 3
    assert a.digest in repr(a) and len(a.digest) == 12
    mask = np.zeros((3, 4), dtype=bool)
    mask[[0, 0, 2, 2], [0, 3, 0, 1]] = True
    assert BlockLayout.from_mask(mask, 16) == a
    assert BlockLayout.from_mask(torch.from_numpy(mask), 16) == a
    different = [
        BlockLayout([0, 2, 2, 4], [0, 3, 0, 1], 32),
        BlockLayout([0, 2, 2, 4], [0, 3, 0, 2], 16),
        BlockLayout([0, 2, 3, 4], [0, 3, 0, 1], 16),
        BlockLayout([0, 2, 2, 4, 4], [0, 3, 0, 1], 16),
    ]
    assert len({a, *different}) == 5 and a != "layout"
    path = tmp_path / "layout.of.mine"
    a.save(path)
    assert path.exists() and BlockLayout.load(path) == a
    for copied in (pickle.loads(pickle.dumps(a)), copy.deepcopy(a)):
        assert copied == a and not copied.indices.flags.writeable
    with pytest.raises(AttributeError, match="frozen"):
        a.block = 8
    with pytest.raises(AttributeError, match="frozen"):
        del a.block
    with pytest.raises(ValueError):
        a.indices[0] = 1
    source = np.array([0, 1])
    kept = BlockLayout([0, 2], source, 4)
    source[0] = 9
    assert kept.indices.tolist() == [0, 1] and source.flags.writeable


def test_block_layout_refuses_other_files(tmp_path) -> None:
    path = tmp_path / "x.npz"
    for content in (b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(InvalidInputError, match=r"BlockLayout\.save"):
            BlockLayout.load(path)
    np.savez(path, indptr=np.array([0]), indices=np.array([], dtype=int))
    with pytest.raises(InvalidInputError, match=r"BlockLayout\.save"):
        BlockLayout.load(path)
    np.savez(path, indptr=np.array([{}]), indices=np.array([0]), block=np.array(4))
    with pytest.raises(InvalidInputError, match=r"BlockLayout\.save"):
        BlockLayout.load(path)
    with open(path, "wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(InvalidInputError, match=r"BlockLayout\.save"):
        BlockLayout.load(path)
    with pytest.raises(OSError):
        BlockLayout.load(tmp_path / "absent")


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: Grid(-1, 3), "n"),
        (lambda: Grid(3, 2.5), "m"),
        (lambda: Grid(True, 3), "n"),
        (lambda: Grid(2**31, 3), "n"),
        (lambda: Grid(3, 3, offset="0"), "offset"),
        (lambda: Grid(3, 3, causal=1), "causal"),
        (lambda: Grid(3, 3).band(1.0, 1), "left"),
        (lambda: Grid(3, 3).first_keys(-1), "count"),
        (lambda: Grid(3, 3).first_queries(None), "count"),
        (lambda: Grid(3, 3).chunks(0), "size"),
        (lambda: Grid(3, 3).key_blocks(4, step=0), "step"),
        (lambda: Grid(3, 3).step(0), "every"),
        (lambda: Grid(3, 3).pattern("causal"), "visible"),
        (lambda: Grid(3, 3).band(1, 1) | Grid(3, 4).band(1, 1), "layout"),
        (lambda: Grid(3, 3).band(1, 1) & Grid(3, 3, causal=True).band(1, 1), "layout"),
        (lambda: Grid(3, 3).band(1, 1).lower(0, 4), "query_block"),
        (lambda: Grid(3, 3).band(1, 1).lower(4, 0), "key_block"),
        (lambda: Grid(3, 3).band(1, 1).contains(torch.zeros(3), torch.arange(3)), "i"),
        (lambda: Grid(3, 3).blocks([0, 1], [-1], 4), "indices"),
        (lambda: Grid(3, 3).blocks([0, 1], [2**31], 4), "indices"),
        (lambda: Grid(3, 3).blocks([0, 1], [0.5], 4), "indices"),
        (lambda: Grid(3, 3).blocks([0, 1], [True], 4), "indices"),
        (lambda: Grid(3, 3).blocks([0, 1], [[1]], 4), "indices"),
        (lambda: Grid(3, 3).blocks([0, 2, 1], [0], 4), "indptr"),
        (lambda: Grid(3, 3).blocks([1, 1], [0], 4), "indptr"),
        (lambda: Grid(3, 3).blocks([0, 2], [0], 4), "indptr"),
        (lambda: Grid(3, 3).blocks([], [], 4), "indptr"),
        (lambda: Grid(3, 3).blocks([0], [], 0), "block"),
        (lambda: BlockLayout.from_mask(np.ones((2, 2)), 4), "mask"),
        (lambda: BlockLayout.from_mask(np.ones(2, dtype=bool), 4), "mask"),
    ],
)
def test_errors_name_the_argument(make: Callable[[], object], name: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"^{name}: got .*, expected .*; "):
        make()
    with pytest.raises(ValueError):
        make()


def test_numbers_far_beyond_any_length_are_legal() -> None:
    huge = 2**63
    grid = Grid(9, 9, causal=True)
    assert grid.band(huge, huge).as_band() == (None, 0)
    assert grid.band(-huge, None).pairs() == 0
    assert grid.first_keys(huge).as_band() == grid.first_queries(huge).as_band() == (None, 0)
    assert grid.chunks(huge).as_band() == (None, 0)
    assert grid.key_blocks(huge, huge).as_band() == (None, 0)
    assert (grid.key_blocks(3, huge).mask() == grid.first_keys(3).mask()).all()
    assert (grid.step(huge).mask() == torch.eye(9, dtype=torch.bool)).all()
    assert grid.step(huge).lower(4, 4).nnz == 3
    assert grid.key_blocks(3, huge).lower(4, 4).nnz == 3


@pytest.mark.parametrize("offset", [2**40, -(2**40)])
def test_positions_as_far_as_allowed(offset):
    diagonal = Grid(4, 9, True, offset).band(offset, -offset).mask()
    assert torch.equal(diagonal, torch.ones(4, 9, dtype=torch.bool).tril().triu() & (offset > 0))
    with pytest.raises(InvalidInputError, match=f"offset: got {2 * offset}"):
        Grid(4, 9, True, 2 * offset)
