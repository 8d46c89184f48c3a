"""Selections on Triton's interpreter: `python triton_selections.py budgets|tables|small|conduct`.

Prints JSON: the verdicts of a group of calls, or of `conduct` what each rule came to. Kernels
compute in the dtype that is given: the operator's twice as many digits for calls of few pairs would
leave those of float32 out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from test_softmax_choices import Scattered
from torch import Tensor

import sparseattn as sa
from sparseattn.call import AttentionCall
from sparseattn.engines import op
from sparseattn.engines.softmax.triton import selected_config
from sparseattn.testing.budgets import Budgets

KERNEL = "softmax:triton"


def qkv(
    n: int, m: int, heads: int, kv: int, width: int, dtype: torch.dtype, values: int = 0
) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = ((heads, n, width), (kv, m, width), (kv, m, values or width))
    return [torch.randn(2, *shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


def verdicts(
    mechanism: sa.Mechanism | str,
    x: list[Tensor],
    digits: bool = False,
    impl: str = "triton",
    **kw: Any,
) -> Iterator[tuple[str, float, float]]:
    """The error and the budget of out, lse and each gradient; with sink logits that of theirs too.

    Args:
        digits: as the operator has it, float32 in float64 where pairs are few.
    """
    before = dict(op.FEW)
    if not digits:
        op.FEW.clear()
    made = sa.mechanism(mechanism) if isinstance(mechanism, str) else mechanism
    out, lse = sa.attention(*x, made, impl=impl, return_lse=True, **kw)
    g = torch.Generator().manual_seed(5)
    seeds = tuple(torch.randn(y.shape, generator=g).to(y.dtype) for y in (out, lse))
    slopes = seeds[1].masked_fill(lse == -torch.inf, 0.0)
    given = [*x, *(kw[word] for word in ("sink_logits",) if word in kw)]
    grads = torch.autograd.grad([out, lse], given, [seeds[0], slopes])
    op.FEW.update(before)
    budgets = Budgets(made, *x, AttentionCall.make(*x, needs_lse=True, **kw), seeds)
    found = (budgets.out(out), budgets.lse(lse), *budgets.grads(grads, nearby=True))
    for word, one in zip(("out", "lse", "dq", "dk", "dv", "dsink"), found, strict=False):
        yield word, one.error, one.budget


def holes(n: int) -> Tensor:
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(4)) > 0.3
    mask[0, :7] = False  # and the first queries of a causal row see nothing
    return mask


def budgets() -> dict[str, Any]:
    """Wide and narrow blocks, by all that a call may bring."""
    single, half, bfloat = torch.float32, torch.float16, torch.bfloat16
    packed = torch.tensor([[0] * 11 + [1] * 20 + [2] * 14, [3] * 40 + [4] * 5])
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0]).requires_grad_()
    # Query heads, heads of keys and values, and further arguments.
    calls: dict[str, tuple[Any, int, int, torch.dtype, dict[str, Any]]] = {
        "wide": (Scattered(16), 4, 2, single, {"causal": True}),
        "wide, all": (Scattered(48, twice=True), 2, 2, single, {}),
        "wide, odd": (Scattered(21, twice=True), 6, 2, single, {"causal": True}),
        "wide, longer than a step": (Scattered(100), 3, 3, single, {"causal": True}),
        "narrow": (Scattered(5, twice=True), 3, 1, single, {"causal": True}),
        "single keys": (Scattered(1), 4, 2, single, {"causal": True}),
        "holes": (Scattered(16), 4, 2, single, {"causal": True, "key_mask": holes(45)}),
        "narrow, holes": (Scattered(4), 2, 1, single, {"causal": True, "key_mask": holes(45)}),
        "packed": (Scattered(16), 4, 2, single, {"causal": True, "q_segments": packed}),
        "narrow, packed": (
            *(Scattered(4, twice=True), 2, 1, single),
            {"causal": True, "q_segments": packed, "key_mask": holes(45)},
        ),
        "softcap": (Scattered(16), 4, 2, single, {"causal": True, "softcap": 2.0}),
        "sink logits": (Scattered(16), 4, 2, single, {"causal": True, "sink_logits": sink}),
        "before the keys": (Scattered(16), 4, 1, single, {"causal": True, "q_offset": -9}),
        "after the keys": (Scattered(16), 17, 1, single, {"causal": True, "q_offset": 20}),
        "chosen by scores": (
            *("topk_blocks(block=16, top=1)", 4, 2, single),
            {"causal": True},
        ),
        "float16": (Scattered(16), 4, 2, half, {"causal": True}),
        "bfloat16": (Scattered(16), 4, 2, bfloat, {"causal": True}),
        "narrow, bfloat16": (Scattered(4), 2, 1, bfloat, {"causal": True}),
    }
    found = {
        name: list(verdicts(mechanism, qkv(45, 45, heads, kv, 24, dtype, 40), **kw))
        for name, (mechanism, heads, kv, dtype, kw) in calls.items()
    }
    x = qkv(9, 45, 4, 2, 16, single)
    found["few queries"] = list(verdicts(Scattered(16), x, causal=True))
    found["float64"] = list(verdicts(Scattered(16), x, digits=True, causal=True))
    return found


def tables() -> dict[str, Any]:
    """The tiles of every entry of the tables of tiles, forward and backward."""
    entries = {
        tuple((one.rows, one.keys) for one in entry): entry
        for table in (*selected_config._HALF.values(), selected_config._SINGLE)
        for entry in table.values()
    }
    entries |= {
        tuple((one.rows, one.keys) for one in entry): entry
        for entry in selected_config._DOUBLE.values()
    }
    found = {}
    for sizes, entry in entries.items():
        selected_config._INTERPRETED = entry
        x = qkv(40, 70, 2, 1, 16, torch.float32)
        for block in (64, 3):
            found[f"{sizes}, block={block}"] = list(verdicts(Scattered(block), x, causal=True))
    return found


def small() -> dict[str, Any]:
    """What a planted bug must not pass: a block of each kind, repeats, an own choice a head."""
    x = qkv(37, 40, 6, 2, 16, torch.float32)
    return {
        str(block): list(verdicts(Scattered(block, twice=True), x, causal=True))
        for block in (5, 16)
    }


def attend(mechanism: sa.Mechanism, x: list[Tensor], **kw: Any) -> list[Tensor]:
    """Out, lse and gradients."""
    x = [t.detach().clone().requires_grad_() for t in x]
    out, lse = sa.attention(*x, mechanism, causal=True, impl="triton", return_lse=True, **kw)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    total = (out * seed).sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum() / 8
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, x)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def the_future_changes_no_bit(block: int) -> bool:
    x = qkv(45, 45, 4, 2, 16, torch.float32)
    before = attend(Scattered(block), x)[:2]
    for cut in (1, 16, 33):
        later = [t.detach().clone() for t in x]
        for t in later:
            t[:, :, cut:] = t[:, :, cut:].flip(-1) * -3
        after = attend(Scattered(block), later)[:2]
        if not same([t[:, :, :cut] for t in before], [t[:, :, :cut] for t in after]):
            return False
    return True


def unseen_keys_are_inert(block: int) -> bool:
    """The first block, which is not chosen, holes, and what comes after the last query."""
    mask = torch.ones(2, 45, dtype=torch.bool)
    mask[:, 36:41] = False
    calls: list[tuple[dict[str, Any], slice]] = [
        ({}, slice(0, block)),
        ({"key_mask": mask}, slice(36, 41)),
        ({"q_offset": -10}, slice(35, 45)),
    ]
    for kw, unseen in calls:
        x = qkv(45, 45, 4, 2, 16, torch.float32)
        before = attend(Scattered(block, shift=1), x, **kw)
        spoilt = [t.detach().clone() for t in x]
        for t in spoilt[1:]:
            t[:, :, unseen] = torch.nan
        if not same(before, attend(Scattered(block, shift=1), spoilt, **kw)):
            return False
    return True


def a_selection_is_a_set(block: int) -> bool:
    """Neither its order nor a block named twice changes a bit."""
    x = qkv(45, 45, 4, 2, 16, torch.float32)
    want = attend(Scattered(block), x)
    return same(want, attend(Scattered(block, reverse=True), x)) and same(
        want, attend(Scattered(block, twice=True), x)
    )


def a_nan_stays_where_it_is_seen(block: int) -> bool:
    """In a query it stays in its row; in a key it reaches every row that sees the key."""
    x = [t.detach().clone() for t in qkv(45, 45, 4, 2, 16, torch.float32)]
    before = attend(Scattered(block), x)
    bad = [t.clone() for t in x]
    bad[0][:, 1, 20] = torch.nan
    after = attend(Scattered(block), bad)
    own = torch.zeros(2, 4, 45, dtype=torch.bool)
    own[:, 1, 20] = True
    if not (after[0][own].isnan().all() and torch.equal(after[0][~own], before[0][~own])):
        return False
    call = AttentionCall.make(*x, causal=True)
    call = Scattered(block).with_selection(x[0], x[1], call)
    rows = Scattered(block).mask(call)[..., 30].expand(2, 4, -1)
    bad = [t.clone() for t in x]
    bad[2][:, :, 30] = torch.nan
    return bool(attend(Scattered(block), bad)[0][rows].isnan().any(-1).all())


def empty_rows_pass_nothing_on(block: int) -> bool:
    """Whatever their gradients hold: rows before every key, and rows whose blocks are holes."""
    mask = torch.ones(2, 45, dtype=torch.bool)
    mask[1, 10:30] = False
    for kw in ({"q_offset": -8}, {"key_mask": mask}):
        x = qkv(45, 45, 4, 2, 16, torch.float32)
        out, lse = sa.attention(
            *x, Scattered(block, shift=1), causal=True, impl="triton", return_lse=True, **kw
        )
        empty = lse == -torch.inf
        if not empty.any() or out[empty].any():
            return False
        grads = []
        for poison in (0.0, torch.nan):
            seeds = [
                torch.ones_like(y).masked_fill(e, poison)
                for y, e in ((out, empty[..., None]), (lse, empty))
            ]
            grads.append(torch.autograd.grad([out, lse], x, seeds, retain_graph=True))
        if not same(*map(list, grads)) or grads[0][0][empty].any():
            return False
    return True


def ids_out_of_range_name_no_key(block: int) -> bool:
    """The kernels' own rule: no mechanism may return such ids."""
    x = [t.detach() for t in qkv(20, 40, 4, 2, 16, torch.float32)]
    mechanism = Scattered(block)
    call = mechanism.with_selection(x[0], x[1], AttentionCall.make(*x, causal=True))
    assert call.selection is not None
    strange = torch.tensor([-1, -7, 40, 2**31 - 1, -(2**31)], dtype=torch.int32)
    wider = torch.cat([call.selection, strange.expand(*call.selection.shape[:3], -1)], -1)
    kernel = op.KERNELS[KERNEL]
    out, lse = kernel.forward(mechanism, *x, call)
    also, too = kernel.forward(mechanism, *x, call.replace(selection=wider))
    nothing = call.replace(selection=strange.expand(2, 4, 20, -1))
    zeros, none = kernel.forward(mechanism, *x, nothing)
    assert lse is not None and too is not None and none is not None
    return same([out, lse], [also, too]) and not zeros.any() and bool((none == -torch.inf).all())


def lists_are_made_in_parts(block: int) -> bool:
    """What is held at once changes no bit."""
    from sparseattn.engines.softmax import selected_in_triton

    x = qkv(45, 45, 4, 2, 16, torch.float32)
    whole = attend(Scattered(block, twice=True), x)
    before, selected_in_triton._CHOICES_AT_ONCE = selected_in_triton._CHOICES_AT_ONCE, 300
    parts = attend(Scattered(block, twice=True), x)
    selected_in_triton._CHOICES_AT_ONCE = before
    return same(whole, parts)


def conduct() -> dict[str, bool]:
    rules: list[Callable[[int], bool]] = [
        *(the_future_changes_no_bit, unseen_keys_are_inert, a_selection_is_a_set),
        *(a_nan_stays_where_it_is_seen, empty_rows_pass_nothing_on),
        *(ids_out_of_range_name_no_key, lists_are_made_in_parts),
    ]
    return {f"{rule.__name__}, {block}": rule(block) for rule in rules for block in (4, 16)}


if __name__ == "__main__":
    what = {"budgets": budgets, "tables": tables, "small": small, "conduct": conduct}
    print(json.dumps(what[sys.argv[1]]()))
