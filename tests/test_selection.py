"""Laws of selection: what dynamic mechanisms choose, against loops, and what may not change it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseattn.base import MaskedSoftmax
from sparseattn.call import AttentionCall
from sparseattn_block_sparse import OracleTopK, TopKBlocks, VerticalSlash, ranking

LENGTHS = [1, 63, 65, 100, 257]

MECHANISMS = [
    TopKBlocks(block=16, top=2),
    TopKBlocks(block=5, top=3, first=0, local=0),
    TopKBlocks(block=64, top=1, first=1, local=2),
    TopKBlocks(block=1000),
    VerticalSlash(verticals=5, slashes=4, last=16),
    VerticalSlash(verticals=0, slashes=3, last=1000),
    VerticalSlash(verticals=70, slashes=0),
    OracleTopK(keys=7),
    OracleTopK(keys=1000),
]
CAUSAL = [mechanism for mechanism in MECHANISMS if not mechanism.looks_ahead]
both_ways = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
every = pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)


def inputs(
    n: int, m: int, seed: int, *, batch: int = 2, hq: int = 4, hkv: int = 2, ties: bool = False
) -> tuple[Tensor, Tensor]:
    """q and k; with `ties`, small integers: scores are exact and mostly equal to others."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, hq, n, 8, generator=generator)
    k = torch.randn(batch, hkv, m, 8, generator=generator)
    return (q.round(), k.sign() * (k.abs() > 1)) if ties else (q, k)


def select(mechanism: MaskedSoftmax, q: Tensor, k: Tensor, **options: object) -> Tensor:
    """The selection of a call, int32 `[B, Hq, N, S]`."""
    call = AttentionCall.make(q, k, k, **options)
    chosen = mechanism.with_selection(q, k, call).selection
    assert chosen is not None and chosen.dtype == torch.int32
    return chosen


def rows(ids: Tensor) -> list[list[set[int]]]:
    """The ids of every row as sets, by batch and head together; an id may appear once in a row."""
    out = []
    for head in ids.flatten(0, 1).tolist():
        out.append([])
        for row in head:
            named = [x for x in row if x >= 0]
            assert len(named) == len(set(named))
            out[-1].append(set(named))
    return out


def single(x: float) -> float:
    """A score as it is compared."""
    return float(np.float32(x))


def best(scores: dict[int, float], count: int) -> set[int]:
    """The `count` greatest, the lowest index first among equals."""
    return set(sorted(scores, key=lambda x: (-single(scores[x]), x))[:count])


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def by_loops(
    mechanism: MaskedSoftmax,
    q: list[list[float]],
    k: list[list[float]],
    causal: bool,
    offset: int,
    allowed: list[bool],
) -> list[set[int]]:
    """What each query of one head selects, from the table of definitions, in Python floats."""
    scale, m = len(q[0]) ** -0.5, len(k)

    def visible(i: int) -> list[int]:
        return [j for j in range(m) if allowed[j] and (j <= i or not causal)]

    if isinstance(mechanism, OracleTopK):
        return [
            best({j: scale * dot(row, k[j]) for j in visible(x + offset)}, mechanism.keys)
            for x, row in enumerate(q)
        ]
    if isinstance(mechanism, TopKBlocks):
        size = mechanism.block
        members = {
            b: [j for j in range(b * size, min(b * size + size, m)) if allowed[j]]
            for b in range(-(-m // size))
        }
        members = {b: keys for b, keys in members.items() if keys}

        def score(row: list[float], keys: list[int]) -> float:
            return math.fsum(x * k[j][d] for j in keys for d, x in enumerate(row)) / len(keys)

        out = []
        for x, row in enumerate(q):
            i = x + offset
            taken = {b for b in members if b < mechanism.first and (b * size <= i or not causal)}
            taken |= {b for b in members if i // size - mechanism.local < b <= i // size}
            others = {
                b for b in members if b not in taken and (b * size + size - 1 <= i or not causal)
            }
            out.append(taken | best({b: score(row, members[b]) for b in others}, mechanism.top))
        return out
    assert isinstance(mechanism, VerticalSlash)
    real = [x for x in range(len(q)) if 0 <= x + offset < m] or list(range(len(q)))
    columns: dict[int, float] = {}
    diagonals: dict[int, float] = {}
    for x in real[-mechanism.last :]:
        seen = visible(x + offset)
        scores = {j: scale * dot(q[x], k[j]) for j in seen}
        top = max(scores.values(), default=0.0)
        total = math.fsum(math.exp(s - top) for s in scores.values())
        for j in seen:
            weight = math.exp(scores[j] - top) / total
            columns[j] = columns.get(j, 0.0) + weight
            diagonals[x + offset - j] = diagonals.get(x + offset - j, 0.0) + weight
    lines = best(columns, mechanism.verticals)
    slopes = best(diagonals, mechanism.slashes)
    return [
        {j for j in visible(x + offset) if j in lines or x + offset - j in slopes}
        for x in range(len(q))
    ]


def check_against_loops(
    mechanism: MaskedSoftmax,
    q: Tensor,
    k: Tensor,
    causal: bool,
    offset: int | None = None,
    key_mask: Tensor | None = None,
) -> None:
    got = rows(select(mechanism, q, k, causal=causal, q_offset=offset, key_mask=key_mask))
    groups = q.shape[1] // k.shape[1]
    place = k.shape[2] - q.shape[2] if offset is None else offset
    for b in range(q.shape[0]):
        allowed = [True] * k.shape[2] if key_mask is None else key_mask[b].tolist()
        for h in range(q.shape[1]):
            keys = k[b, h // groups].tolist()
            want = by_loops(mechanism, q[b, h].tolist(), keys, causal, place, allowed)
            assert got[b * q.shape[1] + h] == want


# ---- the definition ----


@both_ways
@every
def test_selection_is_its_definition(mechanism: MaskedSoftmax, causal: bool) -> None:
    for seed, (n, m, offset) in enumerate(
        [(1, 1, None), (9, 9, None), (4, 33, None), (20, 6, None), (7, 18, -4), (5, 21, 30)]
    ):
        q, k = inputs(n, m, seed, batch=1)
        check_against_loops(mechanism, q, k, causal, offset)


@both_ways
@pytest.mark.parametrize("length", LENGTHS)
def test_ragged_lengths(length: int, causal: bool) -> None:
    q, k = inputs(length, length, 3, batch=1, hq=2, hkv=1)
    q = q[:, :, -9:]  # the last rows have the most to choose from
    for mechanism in MECHANISMS[::2]:
        check_against_loops(mechanism, q, k, causal)


@both_ways
@every
def test_ties_go_to_the_lowest_index(mechanism: MaskedSoftmax, causal: bool) -> None:
    for seed, (n, m) in enumerate([(12, 12), (3, 66), (40, 40)]):
        q, k = inputs(n, m, seed, batch=1, hq=2, hkv=1, ties=True)
        check_against_loops(mechanism, q, k, causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("m", [5, 63, 64, 65, 100, 257])
def test_equal_keys_tie_however_the_product_is_computed(m: int, dtype: torch.dtype) -> None:
    """Matrix products give equal columns different last bits; ranks must not see them."""
    q, one = inputs(17, 1, m)
    q, k = q.to(dtype), one.expand(-1, -1, m, -1).to(dtype)
    count = min(4, m)
    assert (select(OracleTopK(keys=4), q, k).sort().values == torch.arange(count)).all()
    blocks = select(TopKBlocks(block=1, top=4, first=0, local=0), q, k)
    assert (blocks.sort().values == torch.arange(count)).all()


@both_ways
@every
def test_holes_padding_and_offsets(mechanism: MaskedSoftmax, causal: bool) -> None:
    """Masked keys, NaN or not, are never selected and enter no mean."""
    q, k = inputs(37, 37, 5, hq=2, hkv=2)
    mask = torch.rand(2, 37, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, 5:26] = False
    mask[:, 0] = mask[:, -1] = True  # positions count from the first allowed key
    k = k.masked_fill(~mask[:, None, :, None], torch.nan)
    check_against_loops(mechanism, q, k, causal, key_mask=mask)


@both_ways
@every
def test_padded_and_packed_runs_select_as_if_alone(mechanism: MaskedSoftmax, causal: bool) -> None:
    lengths = [21, 40, 33]
    q, k = inputs(40, 40, 7, batch=3)
    for side in ("left", "right"):
        mask = torch.zeros(3, 40, dtype=torch.bool)
        for row, length in enumerate(lengths):
            mask[row, slice(0, length) if side == "right" else slice(40 - length, 40)] = True
        padded = select(mechanism, q, k, causal=causal, key_mask=mask)
        for row, length in enumerate(lengths):
            part = slice(0, length) if side == "right" else slice(40 - length, 40)
            one = slice(row, row + 1)
            alone = select(mechanism, q[one, :, part], k[one, :, part], causal=causal)
            assert rows(padded[one, :, part]) == rows(alone)
    q, k = inputs(sum(lengths), sum(lengths), 8, batch=1)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = select(mechanism, q, k, causal=causal, q_segments=ids)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = select(mechanism, q[:, :, part], k[:, :, part], causal=causal)
        assert rows(packed[:, :, part]) == rows(alone)
        start += length


# ---- what may not change a choice ----


@pytest.mark.parametrize("mechanism", CAUSAL, ids=repr)
def test_nothing_later_changes_an_earlier_choice(mechanism: MaskedSoftmax) -> None:
    q, k = inputs(70, 90, 11)
    before = rows(select(mechanism, q, k, causal=True))
    for cut in (1, 15, 16, 47, 69):  # rows from here on, at positions from 20 + cut on
        for value in (3.0, 1e30, torch.nan, torch.inf):
            late_q, late_k = q.clone(), k.clone()
            late_q[:, :, cut:] = late_q[:, :, cut:].flip(-1) * value
            late_k[:, :, 20 + cut :] *= -value
            after = rows(select(mechanism, late_q, late_k, causal=True))
            for old, new in zip(before, after, strict=True):
                assert old[:cut] == new[:cut]
        shorter = rows(select(mechanism, q[:, :, :cut], k[:, :, : 20 + cut], causal=True))
        for old, new in zip(before, shorter, strict=True):
            assert old[:cut] == new


def test_vertical_slash_does_look_ahead() -> None:
    """Why it declares it: the last query decides for all."""
    mechanism = VerticalSlash(verticals=2, slashes=1, last=4)
    q, k = inputs(60, 60, 11)
    later = q.clone()
    later[:, :, -4:] *= -5
    before, after = (rows(select(mechanism, x, k, causal=True)) for x in (q, later))
    assert any(a[:40] != b[:40] for a, b in zip(before, after, strict=True))
    assert mechanism.looks_ahead
    call = AttentionCall.make(q.requires_grad_(), k, k, causal=True, cached=True)
    assert len(mechanism.refusals(call)) == 2


@both_ways
@pytest.mark.parametrize("mechanism", CAUSAL, ids=repr)
def test_cuts_of_the_queries_and_of_memory(
    mechanism: MaskedSoftmax, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = inputs(50, 65, 13)
    whole = select(mechanism, q, k, causal=causal)
    for low, high in [(0, 1), (7, 8), (10, 50)]:
        part = select(mechanism, q[:, :, low:high], k, causal=causal, q_offset=15 + low)
        assert rows(part) == rows(whole[:, :, low:high])
    monkeypatch.setattr(ranking, "_SLAB_ELEMENTS", 1000)
    assert torch.equal(select(mechanism, q, k, causal=causal), whole)


@both_ways
def test_lines_do_not_depend_on_the_slabs(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = inputs(50, 65, 13)
    for mechanism in MECHANISMS[4:7]:
        with monkeypatch.context() as patch:
            whole = select(mechanism, q, k, causal=causal)
            patch.setattr(ranking, "_SLAB_ELEMENTS", 3000)
            assert torch.equal(select(mechanism, q, k, causal=causal), whole)


@both_ways
@every
def test_heads_and_batch_rows_choose_alone(mechanism: MaskedSoftmax, causal: bool) -> None:
    """Grouped heads choose as repeated key heads do, each for itself; batch rows too."""
    q, k = inputs(33, 33, 17)
    grouped = select(mechanism, q, k, causal=causal)
    repeated = select(mechanism, q, k.repeat_interleave(2, 1), causal=causal)
    assert rows(grouped) == rows(repeated)
    for b in range(2):
        for h in range(4):
            kv = slice(h // 2, h // 2 + 1)
            alone = select(mechanism, q[b : b + 1, h : h + 1], k[b : b + 1, kv], causal=causal)
            assert rows(alone)[0] == rows(grouped)[4 * b + h]


@every
def test_precision_and_strides_do_not_matter(mechanism: MaskedSoftmax) -> None:
    q, k = (x.bfloat16() for x in inputs(40, 40, 19))
    want = rows(select(mechanism, q, k, causal=True))
    assert rows(select(mechanism, q.float(), k.float(), causal=True)) == want
    assert rows(select(mechanism, q.double(), k.double(), causal=True)) == want
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    assert rows(select(mechanism, *strided, causal=True)) == want


@every
def test_vmap_and_empty_sizes(mechanism: MaskedSoftmax) -> None:
    q, k = inputs(12, 12, 23)

    def one(q: Tensor, k: Tensor) -> Tensor:
        return mechanism.select(q[None], k[None], AttentionCall.make(q[None], k[None], k[None]))[0]

    mapped = torch.func.vmap(one)(q, k)
    assert rows(mapped) == rows(select(mechanism, q, k))
    for b, h, n, m in [(0, 2, 3, 3), (1, 0, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0)]:
        q, k = torch.zeros(b, h, n, 4), torch.zeros(b, h, m, 4)
        for causal in (False, True):
            ids = mechanism.select(q, k, AttentionCall.make(q, k, k, causal=causal))
            assert ids.shape[:3] == (b, h, n) and ids.dtype == torch.int32
            assert m > 0 or (ids == -1).all()


# ---- scores that are not plain ----


@both_ways
@every
def test_nan_and_infinite_scores(mechanism: MaskedSoftmax, causal: bool) -> None:
    """They crash nothing and select nothing that is masked."""
    q, k = inputs(30, 30, 29)
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(2)) > 0.3
    for value in (torch.nan, torch.inf, -torch.inf, 3e38):
        for hit_q, hit_k in [(True, False), (False, True), (True, True)]:
            bad_q, bad_k = q.clone(), k.clone()
            if hit_q:
                bad_q[:, :, 4::5] = value
            if hit_k:
                bad_k[:, :, 3::7] = value
            call = AttentionCall.make(bad_q, bad_k, bad_k, causal=causal, key_mask=mask)
            call = mechanism.with_selection(bad_q, bad_k, call)
            assert call.selection is not None
            rows(call.selection)
            place = call.placement()
            for b in range(2):
                within = [int(x) for x, ok in zip(place.k[b], mask[b], strict=True) if ok]
                real = {x // mechanism.block for x in within}
                assert set(call.selection[b].flatten().tolist()) <= real | {-1}


def test_a_nan_score_stays_visible() -> None:
    """NaN ranks first: what it would have decided is not replaced by something plausible."""
    q, k = inputs(30, 30, 31)
    k[:, :, 13] = torch.nan
    assert (select(OracleTopK(keys=2), q, k) == 13).any(-1).all()
    blocks = select(TopKBlocks(block=2, top=1, first=0, local=0), q, k)
    assert (blocks == 6).all()
    values = [-0.0, 0.0, torch.nan, -torch.inf, torch.inf, -torch.nan, 1e-45, -1e-45]
    order = [2, 5, 4, 6, 0, 1, 3]
    for count in range(9):
        ranked = ranking.best(torch.tensor(values), torch.tensor([True] * 7 + [False]), count)
        assert sorted(ranked.tolist()) == sorted(order[:count] + [-1] * (count - 7))


def test_both_ways_of_ranking_choose_alike() -> None:
    """The one for plain tensors on the CPU, and the one for traced code and other devices."""
    generator = torch.Generator().manual_seed(3)
    for levels in (1.0, 4.0, 1e6):
        scores = (torch.randn(3, 5, 40, generator=generator) * levels).round()
        scores[0, :, ::7] = torch.nan
        candidates = torch.rand(3, 5, 40, generator=generator) > 0.5
        for count in (1, 7, 25, 40, 60):
            fast = ranking.best(scores, candidates, count)
            slow = torch.func.vmap(lambda s, c: ranking.best(s, c, count))(scores, candidates)  # noqa: B023
            assert torch.equal(fast.sort().values, slow.sort().values)


def test_logits_carry_scale_softcap_and_bias() -> None:
    """The oracle ranks what the softmax sees; a negative scale turns the order round."""
    q, k = inputs(20, 20, 37)
    plain = select(OracleTopK(keys=3), q, k)
    assert rows(select(OracleTopK(keys=3), q, k, softcap=50.0)) == rows(plain)
    turned = select(OracleTopK(keys=17), q, k, scale=-1.0)
    for most, least in zip(rows(plain), rows(turned), strict=True):
        for a, b in zip(most, least, strict=True):
            assert a | b == set(range(20)) and not a & b
    for shape in [(1, 1, 1, 20), (2, 4, 20, 20), (1, 4, 20, 20), (2, 1, 1, 20)]:
        bias = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(5))
        call = AttentionCall.make(q, k, k, bias=bias, causal=True)
        logits = 8**-0.5 * q.double() @ k.repeat_interleave(2, 1).double().mT + bias
        logits = logits.masked_fill(~torch.ones(20, 20).tril().bool(), -torch.inf)
        want = logits.topk(3).indices
        got = OracleTopK(keys=3).with_selection(q, k, call).selection
        for i in range(3, 20):
            assert torch.equal(got[:, :, i].sort().values, want[:, :, i].int().sort().values)
    # Lines are drawn from weights, in which a sink logit takes its share, most from flat rows.
    mechanism = VerticalSlash(verticals=1, slashes=0, last=2)
    q = torch.eye(2)[None, None]
    k = torch.tensor([[3.0, 0.0], [0.0, 8.0], [0.0, 7.0]])[None, None]
    # Column sums 0.91, 0.77, 0.31; with the sink 0.05, 0.67, 0.25.
    assert (select(mechanism, q, k, scale=1.0) == 0).all()
    assert (select(mechanism, q, k, scale=1.0, sink_logits=torch.tensor([6.0])) == 1).all()


@both_ways
def test_oracle_retains_the_greatest_mass(causal: bool) -> None:
    """Its weights under exact attention sum to no less than those of any other choice."""
    q, k = inputs(40, 48, 41)
    call = AttentionCall.make(q, k, k, causal=causal)
    logits = 8**-0.5 * q.double() @ k.repeat_interleave(2, 1).double().mT
    logits = logits.masked_fill(~call.allowed(), -torch.inf)
    mass = torch.softmax(logits, -1)
    generator = torch.Generator().manual_seed(43)
    for keys in (1, 5, 48):
        oracle = OracleTopK(keys=keys)
        mask = oracle.mask(oracle.with_selection(q, k, call))
        assert (mask.sum(-1) == call.allowed().sum(-1).clamp(max=keys)).all()
        retained = (mass * mask).sum(-1)
        # Ranks compare float32 numbers, so the choice may lose as much as one rounding of a logit.
        logit = logits.masked_fill(~call.allowed(), 0.0).abs().amax(-1)
        slack = torch.exp(-2 * torch.finfo(torch.float32).eps * logit)
        for _ in range(20):
            other = torch.rand(mass.shape, generator=generator).topk(keys).indices
            assert (mass.gather(-1, other).sum(-1) * slack <= retained).all()
        assert (mass.topk(keys).values.sum(-1) * slack <= retained).all()


def test_selecting_everything_is_exact_attention() -> None:
    for length in LENGTHS:
        q, k = (x.double() for x in inputs(length, length, 47, batch=1, hq=2, hkv=1))
        call = AttentionCall.make(q, k, k, causal=True)
        for mechanism in (OracleTopK(keys=257), TopKBlocks(block=64, top=5)):
            seen = mechanism.mask(mechanism.with_selection(q, k, call))
            assert torch.equal(seen, call.allowed().expand_as(seen))


def test_memory_stays_bounded() -> None:
    """Nothing of size heads x N x M is held: the largest tensor made is a slab."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    q, k = inputs(3000, 3000, 53, batch=1)
    for mechanism in (OracleTopK(keys=8), TopKBlocks(block=1, top=4), VerticalSlash(last=3000)):
        largest = 0
        with Watch():
            select(mechanism, q, k, causal=True)
        assert 0 < largest <= 8 * ranking._SLAB_ELEMENTS < 4 * 3000 * 3000  # bytes; float64
