"""Laws of structure: what may reach what, and which calls must give the same result."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch

from .. import reference
from ..base import KernelizedLinear, MaskedSoftmax, Mechanism
from ..call import AttentionCall
from ..layout import BlockLayout
from .budgets import largest
from .cases import Case
from .laws import Broken, Subject, has_lse, law, near, same, sees_no_future, with_options


def _static(mechanism: Mechanism) -> bool:
    return not (isinstance(mechanism, MaskedSoftmax) and mechanism.is_dynamic)


def _positionless(mechanism: Mechanism) -> str:
    """Not a position is read: `exact`, or features that shifted positions leave as they are."""
    if mechanism.nature == "exact":
        return ""
    if not isinstance(mechanism, KernelizedLinear):
        return "it reads positions"
    x = torch.linspace(-1, 1, 24).reshape(1, 2, 3, 4)
    call = AttentionCall.make(x, x, x)
    if mechanism.refusals(call):
        return "it is causal only"
    at = torch.arange(3)[None, None]
    shifted = mechanism.feature_map(x, at, call), mechanism.feature_map(x, at + 5, call)
    queries = mechanism.query_map(x, at, call), mechanism.query_map(x, at + 5, call)
    fixed = torch.equal(*shifted) and torch.equal(*queries) and mechanism.decay(call) is None
    return "" if fixed else "it reads positions"


@law(
    "The order of the keys does not matter to what reads no positions.",
    (
        Case(2, 3, seed=1),
        Case(5, 17, batch=2, mask="holes", seed=2),
        Case(33, 65, sink=True, seed=3),
    ),
    _positionless,
)
def keys_may_be_permuted(subject: Subject, case: Case) -> None:
    """Binds `exact`, and kernels that read no positions."""
    if case.sink and "sink_logits" not in subject.mechanism.honours:
        case = case.but(sink=False)
    x = case.inputs()
    order = torch.randperm(case.keys, generator=case.generator())
    changes: dict[str, Any] = {"k": x.k[:, :, order], "v": x.v[:, :, order]}
    if case.mask:
        changes["key_mask"] = x.kw["key_mask"][:, order]
    budget = subject.budgets(case, x).out_budget
    near(subject.out(x), subject.out(x.but(**changes)), budget, "keys permuted")


_BATCHES = (
    Case(3, batch=2, causal=True, seed=1),
    Case(17, 21, batch=3, heads=4, kv_heads=2, causal=True, seed=2),
    Case(33, batch=2, mask="left", causal=True, seed=3),
    Case(65, batch=2, seed=4),
)


@law("A row of the batch is what it is alone, and nothing of another row reaches it.", _BATCHES)
def batches_are_independent(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    out = subject.out(x)
    other = x.clone()
    for tensor in (other.q, other.k, other.v):
        tensor[1:] = tensor[1:].flip(2) * 3 + 1
    same(subject.out(other)[:1], out[:1], "row 0, when the other rows change")
    alone = x.but(q=x.q[:1], k=x.k[:1], v=x.v[:1])
    if case.mask:
        alone = alone.but(key_mask=x.kw["key_mask"][:1])
    near(subject.out(alone), out[:1], subject.budgets(case, x).out_budget, "row 0 alone")


@law(
    "Query head h reads key-value head h // (Hq / Hkv), and nothing of another head reaches it.",
    (
        Case(3, heads=2, causal=True, seed=1),
        Case(5, heads=4, kv_heads=2, causal=True, seed=2),
        Case(33, 40, heads=6, kv_heads=3, causal=True, seed=3),
        Case(65, heads=4, kv_heads=2, seed=4),
    ),
)
def heads_are_independent(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    out = subject.out(x)
    other = x.clone()
    group = case.heads // (case.kv_heads or case.heads)
    other.k[:, 1:] = other.k[:, 1:].flip(2) * 3 + 1
    other.v[:, 1:] = other.v[:, 1:].flip(2) * 3 + 1
    changed = subject.out(other)
    same(changed[:, :group], out[:, :group], "heads of group 0, when the other groups change")
    for head in range(group, case.heads):
        if torch.equal(changed[:, head], out[:, head]):
            raise Broken(f"query head {head} does not change with its own key-value head")
    other.q[:, group:] = other.q[:, group:].flip(2) + 1
    found = subject.out(other)
    same(found[:, :group], out[:, :group], "heads of group 0, when the other queries change too")


@law(
    "Grouped heads give what repeated keys and values give.",
    (
        Case(3, heads=2, kv_heads=1, causal=True, seed=1),
        Case(9, 14, heads=6, kv_heads=2, causal=True, seed=2),
        Case(65, heads=4, kv_heads=2, mask="left", causal=True, batch=2, seed=3),
    ),
    lambda m: "" if _static(m) else "a selection may give the heads of a group one choice",
)
def grouped_heads_are_repeated_heads(subject: Subject, case: Case) -> None:
    """Binds all but what chooses its keys."""
    x = case.inputs()
    group = case.heads // (case.kv_heads or case.heads)
    repeated = x.but(k=x.k.repeat_interleave(group, 1), v=x.v.repeat_interleave(group, 1))
    budget = subject.budgets(case, x).out_budget
    near(subject.out(x), subject.out(repeated), budget, "grouped heads and repeated heads")


@law(
    "Under causal no later token changes one bit of an earlier output.",
    (
        Case(2, causal=True, seed=1),
        Case(5, causal=True, heads=4, kv_heads=2, seed=2),
        Case(17, 25, causal=True, seed=3),
        Case(65, causal=True, batch=2, mask="left", seed=4),
        Case(130, causal=True, seed=5),
        Case(130, causal=True, dtype="bfloat16", seed=6),
    ),
    sees_no_future,
)
def the_future_changes_nothing(subject: Subject, case: Case) -> None:
    """Binds what does not look ahead."""
    x = case.inputs()
    out = subject.out(x)
    past = case.keys - case.n
    for cut in sorted({1, case.n // 2, case.n - 1} - {0}):
        later = x.clone()
        # Larger than anything before: a maximum or a pooled score that looked ahead would show.
        later.q[:, :, cut:] = later.q[:, :, cut:].flip(2) * 5 + 3
        later.k[:, :, past + cut :] = later.k[:, :, past + cut :].flip(2) * 5 + 3
        later.v[:, :, past + cut :] = later.v[:, :, past + cut :] * 50 - 7
        found = subject.out(later)
        same(found[:, :, :cut], out[:, :, :cut], f"outputs before query {cut}")


@law(
    "The output is linear in the values.",
    (
        Case(3, causal=True, seed=1),
        Case(17, 20, heads=4, kv_heads=2, seed=2),
        Case(65, causal=True),
    ),
)
def values_enter_linearly(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    second = x.v.flip(2) * 0.5 - 1
    joined = x.but(v=x.v * 2 - second * 0.5)
    budgets = [
        subject.budgets(case, x).out_budget * 2,
        subject.budgets(case, x.but(v=second), tag="second").out_budget * 0.5,
        subject.budgets(case, joined, tag="joined").out_budget,
    ]
    parts = subject.out(x) * 2 - subject.out(x.but(v=second)) * 0.5
    near(subject.out(joined), parts, sum(budgets), "out of 2 v - w / 2")


@law(
    "Cutting the queries into pieces, each placed by q_offset, changes nothing.",
    (
        Case(2, causal=True, seed=1),
        Case(5, 9, causal=True, seed=2),
        Case(17, 12, seed=3),
        Case(65, causal=True, heads=4, kv_heads=2, seed=4),
        Case(33, 40, batch=2, mask="left", causal=True, seed=5),
        Case(100, 130, seed=6),
    ),
    sees_no_future,
)
def queries_may_be_cut(subject: Subject, case: Case) -> None:
    """Binds what does not look ahead."""
    x = case.inputs()
    out = subject.out(x)
    budget = subject.budgets(case, x).out_budget
    ends = sorted({0, case.n // 3, case.n // 2 + 1, case.n})
    for start, stop in itertools.pairwise(ends):
        piece = x.but(q=x.q[:, :, start:stop], q_offset=case.keys - case.n + start)
        near(subject.out(piece), out[:, :, start:stop], budget, f"queries {start} to {stop - 1}")


_EVERYTHING = (
    Case(5, causal=True, seed=1),
    Case(17, 23, seed=2),
    Case(65, causal=True, heads=4, kv_heads=2, seed=3),
    Case(40, 65, seed=4),
)


def _widened(mechanism: Any, options: dict[str, Any]) -> Mechanism | None:
    own = {f.name: getattr(mechanism, f.name) for f in dataclasses.fields(mechanism)}
    changes = {word: value for word, value in options.items() if word in own}
    if not changes:
        return None
    if "dilation" in own:
        changes["dilation"] = 1
    return with_options(mechanism, changes)


def _expect_full(subject: Subject, case: Case, changed: Mechanism) -> None:
    wide = Subject(changed, subject.impl)
    x = case.inputs()
    out = wide.out(x)
    budget = wide.budgets(case, x).out_budget
    exact, lse = reference.exact(x.q, x.k, x.v, subject.call(x))
    near(out.to(torch.float64), exact, budget, f"{changed!r} against exact attention")
    found = wide.both(x)[1]
    if found is not None:
        near(found, lse, wide.budgets(case, x).lse(found).budget, f"lse of {changed!r}")


def _window(mechanism: Mechanism) -> Mechanism | None:
    fits = isinstance(mechanism, MaskedSoftmax) and _static(mechanism)
    return _widened(mechanism, {"window": 1000}) if fits else None


@law(
    "A window of at least all keys is exact attention.",
    _EVERYTHING,
    lambda m: "" if _window(m) is not None else "it has no option `window`",
)
def a_window_of_all_keys_is_full(subject: Subject, case: Case) -> None:
    """Binds static patterns with an option `window`."""
    changed = _window(subject.mechanism)
    assert changed is not None
    _expect_full(subject, case, changed)


def _all_blocks(mechanism: Mechanism) -> Mechanism | None:
    if not isinstance(mechanism, MaskedSoftmax):
        return None
    dense = torch.ones(30, 30, dtype=torch.bool)
    counts = ("top", "keys", "verticals", "chunk", "window_blocks", "global_blocks")
    options: dict[str, Any] = dict.fromkeys(counts, 1000)
    if isinstance(getattr(mechanism, "layout", None), BlockLayout):
        options["layout"] = BlockLayout.from_mask(dense, 4)
    return _widened(mechanism, options)


@law(
    "A pattern of all blocks, or a choice of as many keys as there are, is exact attention.",
    _EVERYTHING,
    lambda m: "" if _all_blocks(m) is not None else "it has no option that counts blocks or keys",
)
def all_blocks_are_full(subject: Subject, case: Case) -> None:
    """Binds `masked_softmax` with an option that counts blocks or keys."""
    changed = _all_blocks(subject.mechanism)
    assert changed is not None
    if not case.causal and not _static(changed):
        return  # a choice among past blocks alone is a mechanism too
    _expect_full(subject, case, changed)


def _merges(mechanism: Mechanism) -> str:
    if has_lse(mechanism):
        return has_lse(mechanism)
    if not _static(mechanism):
        return "its pattern depends on which keys there are"
    return ""


@law(
    "Two results over disjoint sets of keys, merged by their lse, are the result over both.",
    (
        Case(3, 5, seed=1),
        Case(9, causal=True, heads=4, kv_heads=2, seed=2),
        Case(33, 47, batch=2, causal=True, seed=3),
        Case(65, seed=4),
    ),
    _merges,
)
def results_merge_by_lse(subject: Subject, case: Case) -> None:
    """Binds static patterns of softmax."""
    x = case.inputs()
    # The first and the last key stay in both sets, so that positions do; their logits are so low
    # that their weight is 0 beside any other key.
    x.q[..., 0] = 4.0
    for end in (0, -1):
        x.k[:, :, end] = 0.0
        x.k[:, :, end, 0] = -1e4
    at = torch.arange(case.keys)[None].expand(case.batch, -1)
    ends = (at == 0) | (at == case.keys - 1)
    first = at % 3 == 1
    parts = [subject.both(x.but(key_mask=mask | ends)) for mask in (first, ~first)]
    out, lse = subject.both(x)
    assert lse is not None and parts[0][1] is not None and parts[1][1] is not None
    wide = [(o.to(torch.float64), s.to(torch.float64)) for o, s in parts]  # type: ignore[union-attr]
    total = torch.logaddexp(wide[0][1], wide[1][1])
    merged = torch.zeros_like(wide[0][0])
    for o, s in wide:
        merged = merged + o * torch.exp(s - total).nan_to_num(0.0)[..., None]
    # Rows that see only the two ends count them twice.
    rows = lse > -1e3
    budgets = subject.budgets(case, x, tag="merge")
    near(merged[rows], out[rows].to(torch.float64), 3 * budgets.out_budget, "out of merged sets")
    budget = budgets.lse(lse).budget + largest(lse[rows]) * torch.finfo(lse.dtype).eps
    near(total[rows], lse[rows].to(torch.float64), budget, "lse of merged sets")
