"""Selections in tiles and pair by pair: bits that the future and the unseen cannot change.

Blocks of 4 keys go pair by pair, blocks of 16 and 40 in tiles (see `engines.softmax.choices`).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import sparseattn as sa
from sparseattn.base import MaskedSoftmax
from sparseattn.call import AttentionCall
from sparseattn.engines.softmax import choices, tiles
from sparseattn.testing.budgets import Budgets

# Few enough pairs for float32 gradients to be taken in float64: whether the float32 budget of a
# gradient is met is chance otherwise, as it is for exact attention.
N = 240


@dataclass(frozen=True)
class Scattered(MaskedSoftmax):
    """Three blocks a query from its own past, others for each head: a choice without q and k."""

    name = "scattered"
    block: int = 16
    shift: int = 0
    reverse: bool = False
    twice: bool = False

    def select(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
        row = torch.arange(q.shape[2])[:, None] + call.offset
        head = torch.arange(q.shape[1])[:, None, None]
        own = (row.clamp(0, call.m - 1) // self.block)[None]
        ids = (own - (row + head) % torch.tensor([1, 3, 7])).clamp(min=-1)
        ids = torch.where(ids >= self.shift, ids, -1)
        ids = torch.cat([ids, ids.flip(-1)], dim=-1) if self.twice else ids
        ids = ids.flip(-1) if self.reverse else ids
        return ids.to(torch.int32).expand(q.shape[0], -1, -1, -1).contiguous()


def qkv(dtype: torch.dtype = torch.float32, n: int = N, kv: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, h, n, 24, generator=g).to(dtype) for h in (4, kv, kv)]


def run(mechanism: MaskedSoftmax, x: list[Tensor], **kw: object) -> tuple[Tensor, ...]:
    """Output, lse and gradients."""
    x = [t.clone().requires_grad_() for t in x]
    kw = {"causal": True, "impl": "torch", "return_lse": True, **kw}
    out, lse = sa.attention(*x, mechanism, **kw)
    g = torch.Generator().manual_seed(2)
    seed = torch.randn(out.shape, generator=g).to(out.dtype)
    total = (out * seed).sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum() / 8
    return out.detach(), lse.detach(), *torch.autograd.grad(total, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    "mechanism",
    [
        sa.mechanism("topk_blocks(block=4, top=5)"),
        sa.mechanism("topk_blocks(block=16, top=3)"),
        sa.mechanism("topk_blocks(block=40, top=2, local=0)"),
        Scattered(40),
        Scattered(4, twice=True),
        Scattered(16, twice=True),
    ],
    ids=repr,
)
def test_the_budget(mechanism: MaskedSoftmax, causal: bool, dtype: torch.dtype) -> None:
    holes = torch.rand(2, N, generator=torch.Generator().manual_seed(4)) > 0.2
    holes[0, 64:150] = False
    for kw in ({}, {"key_mask": holes}, {"q_offset": -50}, {"q_offset": 40}):
        q, k, v = (t.requires_grad_() for t in qkv(dtype))
        out, lse = sa.attention(
            q, k, v, mechanism, causal=causal, impl="torch", return_lse=True, **kw
        )
        g = torch.Generator().manual_seed(5)
        seeds = tuple(torch.randn(x.shape, generator=g).to(x.dtype) for x in (out, lse))
        slopes = seeds[1].masked_fill(lse == -torch.inf, 0.0)
        grads = torch.autograd.grad([out, lse], [q, k, v], [seeds[0], slopes])
        call = AttentionCall.make(q, k, v, causal=causal, needs_lse=True, **kw)
        budgets = Budgets(mechanism, q, k, v, call, seeds)
        for verdict in (budgets.out(out), budgets.lse(lse), *budgets.grads(grads)):
            assert verdict.error <= verdict.budget, f"{list(kw)}: {verdict}"


@pytest.mark.parametrize("block", [4, 16, 40])
def test_later_tokens_change_no_earlier_bit(block: int) -> None:
    for mechanism in (Scattered(block), sa.mechanism(f"topk_blocks(block={block}, top=3)")):
        x = qkv()
        before = run(mechanism, x)
        for cut in (1, 63, 64, 170, N - 1):
            later = [t.clone() for t in x]
            for t in later:
                t[:, :, cut:] = t[:, :, cut:].flip(-1) * -3
            after = run(mechanism, later)
            assert torch.equal(before[0][:, :, :cut], after[0][:, :, :cut])
            assert torch.equal(before[1][:, :, :cut], after[1][:, :, :cut])


@pytest.mark.parametrize("block", [4, 16, 40])
def test_keys_that_no_query_sees_are_inert(block: int) -> None:
    """The first blocks are never chosen, holes neither, nor what comes after the last query."""
    mechanism = Scattered(block, shift=2)
    holes = torch.ones(2, N, dtype=torch.bool)
    holes[:, 100:130] = False
    for kw, unseen in (
        ({}, slice(0, 2 * block)),
        ({"key_mask": holes}, slice(100, 130)),
        ({"q_offset": -30}, slice(N - 30, N)),
    ):
        x = qkv()
        before = run(mechanism, x, **kw)
        for value in (torch.nan, torch.inf, 7.0):
            spoilt = [t.clone() for t in x]
            for t in spoilt[1:]:
                t[:, :, unseen] = value
            assert all(
                torch.equal(a, b) for a, b in zip(before, run(mechanism, spoilt, **kw), strict=True)
            )


@pytest.mark.parametrize("block", [4, 16])
def test_a_selection_is_a_set(block: int) -> None:
    """Neither its order nor a block named twice changes anything."""
    want = run(Scattered(block), qkv())
    got = run(Scattered(block, reverse=True), qkv())
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    once, twice = (sa.attention(*qkv(), Scattered(block, twice=x), causal=True) for x in (0, 1))
    eps = torch.finfo(torch.float32).eps
    # The same pairs: only how many slots the sums run over differs.
    assert (once - twice).abs().max() <= 4 * eps * qkv()[2].abs().max()


@pytest.mark.parametrize("block", [4, 16])
def test_bounded_memory_changes_little(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(Scattered(block), [t.double() for t in qkv()])
    monkeypatch.setattr(choices, "_PAIRS_AT_ONCE", 500)
    monkeypatch.setattr(tiles, "_PARTS_ELEMENTS", 9000)
    monkeypatch.setattr(tiles, "_BUFFER_ELEMENTS", 3000)
    cut = run(Scattered(block), [t.double() for t in qkv()])
    eps = torch.finfo(torch.float64).eps
    for a, b in zip(whole, cut, strict=True):
        assert (a - b).abs().max() <= 256 * eps * a.abs().clamp(max=1e300).max()


def test_a_nan_that_is_seen_stays() -> None:
    for block in (4, 16):
        q, k, v = qkv()
        k[:, :, 200] = torch.nan
        out = sa.attention(q, k, v, Scattered(block), causal=True)
        seen = Scattered(block)
        call = AttentionCall.make(q, k, v, causal=True)
        mask = seen.mask(seen.with_selection(q, k, call))[..., 200].expand(2, 4, -1)
        assert bool(mask.any()) and bool(out.isnan().all(-1)[mask].all())
