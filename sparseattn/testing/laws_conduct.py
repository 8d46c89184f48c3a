"""Laws of conduct: same bits each time, nothing touched that is not its own, torch's tools work."""

from __future__ import annotations

import contextlib
import io
import random
from typing import Any

import torch
from torch import Tensor

from ..errors import SparseAttnError
from ..functional import attention
from .budgets import Budgets
from .cases import Case, Inputs
from .laws import Broken, Refused, Subject, law, near, same, takes_gradients

_PLAIN = (
    Case(3, causal=True, seed=1),
    Case(17, 21, batch=2, heads=4, kv_heads=2, causal=True, seed=2),
    Case(65, causal=True, mask="left", batch=2, seed=3),
)
_MASKED = (
    Case(3, causal=True, seed=1),
    Case(9, batch=2, mask="left", causal=True, seed=2),
    Case(9, documents=((4, 4), (5, 5)), causal=True, sink=True, seed=3),
    Case(33, bias="hnm", sink=True, causal=True, seed=4),
    Case(33, batch=2, offset="tensor", causal=True, heads=4, kv_heads=2, seed=5),
)


def _everything(subject: Subject, case: Case, x: Inputs) -> dict[str, Tensor]:
    if subject.mechanism.looks_ahead:
        out, lse = subject.both(x)
        grads: dict[str, Tensor] = {}
    else:
        out, lse, grads = subject.with_grads(x, subject.seeds(case, x))
    named = {"out": out} if lse is None else {"out": out, "lse": lse}
    return named | {f"gradient of {word}": grad for word, grad in grads.items()}


@law("The same call gives the same bits, forward and backward, whatever ran between.", _PLAIN)
def the_same_call_gives_the_same_bits(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    first = {word: t.clone() for word, t in _everything(subject, case, x).items()}
    state = torch.get_rng_state()
    try:
        torch.manual_seed(random.Random(case.seed).getrandbits(30))
        # Same shapes with other numbers, then other shapes: no state may be left of either.
        subject.out(case.but(seed=case.seed + 50).inputs())
        subject.out(Case(5, 7, batch=2, heads=1, causal=True, dtype=case.dtype, seed=9).inputs())
        again = _everything(subject, case, case.inputs())
    finally:
        torch.set_rng_state(state)
    for word, tensor in first.items():
        same(again[word], tensor, f"{word}, the second time")


@law("Inputs are never modified, forward or backward.", _MASKED)
def inputs_are_not_modified(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    before = {word: tensor.clone() for word, tensor in x.tensors().items()}
    _everything(subject, case, x)
    with torch.no_grad():
        subject.both(x)
    for word, tensor in x.tensors().items():
        same(tensor, before[word], f"{word} after the call and before it")


@law("The output is fresh memory of q's dtype: no view of an input or of another output.", _PLAIN)
def the_output_is_fresh(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    with torch.no_grad():
        out = subject.out(x)
    shape = (*x.q.shape[:3], x.v.shape[3])
    if out.dtype != x.q.dtype or tuple(out.shape) != shape:
        raise Broken(f"out is {out.dtype} {list(out.shape)}, expected {x.q.dtype} {list(shape)}")
    place = out.untyped_storage().data_ptr()
    for word, tensor in x.tensors().items():
        if tensor.untyped_storage().data_ptr() == place:
            raise Broken(f"out shares its memory with {word}")
    kept = out.clone()
    out.fill_(torch.nan)
    with torch.no_grad():
        same(subject.out(x), kept, "out, after an earlier output was overwritten")


def _defined_change(subject: Subject, x: Inputs, before: Tensor) -> bool:
    """Whether the definition's output differs from an earlier one by more than its budget."""
    budgets = Budgets(subject.mechanism, x.q, x.k, x.v, subject.call(x))
    return not budgets.out(before).holds


@law("The output answers to a change of q, of k and of v.", _PLAIN)
def the_output_answers(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    with torch.no_grad():
        out = subject.out(x)
        for word in ("q", "k", "v"):
            # In place, too: a result that was kept for these very tensors would come back.
            tensor = getattr(x, word)
            kept = tensor.clone()
            tensor.copy_(kept.flip(2) * 1.5 + 0.25)
            if torch.equal(subject.out(x), out) and (
                word == "v" or _defined_change(subject, x, out)
            ):
                raise Broken(f"the output is the same after {word} changed")
            tensor.copy_(kept)
        same(subject.out(x), out, "out, with all inputs as they were")


@law(
    "The global random state, gradient mode, threads, default dtype and output are left alone.",
    _PLAIN[:2],
)
def global_state_is_left_alone(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()

    def state() -> tuple[Any, ...]:
        modes = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
        return (*modes, torch.get_default_dtype(), torch.get_num_threads(), random.getstate())

    rng, own_rng = torch.get_rng_state(), random.getstate()
    kind, threads = torch.get_default_dtype(), torch.get_num_threads()
    printed = io.StringIO()
    try:
        # A state that no one else's seed leaves: who seeds with 0 twice changes nothing the second.
        torch.manual_seed(0x5EED + case.seed)
        random.seed(0x5EED + case.seed)
        before, unused = state(), torch.get_rng_state()
        with contextlib.redirect_stdout(printed):
            _everything(subject, case, x)
        changed = state() != before or not torch.equal(unused, torch.get_rng_state())
    finally:
        torch.set_rng_state(rng)
        random.setstate(own_rng)
        torch.set_default_dtype(kind)
        torch.set_num_threads(threads)
    if changed:
        raise Broken("a call changed the random state or a setting of the process")
    if printed.getvalue():
        raise Broken(f"a call printed {printed.getvalue()!r:.100} on standard output")


@law(
    "Wanting gradients changes the output by no more than its budget.",
    (*_PLAIN[:2], Case(65, causal=True, dtype="bfloat16", seed=4)),
    takes_gradients,
)
def wanting_gradients_changes_nothing(subject: Subject, case: Case) -> None:
    """Binds what has gradients."""
    x = case.inputs()
    with torch.no_grad():
        plain = subject.out(x)
    out, _, _ = subject.with_grads(x, subject.seeds(case, x))
    near(out, plain, subject.budgets(case, x).out_budget, "out with and without gradients")


_AUTOCAST = (
    *_PLAIN[:2],
    Case(5, causal=True, sink=True, bias="hnm", seed=4),
    Case(17, batch=2, mask="left", causal=True, dtype="float64", seed=5),
)


@law(
    "Under autocast the inputs are cast first, as by hand; gradients come in the inputs' dtype, "
    "and float64 is left alone.",
    _AUTOCAST,
)
def autocast_casts_the_inputs(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    subject.require(x)
    half = torch.float64 if case.dtype == "float64" else torch.bfloat16

    def run(by_hand: bool) -> dict[str, Tensor]:
        needs = not subject.mechanism.looks_ahead
        leaves = {w: t.detach().requires_grad_(needs) for w, t in x.leaves().items()}
        cast = {w: leaves[w].to(half) for w in ("q", "k", "v")} if by_hand else {}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not by_hand):
            out = subject.out(x.but(**(leaves | cast)))
        found = {"out": out.detach()}
        if needs:
            seed = subject.seeds(case, x)[0].to(out.dtype)
            grads = torch.autograd.grad(out, list(leaves.values()), seed)
            found |= {f"gradient of {w}": g for w, g in zip(leaves, grads, strict=True)}
        return found

    under, by_hand = run(by_hand=False), run(by_hand=True)
    if under["out"].dtype != half:
        raise Broken(f"under autocast to bfloat16 the output is {under['out'].dtype}")
    for word, tensor in by_hand.items():
        same(under[word], tensor, f"{word} under autocast and after casting by hand")


@law(
    "vmap over a batch is the batch.",
    (
        Case(3, batch=2, causal=True, seed=1),
        Case(17, 21, batch=3, heads=4, kv_heads=2, causal=True),
    ),
)
def vmap_is_the_batch(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    out = subject.out(x)

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return subject.out(Inputs(q[None], k[None], v[None], x.kw))[0]

    try:
        mapped = torch.func.vmap(one)(x.q, x.k, x.v)
    except SparseAttnError as error:
        raise Refused(str(error)) from error
    near(mapped, out, subject.budgets(case, x).out_budget, "vmap and the batch")


@law(
    "torch.compile of the call, in one graph and for any length, gives what eager gives.",
    (
        Case(17, 21, batch=2, heads=4, kv_heads=2, causal=True, seed=1),
        Case(33, causal=True, seed=2),
    ),
    expensive=True,
)
def compiling_changes_nothing(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    subject.require(x)
    impl = "reference" if subject.impl is None else subject.impl.name

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, subject.mechanism, impl=impl, causal=case.causal)

    torch._dynamo.reset()
    # Tracing, symbols and fake kernels are the mechanism's; generating code is torch's own affair.
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for longer in (0, 16):
        y = case.but(n=case.n + longer, m=case.keys + longer).inputs()
        budget = Budgets(subject.mechanism, y.q, y.k, y.v, subject.call(y)).out_budget
        near(compiled(y.q, y.k, y.v), run(y.q, y.k, y.v), budget, "compiled and eager")
