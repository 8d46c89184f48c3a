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
    "No query spends its choice on blocks of which the masks show it nothing.",
    tuple(case for case in _CASES if case.mask in ("", "left") and not case.documents),
    _foresighted,
    definition=True,
)
def hidden_blocks_are_not_selected(subject: Subject, case: Case) -> None:
    x = case.inputs()
    call = subject.mechanism.with_selection(x.q, x.k, subject.require(x))
    assert call.selection is not None
    block = subject.mechanism.block  # type: ignore[attr-defined]
    place = call.placement()
    last = place.q if case.causal else place.extent - 1
    first_of_block = call.selection.to(torch.int64) * block
    hidden = (call.selection >= 0) & (first_of_block > last[:, None, :, None])
    if bool(hidden.any()):
        b, h, n, s = hidden.nonzero()[0].tolist()
        raise Broken(
            f"batch {b}, head {h}, query {n} selects block {int(call.selection[b, h, n, s])}, of "
            "which it sees no key"
        )


@law(
    "No later token, and no key that the masks hide, changes an earlier query's selection.",
    tuple(case for case in _CASES if case.causal),
    _foresighted,
    definition=True,
)
def selections_see_no_future(subject: Subject, case: Case) -> None:
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
    x = case.inputs()
    same(_choice(subject, x), _choice(subject, case.inputs()), "the selection, the second time")
    flat = x.but(k=torch.zeros_like(x.k))
    used = _used(subject, flat)
    # Keys of 0 make every score tie, to the last bit: no number of a query may break it.
    same(_used(subject, flat.but(q=x.q + 1)), used, "keys used among ties, for other queries")
