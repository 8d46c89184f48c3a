"""Laws of masks, positions and arguments: what is invisible is inert, what is given counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import MaskedSoftmax
from ..errors import InvalidInputError
from .budgets import largest
from .cases import Case, Inputs
from .laws import Broken, Refused, Subject, has_lse, law, near, same, takes_gradients

_PADDED = (
    Case(3, batch=2, mask="left", causal=True, seed=1),
    Case(6, batch=2, mask="right", causal=True, seed=2),
    Case(7, batch=3, mask="left", seed=3),
    Case(9, batch=3, mask="right", seed=4),
    Case(12, 17, batch=2, mask="left", causal=True, heads=4, kv_heads=2, seed=5),
    Case(65, batch=2, mask="left", causal=True, seed=6),
    Case(65, batch=2, mask="right", causal=True, seed=7),
)


@law("A padded row of a batch is what the row is alone, padded left or right.", _PADDED)
def padding_is_invisible(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    if subject.mechanism.looks_ahead and case.mask == "right":
        return  # its last queries are those of the padding
    x = case.inputs()
    out = subject.out(x)
    budget = subject.budgets(case, x).out_budget
    for row, mask in enumerate(x.kw["key_mask"]):
        keys = mask.nonzero()[:, 0]
        first, count = int(keys[0]), len(keys)
        # With as many queries as keys, a query's place in the row is that of its own key.
        both = case.n == case.keys
        queries = slice(first, first + count) if both else slice(None)
        one = slice(row, row + 1)
        alone = x.but(
            q=x.q[one, :, queries],
            k=x.k[one, :, first : first + count],
            v=x.v[one, :, first : first + count],
            key_mask=None,
        )
        near(subject.out(alone), out[one, :, queries], budget, f"row {row} alone")


_PACKED = (
    Case(3, documents=((1, 1), (2, 2)), causal=True, seed=1),
    Case(8, documents=((3, 3), (1, 1), (4, 4)), causal=True, seed=2),
    Case(9, 12, documents=((2, 5), (4, 4), (3, 3)), batch=2, seed=3),
    Case(9, 6, documents=((5, 3), (4, 3)), causal=True, seed=4),
    Case(65, documents=((40, 40), (20, 20), (5, 5)), heads=4, kv_heads=2, causal=True, seed=5),
    Case(65, documents=((17, 17), (48, 48)), seed=6),
)


@law("A packed run is what its documents are apart.", _PACKED)
def packing_is_invisible(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    out = subject.out(x)
    budget = subject.budgets(case, x).out_budget
    q0 = k0 = 0
    for at, (n, m) in enumerate(case.documents):
        apart = x.but(
            q=x.q[:, :, q0 : q0 + n],
            k=x.k[:, :, k0 : k0 + m],
            v=x.v[:, :, k0 : k0 + m],
            q_segments=None,
            kv_segments=None,
        )
        near(subject.out(apart), out[:, :, q0 : q0 + n], budget, f"document {at} apart")
        q0, k0 = q0 + n, k0 + m


_EMPTY = (
    Case(3, 2, causal=True, seed=1),
    Case(4, batch=2, mask="nothing", seed=2),
    Case(9, 5, causal=True, heads=4, kv_heads=2, seed=3),
    Case(8, batch=2, offset=-3, causal=True, seed=4),
    Case(33, 65, batch=2, mask="nothing", causal=True, seed=5),
)


@law(
    "A query that sees no key has output 0, gradients 0 and lse -inf, whatever it holds.",
    _EMPTY,
)
def empty_rows_are_zero(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    call = subject.require(x)
    blind = ~call.allowed().any(-1).expand(case.batch, case.heads, case.n)
    for poison in (0.0, float("nan")):
        x.q = x.q.masked_fill(blind[..., None], poison) if poison != 0 else x.q
        out, lse = subject.both(x)
        if not bool((out[blind] == 0).all()):
            raise Broken(
                f"a query that sees no key has output {float(out[blind].flatten()[0]):.3g}"
            )
        if lse is not None and not bool((lse[blind] == -torch.inf).all()):
            raise Broken(f"a query that sees no key has lse {float(lse[blind][0]):.3g}")
        if subject.mechanism.looks_ahead:
            continue
        _, _, grads = subject.with_grads(x, subject.seeds(case, x))
        if not bool((grads["q"][blind] == 0).all()):
            raise Broken("a query that sees no key has a gradient")
        for word, grad in grads.items():
            if not bool(grad.isfinite().all()):
                raise Broken(f"the gradient of {word} is not finite where a row sees no key")


_INERT = (
    Case(3, batch=2, mask="tail", seed=1),
    Case(4, 6, causal=True, offset=0, seed=2),
    Case(7, batch=2, mask="left", causal=True, seed=3),
    Case(9, batch=2, mask="holes", causal=True, heads=4, kv_heads=2, seed=4),
    Case(5, 40, seed=5),
    Case(20, 9, documents=((12, 4), (8, 5)), mask="tail", causal=True, seed=6),
    Case(33, 65, batch=2, mask="right", causal=True, offset="tensor", seed=7),
    Case(65, 100, batch=2, mask="tail", causal=True, offset=35, dtype="bfloat16", seed=8),
)


def _unseen(subject: Subject, x: Inputs) -> Tensor:
    """Keys that no query sees: bool `[B, Hkv, M]`."""
    call = subject.require(x)
    mechanism = subject.mechanism
    # A dynamic mechanism's scoring sees every key that the masks allow.
    static = isinstance(mechanism, MaskedSoftmax) and not mechanism.is_dynamic
    mask = mechanism.mask(call) if static else call.allowed()
    return ~mask.any(2).any(1)[:, None].expand(call.batch, call.kv_heads, call.m)


@law(
    "NaN and inf in keys and values that no query sees change no bit, of outputs and of gradients.",
    _INERT,
)
def unseen_keys_are_inert(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    hidden = _unseen(subject, x)[..., None]
    seeds = subject.seeds(case, x)
    grads = not subject.mechanism.looks_ahead

    def run(y: Inputs) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        if grads:
            return subject.with_grads(y, seeds)
        return (*subject.both(y), {})

    out, lse, own = run(x)
    for poison in (float("nan"), float("inf"), 1e4):
        bad = x.but(k=x.k.masked_fill(hidden, poison), v=x.v.masked_fill(hidden, -poison))
        found, found_lse, theirs = run(bad)
        same(found, out, f"out with {poison} in unseen keys")
        if lse is not None and found_lse is not None:
            same(found_lse, lse, f"lse with {poison} in unseen keys")
        for word in own:
            same(theirs[word], own[word], f"gradient of {word} with {poison} in unseen keys")
    for word in ("k", "v") if grads else ():
        if largest(own[word].masked_fill(~hidden, 0.0)) != 0:
            raise Broken(f"{word} that no query sees has a gradient")


@law(
    "NaN in what is seen stays visible: it is never turned into a plausible number.",
    (
        Case(1, seed=1),
        Case(5, causal=True, seed=2),
        Case(33, 40, causal=True, heads=4, kv_heads=2, seed=3),
        Case(65, batch=2, seed=4),
    ),
)
def nan_stays_visible(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    mechanism = subject.mechanism
    call = mechanism.with_selection(x.q, x.k, subject.require(x))
    mask = mechanism.mask(call).expand(case.batch, case.heads, case.n, case.keys)
    group = call.groups
    for key in sorted({0, case.keys // 2, case.keys - 1}):
        for word in ("k", "v"):
            if word == "k" and isinstance(mechanism, MaskedSoftmax) and mechanism.is_dynamic:
                continue  # a NaN in k changes the choice itself
            bad = x.clone()
            getattr(bad, word)[:, 0, key, 0] = torch.nan
            rows = subject.out(bad)[:, :group].isnan().any(-1)
            if not bool(rows[mask[:, :group, :, key]].all()):
                raise Broken(f"a row that sees key {key} hides the NaN in its {word}")
    bad = x.clone()
    bad.q[:, :, -1, 0] = torch.nan
    if not bool(subject.out(bad)[:, :, -1].isnan().all()):
        raise Broken("a query that holds NaN has an output without it")


_SIZES = (
    Case(3, heads=0),
    Case(3, batch=0),
    Case(0, 4),
    Case(4, 0),
    Case(0, 0),
    Case(4, dv=0),
    Case(4, 0, causal=True, batch=2, heads=4, kv_heads=2),
    Case(0, 5, causal=True, batch=0),
    Case(0, 4, sink=True, bias="hnm", batch=2),
    Case(3, 0, sink=True, bias="hnm", batch=2),
)


@law("Empty batches, heads, queries, keys and values are legal: shaped zeros.", _SIZES)
def empty_sizes_are_legal(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    for causal in (False, True):
        x = case.but(causal=causal).inputs()
        try:
            out, lse = subject.both(x)
        except Refused:
            if causal:
                raise
            continue
        if tuple(out.shape) != (*x.q.shape[:3], x.v.shape[3]) or bool((out != 0).any()):
            raise Broken(f"an empty size gives {list(out.shape)}, or something other than zeros")
        if lse is not None and tuple(lse.shape) != tuple(x.q.shape[:3]):
            raise Broken(f"an empty size gives an lse {list(lse.shape)}")
        alone = x.kw["sink_logits"][None, :, None] if case.sink else torch.tensor(-torch.inf)
        if lse is not None and case.keys == 0 and not bool((lse == alone.to(lse.dtype)).all()):
            raise Broken("without keys, lse is not -inf, or the sink logit alone")
        if not subject.mechanism.looks_ahead:
            seeds = (torch.ones_like(out), None if lse is None else torch.zeros_like(lse))
            _, _, grads = subject.with_grads(x, seeds)
            if any(bool((g != 0).any()) for g in grads.values()):
                raise Broken("a gradient of an empty call is not 0")


def _changed(x: Inputs, word: str) -> Inputs:
    """The call with one argument more, such that a right result must differ."""
    m, n = x.k.shape[2], x.q.shape[2]
    at = torch.arange(m)[None].expand(x.k.shape[0], -1)
    changes: dict[str, Any] = {
        "scale": 3.0 * x.q.shape[3] ** -0.5,
        "softcap": 0.5,
        "sink_logits": torch.full((x.q.shape[1],), 2.0, dtype=x.q.dtype),
        "bias": (torch.arange(m, dtype=x.q.dtype) % 3 * 2).expand(1, 1, n, m).contiguous(),
        "key_mask": at % 4 != 2,
        "segments": (at >= 3).to(torch.int64) + (at >= 5),
        "q_offset": m - n - 2,
        "causal": not x.kw["causal"],
    }
    if word == "segments":
        return x.but(q_segments=changes[word], kv_segments=changes[word])
    return x.but(**{word: changes[word]})


def _same_pattern(subject: Subject, x: Inputs, y: Inputs) -> bool:
    """Whether a static pattern, of one key say, is the same for both calls: so is the result."""
    mechanism = subject.mechanism
    if not isinstance(mechanism, MaskedSoftmax) or mechanism.is_dynamic:
        return False
    masks = [mechanism.mask(subject.call(z)) for z in (x, y)]
    pairs = torch.broadcast_tensors(*masks)
    # One visible key takes all the weight, whatever its logit.
    return torch.equal(*pairs) and int(masks[0].sum(-1).max()) <= 1


ARGUMENTS = (
    "scale",
    "softcap",
    "sink_logits",
    "bias",
    "key_mask",
    "segments",
    "q_offset",
    "causal",
    "lse_with_sink_logits",
)


@law(
    "No argument is silently ignored: each changes the result, or is refused.",
    (Case(8, causal=True, seed=1), Case(33, causal=True, heads=4, kv_heads=2, spread=1.5, seed=2)),
)
def no_argument_is_ignored(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    out, lse = subject.both(x)
    for word in ARGUMENTS:
        try:
            before: Tensor | None
            if word == "lse_with_sink_logits":
                y = _changed(x, "sink_logits")
                found, before = subject.both(y)[1], lse
            else:
                y = _changed(x, word)
                found, before = subject.out(y), out
        except (Refused, InvalidInputError):
            continue
        if found is None or before is None or _same_pattern(subject, x, y):
            continue
        if torch.equal(found, before):
            raise Broken(f"{word} is neither refused nor does it change anything")


@law(
    "return_lse is refused where the definition has no log normaliser.",
    (Case(3, causal=True, seed=1),),
    lambda m: "" if has_lse(m) else "its definition has an lse",
)
def lse_is_refused_where_there_is_none(subject: Subject, case: Case) -> None:
    """Binds what has no log normaliser."""
    x = case.inputs()
    subject.require(x)
    try:
        subject.require(x, needs_lse=True)
    except Refused:
        return
    raise Broken("return_lse is served although nothing defines an lse")


@law(
    "What looks ahead refuses a cache and inputs that require gradients.",
    (Case(3, causal=True, seed=1),),
    lambda m: "it does not look ahead" if not takes_gradients(m) else "",
)
def looking_ahead_is_for_prefill(subject: Subject, case: Case) -> None:
    """Binds what looks ahead."""
    x = case.inputs()
    subject.require(x)
    call = subject.call(x)
    for word in ("cached", "needs_grad"):
        if not subject.mechanism.refusals(call.replace(**{word: True})):
            raise Broken(f"it looks ahead and does not refuse a call with {word}")
