"""Laws of conduct: same bits each time, nothing touched that is not its own, torch's tools work."""

from __future__ import annotations

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
    Case(33, bias=True, sink=True, causal=True, seed=4),
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
    x = case.inputs()
    before = {word: tensor.clone() for word, tensor in x.tensors().items()}
    _everything(subject, case, x)
    with torch.no_grad():
        subject.both(x)
    for word, tensor in x.tensors().items():
        same(tensor, before[word], f"{word} after the call and before it")


@law("The output is fresh memory of q's dtype: no view of an input or of another output.", _PLAIN)
def the_output_is_fresh(subject: Subject, case: Case) -> None:
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
    "The global random state, gradient mode, threads and default dtype are left alone.", _PLAIN[:2]
)
def global_state_is_left_alone(subject: Subject, case: Case) -> None:
    x = case.inputs()

    def state() -> tuple[Any, ...]:
        modes = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
        return (*modes, torch.get_default_dtype(), torch.get_num_threads(), random.getstate())

    before, rng = state(), torch.get_rng_state()
    try:
        _everything(subject, case, x)
        changed = state() != before or not torch.equal(rng, torch.get_rng_state())
    finally:
        torch.set_rng_state(rng)
    if changed:
        raise Broken("a call changed the random state or a setting of the process")


@law(
    "Wanting gradients changes the output by no more than its budget.",
    (*_PLAIN[:2], Case(65, causal=True, dtype="bfloat16", seed=4)),
    takes_gradients,
)
def wanting_gradients_changes_nothing(subject: Subject, case: Case) -> None:
    x = case.inputs()
    with torch.no_grad():
        plain = subject.out(x)
    out, _, _ = subject.with_grads(x, subject.seeds(case, x))
    near(out, plain, subject.budgets(case, x).out_budget, "out with and without gradients")


@law("Under autocast the inputs are cast first, as by hand.", _PLAIN[:2])
def autocast_casts_the_inputs(subject: Subject, case: Case) -> None:
    x = case.but(dtype="float32").inputs()
    cast = x.but(q=x.q.bfloat16(), k=x.k.bfloat16(), v=x.v.bfloat16())
    subject.require(x)
    by_hand = subject.out(cast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = subject.out(x)
    if out.dtype != torch.bfloat16:
        raise Broken(f"under autocast to bfloat16 the output is {out.dtype}")
    same(out, by_hand, "autocast and casting by hand")


@law(
    "vmap over a batch is the batch.",
    (
        Case(3, batch=2, causal=True, seed=1),
        Case(17, 21, batch=3, heads=4, kv_heads=2, causal=True),
    ),
)
def vmap_is_the_batch(subject: Subject, case: Case) -> None:
    x = case.inputs()
    out = subject.out(x)

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return subject.out(Inputs(q[None], k[None], v[None], x.kw))[0]

    try:
        mapped = torch.func.vmap(one)(x.q, x.k, x.v)
    except SparseAttnError as error:
        raise Refused(str(error)) from error
    near(mapped, out, subject.budgets(case, x).out_budget, "vmap and the batch")


def _second(subject: Subject, x: Inputs, reference: bool) -> dict[str, Tensor]:
    """The gradients of `sum(grad_q ** 2 + ...)`: second derivatives."""
    impl = "reference" if reference or subject.impl is None else subject.impl.name
    leaves = {w: t.detach().requires_grad_() for w, t in x.leaves().items()}
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    out = attention(q, k, v, subject.mechanism, impl=impl, **x.kw)
    first = torch.autograd.grad((out * out).sum(), [q, k, v], create_graph=True)
    total = torch.stack([(g * g).sum() for g in first]).sum()
    found = torch.autograd.grad(total, [q, k, v], allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for g, t in zip(found, (q, k, v), strict=True))
    return dict(zip("qkv", zeros, strict=True))


@law(
    "Second derivatives are right, or refused in words.",
    (Case(3, 4, dtype="float64", causal=True, seed=1),),
    takes_gradients,
)
def second_derivatives_are_right_or_refused(subject: Subject, case: Case) -> None:
    x = case.inputs()
    subject.require(x)
    try:
        found = _second(subject, x, reference=False)
    except (SparseAttnError, RuntimeError, NotImplementedError) as error:
        if not str(error).strip():
            raise Broken("second derivatives are refused without a word") from error
        return
    wide = x.but(**{w: t.to(torch.float64) for w, t in x.leaves().items()})
    wanted = _second(subject, wide, reference=True)
    _agree(found, wanted, x.q.dtype, "second derivative")


@law(
    "Forward-mode derivatives are right, or refused in words.",
    (Case(3, 4, dtype="float64", causal=True, seed=1),),
    takes_gradients,
)
def forward_mode_is_right_or_refused(subject: Subject, case: Case) -> None:
    x = case.inputs()
    subject.require(x)
    g = case.generator()
    tangents = tuple(torch.randn(t.shape, generator=g).to(t.dtype) for t in (x.q, x.k, x.v))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return subject._run(x.but(q=q, k=k, v=v))

    try:
        found = torch.func.jvp(run, (x.q, x.k, x.v), tangents)[1]
    except (Broken, SparseAttnError, RuntimeError, NotImplementedError) as error:
        if not str(error).strip():
            raise Broken("forward mode is refused without a word") from error
        return

    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, subject.mechanism, impl="reference", **x.kw)

    wide = tuple(t.to(torch.float64) for t in (x.q, x.k, x.v))
    wanted = torch.func.jvp(define, wide, tuple(t.to(torch.float64) for t in tangents))[1]
    _agree({"out": found}, {"out": wanted}, x.q.dtype, "forward-mode derivative of")


def _agree(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: Any, what: str) -> None:
    """Agreement to half the digits of the dtype: enough to tell a derivative from zeros."""
    digits = torch.finfo(dtype).eps ** 0.5
    for word, tensor in wanted.items():
        error = float((found[word].to(torch.float64) - tensor).abs().max())
        bound = digits * (1 + float(tensor.abs().max()))
        if not error <= bound:
            raise Broken(f"{what} {word}: error {error:.3g}, {bound:.3g} is half the digits")


@law(
    "torch.compile of the call, in one graph and for any length, gives what eager gives.",
    (
        Case(17, 21, batch=2, heads=4, kv_heads=2, causal=True, seed=1),
        Case(33, causal=True, seed=2),
    ),
    expensive=True,
)
def compiling_changes_nothing(subject: Subject, case: Case) -> None:
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
