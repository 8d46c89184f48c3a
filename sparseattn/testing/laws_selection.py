"""Laws of dynamic mechanisms: a choice is made once, of keys that may be seen, without a future."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import MaskedSoftmax, Mechanism
from .cases import Case, Inputs
from .laws import Broken, Subject, law, same

_CASES = (
    Case(2, causal=True, seed=1),
    Case(9, 14, heads=4, kv_heads=2, causal=True, seed=2),
    Case(17, batch=2, mask="left", causal=True, seed=3),
    Case(17, batch=2, mask="holes", causal=True, seed=4),
    Case(20, documents=((12, 12), (8, 8)), causal=True, seed=5),
    Case(65, seed=6),
    Case(65, causal=True, dtype="bfloat16", seed=7),
    Case(130, causal=True, seed=8),
)


_HOLED = Case(24, batch=2, mask="within", causal=True, heads=4, kv_heads=2, seed=10)


def _dynamic(mechanism: Mechanism) -> str:
    fits = isinstance(mechanism, MaskedSoftmax) and mechanism.is_dynamic
    return "" if fits else "its pattern does not depend on q and k"


def _foresighted(mechanism: Mechanism) -> str:
    return _dynamic(mechanism) or ("it looks ahead, as it says" if mechanism.looks_ahead else "")


def _choice(subject: Subject, x: Inputs) -> Tensor:
    call = subject.mechanism.with_selection(x.q, x.k, subject.require(x))
    if call.selection is None:
        raise Broken("with_selection() made no selection")
    return call.selection


def _used(subject: Subject, x: Inputs) -> Tensor:
    """The pairs that the choice uses: bool `[B, Hq, N, M]`."""
    call = subject.mechanism.with_selection(x.q, x.k, subject.require(x))
    return subject.mechanism.mask(call).expand(call.batch, call.q_heads, call.n, call.m)


@law(
    "A selection is int32 ids of existing blocks for each query and head, each once, padded by -1.",
    _CASES,
    _dynamic,
    definition=True,
)
def selections_are_block_ids(subject: Subject, case: Case) -> None:
    """Binds what chooses its keys."""
    x = case.inputs()
    ids = _choice(subject, x)
    if ids.dtype != torch.int32 or tuple(ids.shape[:3]) != tuple(x.q.shape[:3]):
        raise Broken(f"the selection is {ids.dtype} {list(ids.shape)}")
    block = subject.mechanism.block  # type: ignore[attr-defined]
    blocks = -(-case.keys // block)
    if ids.numel() and not (int(ids.min()) >= -1 and int(ids.max()) < blocks):
        raise Broken(f"ids run from {int(ids.min())} to {int(ids.max())}, of {blocks} blocks")
    ordered = ids.sort(-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise Broken("a block is selected twice by one query")


@law(
    "No query selects a block that is masked as a whole or that lies in its future.",
    (*_CASES, Case(24, batch=2, mask="within", seed=9), _HOLED),
    _foresighted,
    definition=True,
)
def hidden_blocks_are_not_selected(subject: Subject, case: Case) -> None:
    """Binds what chooses its keys and does not look ahead."""
    x = case.inputs()
    call = subject.mechanism.with_selection(x.q, x.k, subject.require(x))
    assert call.selection is not None
    block = subject.mechanism.block  # type: ignore[attr-defined]
    chosen = _by_block(call.selection, -(-case.keys // block))
    place = call.placement()
    # In a block that the query's own position cuts, what is visible may be masked: that is legal.
    shown = call.replace(causal=False).allowed()[:, 0].expand(case.batch, case.n, -1)
    index = (place.k.clamp(min=0) // block)[:, None].expand(shown.shape)
    alive = torch.zeros(case.batch, case.n, chosen.shape[-1], dtype=torch.int64)
    alive = alive.scatter_add(2, index, shown.to(torch.int64)) > 0
    if case.causal:
        alive &= torch.arange(chosen.shape[-1]) * block <= place.q[..., None]
    hidden = chosen & ~alive[:, None]
    if bool(hidden.any()):
        b, h, n, at = hidden.nonzero()[0].tolist()
        raise Broken(f"batch {b}, head {h}, query {n} selects block {at}, which is hidden from it")


def _by_block(ids: Tensor, blocks: int) -> Tensor:
    """Which blocks a selection holds: bool `[B, Hq, N, blocks]`."""
    held = torch.zeros(*ids.shape[:3], blocks + 1, dtype=torch.bool)
    return held.scatter(3, torch.where(ids < 0, blocks, ids).to(torch.int64), True)[..., :blocks]


@law(
    "No later token, and no key that the masks hide, changes an earlier query's selection.",
    tuple(case for case in _CASES if case.causal),
    _foresighted,
    definition=True,
)
def selections_see_no_future(subject: Subject, case: Case) -> None:
    """Binds what chooses its keys and does not look ahead."""
    x = case.inputs()
    used = _used(subject, x)
    past = case.keys - case.n
    for cut in sorted({1, case.n // 2, case.n - 1} - {0}):
        later = x.clone()
        later.q[:, :, cut:] = later.q[:, :, cut:].flip(2) * 5 + 3
        later.k[:, :, past + cut :] = later.k[:, :, past + cut :].flip(2) * 5 + 3
        same(_used(subject, later)[:, :, :cut], used[:, :, :cut], f"keys used before query {cut}")
    if case.mask:
        hidden = ~x.kw["key_mask"][:, None, :, None]
        loud = x.but(k=x.k.masked_fill(hidden, 100.0))
        same(_used(subject, loud), used, "keys used, with great numbers in masked keys")


@law(
    "The same inputs give the same selection; equal keys give it in one order.",
    _CASES,
    _dynamic,
    definition=True,
)
def selections_are_repeatable(subject: Subject, case: Case) -> None:
    """Binds what chooses its keys."""
    x = case.inputs()
    same(_choice(subject, x), _choice(subject, case.inputs()), "the selection, the second time")
    flat = x.but(k=torch.zeros_like(x.k))
    used = _used(subject, flat)
    # Keys of 0 make every score tie, to the last bit: no number of a query may break it.
    same(_used(subject, flat.but(q=x.q + 1)), used, "keys used among ties, for other queries")


@law(
    "Among equal scores the lowest index is chosen first.",
    (
        Case(12, causal=True, heads=1, seed=1),
        Case(12, 14, heads=1, seed=2),
        Case(33, causal=True, heads=2, kv_heads=1, seed=3),
    ),
    _foresighted,
    definition=True,
)
def ties_go_to_the_lowest_index(subject: Subject, case: Case) -> None:
    """Binds what chooses its keys and does not look ahead.

    Nothing says which blocks a mechanism scores, so each is asked: with all keys equal, a block is
    scored if a hair less makes it lose its place, or a hair more wins it one.
    """
    x = case.inputs()
    subject.require(x)
    block = subject.mechanism.block  # type: ignore[attr-defined]
    blocks = -(-case.keys // block)
    x = x.but(q=torch.ones_like(x.q), k=torch.ones_like(x.k))

    def chosen(at: int, factor: float) -> Tensor:
        k = x.k.clone()
        k[:, :, at * block : (at + 1) * block] *= factor
        return _by_block(_choice(subject, x.but(k=k)), blocks)

    tied = chosen(0, 1.0)
    more = torch.stack([chosen(at, 1 + _HAIR)[..., at] for at in range(blocks)], -1)
    less = torch.stack([chosen(at, 1 - _HAIR)[..., at] for at in range(blocks)], -1)
    loser, winner = more & ~tied, tied & ~less
    # The first block that could have been chosen, and was not, before one that was by its index.
    passed_over = loser & (winner.flip(-1).cumsum(-1).flip(-1) > 0)
    if bool(passed_over.any()):
        b, h, n, low = passed_over.nonzero()[0].tolist()
        high = low + int(winner[b, h, n, low:].nonzero()[0])
        raise Broken(
            f"query {n}, head {h}: among equal keys block {high} is chosen and block {low} is not"
        )


_HAIR = 2.0**-10  # of a score of about 1: more than float32 rounds, less than any preference
