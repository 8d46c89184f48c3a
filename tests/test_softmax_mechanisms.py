"""Static softmax mechanisms against loops written from their table of definitions."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseattn.base import MaskedSoftmax
from sparseattn.call import AttentionCall
from sparseattn.errors import InvalidInputError
from sparseattn.layout import BlockLayout, Grid
from sparseattn_block_sparse import BigBird, BlockSparse, OracleTopK, TopKBlocks, VerticalSlash
from sparseattn_block_sparse.static import draw_block
from sparseattn_full import Full
from sparseattn_windowed import Chunked, Dilated, Longformer, Strided, Windowed

# rule(i, j, keys, causal): the row of the table, for two positions as Python ints.
Rule = Callable[[int, int, int, bool], bool]


def hashed(seed: int, row: int, draw: int) -> int:
    """The 32-bit hash of three counters, from its description, in Python ints."""
    state = 0
    for word in (seed % 2**32, seed // 2**32, row % 2**32, row // 2**32, draw):
        state = (state + word + 0x9E3779B9) % 2**32
        state ^= state >> 16
        state = state * 0x21F0AAAD % 2**32
        state ^= state >> 15
        state = state * 0x735A2D97 % 2**32
        state ^= state >> 15
    return state


def windowed(left: int, right: int, sinks: int) -> Rule:
    return lambda i, j, keys, causal: -left <= j - i <= right or j < sinks


def dilated(window: int, dilation: int) -> Rule:
    return lambda i, j, keys, causal: (i - j) % dilation == 0 and abs(i - j) < window * dilation


def longformer(left: int, right: int, tokens: int) -> Rule:
    return lambda i, j, keys, causal: -left <= j - i <= right or j < tokens or i < tokens


def strided(stride: int) -> Rule:
    return lambda i, j, keys, causal: abs(i - j) < stride or (i - j) % stride == 0


def bigbird(block: int, window: int, tokens: int, draws: int, seed: int) -> Rule:
    def rule(i: int, j: int, keys: int, causal: bool) -> bool:
        row, column = math.floor(i / block), math.floor(j / block)
        if abs(row - column) <= window // 2 or column < tokens or row < tokens:
            return True
        blocks = row + 1 if causal else math.ceil(keys / block)
        return any(column == hashed(seed, row, draw) % blocks for draw in range(draws))

    return rule


LISTED = BlockLayout([0, 2, 2, 5, 6], [0, 3, 1, 0, 2, 9], 3)


def block_sparse(i: int, j: int, keys: int, causal: bool) -> bool:
    rows: list[list[int]] = [[0, 3], [], [0, 1, 2], [9]]
    return 0 <= i // 3 < 4 and j // 3 in rows[i // 3]


CASES: list[tuple[MaskedSoftmax, Rule]] = [
    (Full(), lambda i, j, keys, causal: True),
    (Windowed(), windowed(255, 255, 0)),
    (Windowed(window=1), windowed(0, 0, 0)),
    (Windowed(window=4, sinks=2), windowed(3, 3, 2)),
    (Windowed(window=(5, 0), sinks=1), windowed(5, 0, 1)),
    (Windowed(window=(0, 3)), windowed(0, 3, 0)),
    (Windowed(window=(2, 7), sinks=30), windowed(2, 7, 30)),
    (Windowed(window=2**31 - 1), windowed(2**31, 2**31, 0)),
    (Dilated(), dilated(256, 2)),
    (Dilated(window=3, dilation=2), dilated(3, 2)),
    (Dilated(window=1, dilation=5), dilated(1, 5)),
    (Dilated(window=4, dilation=1), dilated(4, 1)),
    (Dilated(window=2**31 - 1, dilation=2**31 - 1), dilated(2**31 - 1, 2**31 - 1)),
    (Chunked(), lambda i, j, keys, causal: i // 256 == j // 256),
    (Chunked(chunk=1), lambda i, j, keys, causal: i == j),
    (Chunked(chunk=5), lambda i, j, keys, causal: i // 5 == j // 5),
    (Longformer(), longformer(255, 255, 1)),
    (Longformer(window=2, global_tokens=0), longformer(1, 1, 0)),
    (Longformer(window=(1, 4), global_tokens=3), longformer(1, 4, 3)),
    (Strided(), strided(64)),
    (Strided(stride=1), strided(1)),
    (Strided(stride=4), strided(4)),
    (BigBird(), bigbird(64, 3, 1, 3, 0)),
    (BigBird(block=2, window_blocks=1, global_blocks=0, random_blocks=1), bigbird(2, 1, 0, 1, 0)),
    (BigBird(block=3, random_blocks=2, seed=7), bigbird(3, 3, 1, 2, 7)),
    (BigBird(block=1, window_blocks=4, random_blocks=4, seed=2**63), bigbird(1, 4, 1, 4, 2**63)),
    (BigBird(block=4, window_blocks=2**31 - 1), bigbird(4, 2**31, 1, 3, 0)),
    (BigBird(block=4, global_blocks=2, random_blocks=0), bigbird(4, 3, 2, 0, 0)),
    (BlockSparse(layout=LISTED), block_sparse),
    (BlockSparse(BlockLayout([0], [], 7)), lambda i, j, keys, causal: False),
]
IDS = [repr(mechanism) for mechanism, _ in CASES]

# (queries, keys, position of query 0 or None for bottom-right)
SIZES = [
    (1, 1, None),
    (23, 23, None),
    (7, 31, None),
    (31, 7, None),
    (5, 20, -3),
    (12, 9, -20),
    (6, 10, 40),
    (1, 29, None),
    (3, 0, None),
    (0, 4, None),
]


def table(rule: Rule, grid: Grid) -> torch.Tensor:
    """The rule as a mask, pair by pair, causality included."""
    mask = torch.zeros(grid.n, grid.m, dtype=torch.bool)
    for row in range(grid.n):
        i = row + grid.offset
        for j in range(grid.m):
            mask[row, j] = rule(i, j, grid.m, grid.causal) and (j <= i or not grid.causal)
    return mask


def request(n: int, m: int, batch: int = 1, heads: int = 1, **options: object) -> AttentionCall:
    q, k = torch.zeros(batch, heads, n, 2), torch.zeros(batch, heads, m, 2)
    return AttentionCall.make(q, k, k, **options)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(("mechanism", "rule"), CASES, ids=IDS)
def test_pattern_is_its_table(mechanism: MaskedSoftmax, rule: Rule, causal: bool) -> None:
    """`visible`, `layout` and the mask of a call are the table, lengths and offsets of any kind."""
    for n, m, offset in SIZES:
        grid = Grid(n, m, causal, offset)
        want = table(rule, grid)
        call = request(n, m, causal=causal, q_offset=offset)
        assert torch.equal(mechanism.mask(call)[0, 0], want), (n, m, offset)
        assert torch.equal(mechanism.clauses(grid).mask(), want), (n, m, offset)
        assert mechanism.clauses(grid).pairs() == int(want.sum())
        i, j = torch.arange(n) + grid.offset, torch.arange(m)
        if causal:  # the plain form, for a mechanism that also has one with the number of keys
            seen = mechanism.visible(i[:, None], j[None]) & (j[None] <= i[:, None])
            assert torch.equal(seen, want)


@pytest.mark.parametrize(
    "mechanism",
    [Windowed(100, 4), Dilated(20, 3), Chunked(70), Longformer(80, 5), Strided(50), BigBird(16)],
    ids=lambda mechanism: mechanism.name,
)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_layout_is_visible_at_ragged_lengths(mechanism: MaskedSoftmax, causal: bool) -> None:
    for n, m in [(257, 257), (63, 300), (300, 65)]:
        call = request(n, m, causal=causal)
        assert torch.equal(mechanism.clauses(Grid(n, m, causal)).mask(), mechanism.mask(call)[0, 0])


def test_weights_are_a_softmax_over_the_table() -> None:
    """W, entry by entry in Python floats, grouped heads and an empty row included."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 6, 3).double(), torch.randn(1, 2, 5, 3).double()
    call = AttentionCall.make(q, k, k, causal=True)
    weights = Windowed(window=3, sinks=1).weights(q, k, call)
    rule = windowed(2, 2, 1)
    for h in range(4):
        for row in range(6):
            i = row - 1
            powers = [
                math.exp(3**-0.5 * float(q[0, h, row] @ k[0, h // 2, j]))
                if rule(i, j, 5, True) and j <= i
                else 0.0
                for j in range(5)
            ]
            total = sum(powers)
            want = torch.tensor([x / (total or 1.0) for x in powers], dtype=q.dtype)
            error = (weights[0, h, row] - want).abs().max()
            assert error <= 64 * torch.finfo(torch.float64).eps
    assert (weights[:, :, 0] == 0).all()


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_packed_and_padded_runs_equal_runs_alone(causal: bool) -> None:
    """Positions, and the number of key blocks that BigBird draws from, belong to each run."""
    lengths = [11, 30, 17]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    padding = torch.ones(3, 30, dtype=torch.bool)
    for row, length in enumerate(lengths):
        padding[row, : 30 - length] = False
    for mechanism, _ in CASES:
        packed = mechanism.mask(request(58, 58, causal=causal, q_segments=ids))[0, 0]
        padded = mechanism.mask(request(30, 30, batch=3, causal=causal, key_mask=padding))[:, 0]
        start = 0
        for row, length in enumerate(lengths):
            alone = mechanism.mask(request(length, length, causal=causal))[0, 0]
            here = slice(start, start + length)
            assert torch.equal(packed[here, here], alone), mechanism
            assert torch.equal(padded[row, -length:, -length:], alone), mechanism
            start += length


@pytest.mark.parametrize(
    "wide",
    [
        Windowed(window=40),
        Windowed(window=(39, 39)),
        Windowed(window=1, sinks=40),
        Dilated(window=40, dilation=1),
        Chunked(chunk=40),
        Longformer(window=40),
        Longformer(window=1, global_tokens=40),
        Strided(stride=1),
        BigBird(block=40),
        BigBird(block=2, global_blocks=20),
        BlockSparse(BlockLayout.from_mask(np.ones((1, 1), dtype=bool), 40)),
        BlockSparse(BlockLayout.from_mask(np.ones((5, 5), dtype=bool), 8)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_widest_options_are_full(wide: MaskedSoftmax, causal: bool) -> None:
    grid = Grid(40, 40, causal)
    assert torch.equal(wide.clauses(grid).mask(), Full().clauses(grid).mask())
    assert wide.clauses(grid).density() == 1.0


def test_causal_windows_see_window_keys() -> None:
    for mechanism in (Windowed(window=5), Dilated(window=5, dilation=3)):
        seen = mechanism.mask(request(40, 40, causal=True))[0, 0].sum(1)
        assert (seen[12:] == 5).all() and seen.max() == 5


# ---- the draws ----


def test_draws_are_one_number_in_torch_numpy_and_python() -> None:
    rows = np.concatenate((np.arange(300), [2**31, 2**32 + 1, 2**40]))
    counts = np.maximum(rows, 1)
    for seed in (0, 1, 2**32, 2**64 - 1):
        for draw in (0, 1, 5):
            want = [
                hashed(seed, int(row), draw) % int(count)
                for row, count in zip(rows, counts, strict=True)
            ]
            in_numpy = draw_block(seed, rows, draw, counts)
            in_torch = draw_block(seed, torch.from_numpy(rows), draw, torch.from_numpy(counts))
            assert in_numpy.tolist() == want
            assert in_torch.tolist() == want


def test_draws_are_these_numbers() -> None:
    """Specs stand for patterns: a change here changes every BigBird that someone stored."""
    rows = torch.tensor([0, 1, 2, 1000])
    drawn = [draw_block(0, rows, draw, torch.tensor(10**6)).tolist() for draw in range(2)]
    assert drawn == [[734800, 334086, 165758, 245170], [161108, 589285, 93453, 877942]]


def test_draws_spread_evenly() -> None:
    """Chi squared over 64 bins of 64,000 draws: mean 63, standard deviation sqrt(126)."""
    rows = np.arange(64_000)
    for seed in range(4):
        for draw in range(3):
            counts = np.bincount(draw_block(seed, rows, draw, np.full(64_000, 64)), minlength=64)
            assert ((counts - 1000) ** 2 / 1000).sum() <= 63 + 6 * 126**0.5


def test_causal_draws_do_not_depend_on_length_or_on_the_cut() -> None:
    mechanism = BigBird(block=4, window_blocks=1, global_blocks=0, random_blocks=3)
    whole = mechanism.clauses(Grid(120, 120, True)).mask()
    for n, m in [(50, 50), (1, 77), (30, 120)]:
        part = mechanism.clauses(Grid(n, m, True)).mask()
        assert torch.equal(part, whole[m - n : m, :m])


def test_million_tokens_are_a_list_of_blocks() -> None:
    million = 1_000_000
    for causal in (False, True):
        layout = BigBird().clauses(Grid(million, million, causal))
        row = 12_345
        i = torch.tensor([[row * 64 + 5]])
        j = torch.arange(million)[None]
        want = BigBird().visible_in(i, j, torch.tensor(million), causal)
        past = j <= (i if causal else million)
        assert torch.equal(layout.contains(i, j) & past, want & past)


def test_queries_far_past_every_key() -> None:
    mechanism = BigBird(block=1, random_blocks=2)
    for causal in (False, True):
        grid = Grid(3, 9, causal, 2**35)
        assert torch.equal(mechanism.clauses(grid).mask(), table(bigbird(1, 3, 1, 2, 0), grid))


# ---- block_sparse and options ----


def test_block_sparse_from_a_file_is_the_object(tmp_path: Path) -> None:
    path = str(tmp_path / "pattern.npz")
    LISTED.save(path)
    stored, given = BlockSparse(layout=path), BlockSparse(layout=LISTED)
    grid = Grid(12, 30, False, 0)
    assert torch.equal(stored.clauses(grid).mask(), given.clauses(grid).mask())
    assert repr(stored) == f"block_sparse(layout={path!r})"
    assert repr(given) == f"block_sparse(layout=<{LISTED.digest}>)"
    assert given == BlockSparse(BlockLayout(LISTED.indptr, LISTED.indices, LISTED.block))
    assert len({given, BlockSparse(LISTED), stored}) == 2
    assert pickle.loads(pickle.dumps(given)) == given
    BlockLayout([0, 1], [0], 3).save(path)
    assert stored != BlockSparse(layout=path)  # what the file holds counts, not only its name
    assert torch.equal(stored.clauses(grid).mask(), given.clauses(grid).mask())


def test_block_sparse_refuses_what_is_no_layout(tmp_path: Path) -> None:
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"not an npz")
    with pytest.raises(InvalidInputError):
        BlockSparse(layout=str(bad))
    for absent in (tmp_path / "absent.npz", tmp_path):
        with pytest.raises(InvalidInputError, match="option layout got"):
            BlockSparse(layout=str(absent))
    for wrong in (3, None, torch.ones(2, 2), bad):
        with pytest.raises(InvalidInputError, match="block_sparse: option layout got"):
            BlockSparse(layout=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        BlockSparse()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("cls", "option", "values"),
    [
        (
            Windowed,
            "window",
            [0, -1, True, 1.5, "4", None, (1,), (1, 2, 3), (-1, 2), [1, 2], 2**40],
        ),
        (Windowed, "sinks", [-1, 1.0, True, None]),
        (Dilated, "window", [0, (1, 2), True]),
        (Dilated, "dilation", [0, -2, 0.5]),
        (Chunked, "chunk", [0, -1, None]),
        (Longformer, "window", [0, (1, -1)]),
        (Longformer, "global_tokens", [-1, True]),
        (Strided, "stride", [0, "8"]),
        (BigBird, "block", [0, -64, 1.0]),
        (BigBird, "window_blocks", [0, -3]),
        (BigBird, "global_blocks", [-1]),
        (BigBird, "random_blocks", [-1, None]),
        (BigBird, "seed", [-1, 2**64, 0.0, False]),
        (TopKBlocks, "block", [0, -1, True]),
        (TopKBlocks, "top", [-1]),
        (TopKBlocks, "first", [-1, 1.0]),
        (TopKBlocks, "local", [-1, None]),
        (VerticalSlash, "verticals", [-1]),
        (VerticalSlash, "slashes", [-1, "1"]),
        (VerticalSlash, "last", [0, -1]),
        (OracleTopK, "keys", [0, -1, True, 2.0]),
    ],
    ids=lambda x: getattr(x, "name", x) if not isinstance(x, list) else "",
)
def test_options_out_of_range_are_refused(
    cls: type[MaskedSoftmax], option: str, values: list[object]
) -> None:
    for value in values:
        with pytest.raises(InvalidInputError) as refused:
            cls(**{option: value})
        message = str(refused.value)
        for part in (cls.name, f"option {option}", repr(value), "expected"):
            assert part in message
        assert len(message) < 600


def test_mechanisms_that_would_see_nothing_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least one block"):
        TopKBlocks(top=0, first=0, local=0)
    with pytest.raises(InvalidInputError, match="at least one line"):
        VerticalSlash(verticals=0, slashes=0)


def test_names_options_and_defaults() -> None:
    want = [
        "full",
        "windowed(window=256, sinks=0)",
        "dilated(window=256, dilation=2)",
        "chunked(chunk=256)",
        "longformer(window=256, global_tokens=1)",
        "strided(stride=64)",
        "bigbird(block=64, window_blocks=3, global_blocks=1, random_blocks=3, seed=0)",
        "topk_blocks(block=64, top=16, first=1, local=1)",
        "vertical_slash(verticals=64, slashes=64, last=64)",
        "oracle_topk(keys=64)",
    ]
    made = [Full, Windowed, Dilated, Chunked, Longformer, Strided, BigBird]
    made += [TopKBlocks, VerticalSlash, OracleTopK]
    assert [repr(cls()) for cls in made] == want
    assert [cls().nature for cls in made] == ["exact"] + ["masked_softmax"] * 9
    assert [cls.name for cls in made if cls.looks_ahead] == ["vertical_slash"]
    assert all(cls.source and cls.__doc__ for cls in [*made, BlockSparse])
