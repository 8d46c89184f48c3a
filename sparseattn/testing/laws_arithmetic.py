"""Laws of arithmetic: every implementation computes its own mechanism's definition."""

from __future__ import annotations

import torch
from torch.autograd.gradcheck import GradcheckError

from .. import reference
from ..digits import wide
from .budgets import Budgets, Verdict, distance, rounding
from .cases import Case
from .laws import Broken, Refused, Subject, has_lse, hold, law, takes_gradients

_PAIR = ((3, 3), (1, 1), (4, 4))
_UNEQUAL = ((2, 5), (4, 4), (3, 1))

# Smallest first. Sizes are ragged: nothing here is a multiple of a block.
LADDER = (
    Case(1, seed=1),
    Case(2, causal=True, seed=2),
    Case(3, 5, dv=3, seed=3),
    Case(5, causal=True, heads=4, kv_heads=2, scale=0.7, seed=4),
    Case(5, 3, causal=True, seed=5),
    Case(7, batch=2, mask="left", causal=True, seed=6),
    Case(7, batch=2, mask="right", seed=7),
    Case(8, documents=_PAIR, causal=True, seed=8),
    Case(9, 10, documents=_UNEQUAL, batch=2, seed=9),
    Case(9, causal=True, softcap=1.5, seed=10),
    Case(9, causal=True, sink=True, heads=4, kv_heads=1, seed=11),
    Case(9, 11, bias="hnm", seed=12),
    Case(10, 16, batch=2, offset=3, causal=True, seed=13),
    Case(10, 16, batch=2, offset=-4, causal=True, seed=14),
    Case(10, 16, batch=2, offset="tensor", causal=True, seed=15),
    Case(17, batch=2, mask="holes", causal=True, seed=16),
    Case(17, batch=2, mask="nothing", seed=17),
    Case(33, 47, mask="left", batch=3, causal=True, scale=0.3, sink=True, seed=18),
    Case(63, causal=True, d=8, seed=19),
    Case(65, 63, d=8, dv=16, seed=20),
    Case(65, heads=4, kv_heads=2, d=16, causal=True, spread=2.0, seed=21),
    Case(100, documents=((40, 40), (60, 60)), mask="holes", causal=True, seed=22),
    Case(130, causal=True, mask="right", batch=2, softcap=5.0, sink=True, seed=23),
    Case(257, causal=True, seed=24),
    Case(100, 257, dtype="bfloat16", d=16, seed=25),
    Case(65, dtype="bfloat16", causal=True, batch=2, mask="left", seed=26),
    Case(65, dtype="float16", causal=True, seed=27),
    Case(65, 100, dtype="float16", heads=4, kv_heads=2, seed=28),
    Case(33, dtype="float64", causal=True, seed=29),
    Case(65, 100, dtype="float64", heads=4, kv_heads=2, dv=3, seed=30),
    Case(577, causal=True, heads=1, seed=31),
)
_STRIDED = (
    Case(5, batch=2, causal=True, strides="transposed", seed=1),
    Case(9, batch=2, strides="expanded", causal=True, seed=2),
    Case(65, batch=2, heads=4, kv_heads=2, causal=True, strides="transposed", seed=3),
    Case(33, batch=2, dtype="float64", causal=True, strides="expanded", seed=4),
    Case(9, 12, batch=2, strides="columns", heads=4, kv_heads=2, seed=5),
    Case(17, batch=2, strides="spread", causal=True, mask="left", seed=6),
)
_LSE = tuple(case for case in LADDER if case.dtype == "float32" or case.n < 100)
_GRADS = (
    *(case for case in LADDER if case.n <= 100 and case.m != 257),
    Case(257, causal=True, heads=1, seed=31),
)


@law("The output is the definition's, within the budget of its dtype.", LADDER)
def forward_is_the_definition(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    out = subject.out(x)
    hold(subject.budgets(case, x).out(out), "out against the definition in float64")


@law("Strided, expanded and transposed inputs are served as their copies are.", _STRIDED)
def strides_do_not_matter(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    out = subject.out(x)
    hold(subject.budgets(case, x).out(out), "out against the definition in float64")
    if subject.mechanism.looks_ahead:
        return
    _, _, grads = subject.with_grads(x, subject.seeds(case, x))
    _judge_gradients(subject, case, grads)


@law("lse is the log of the sum of the exponentials, sink included.", _LSE, has_lse)
def lse_is_the_definition(subject: Subject, case: Case) -> None:
    """Binds what has a log normaliser."""
    x = case.inputs()
    out, lse = subject.both(x)
    assert lse is not None
    if lse.dtype != wide(x.q.dtype):
        raise Broken(f"lse has dtype {lse.dtype}, expected {wide(x.q.dtype)}")
    budgets = subject.budgets(case, x)
    hold(budgets.lse(lse), "lse against the definition in float64")
    hold(budgets.out(out), "out beside lse against the definition in float64")


def _judge_gradients(subject: Subject, case: Case, grads: dict[str, torch.Tensor]) -> None:
    x = case.inputs()
    verdicts = subject.budgets(case, x, grads=True).grads(list(grads.values()), nearby=True)
    for word, verdict in zip(grads, verdicts, strict=True):
        hold(verdict, f"gradient of {word} against that of the definition in float64")


@law(
    "The gradients of q, k, v, sink logits and bias, through out and lse, are the definition's.",
    _GRADS,
    takes_gradients,
)
def gradients_are_the_definition(subject: Subject, case: Case) -> None:
    """Binds what has gradients."""
    x = case.inputs()
    seeds = subject.seeds(case, x)
    out, _, grads = subject.with_grads(x, seeds)
    hold(subject.budgets(case, x).out(out), "out, when gradients are wanted")
    _judge_gradients(subject, case, grads)


@law(
    "An input that needs a gradient gets the same one whether or not the others need theirs.",
    (Case(5, causal=True, seed=1), Case(17, 21, heads=4, kv_heads=2, seed=2)),
    takes_gradients,
)
def each_gradient_stands_alone(subject: Subject, case: Case) -> None:
    """Binds what has gradients."""
    x = case.inputs()
    subject.require(x)
    grad, _ = subject.seeds(case, x)
    budgets = Budgets(subject.mechanism, x.q, x.k, x.v, subject.call(x), (grad, None))
    grads = {}
    for word, tensor in x.leaves().items():
        leaf = tensor.detach().requires_grad_()
        out = subject.out(x.but(**{word: leaf}))
        if not out.requires_grad:
            raise Broken(f"only {word} requires a gradient, and the output has none")
        (grads[word],) = torch.autograd.grad(out, leaf, grad)
    for word, verdict in zip(grads, budgets.grads(list(grads.values()), nearby=True), strict=True):
        hold(verdict, f"gradient of {word} alone")


@law(
    "Finite differences agree with the gradients.",
    (Case(3, 4, dtype="float64", d=3, dv=2, causal=True, seed=1),),
    takes_gradients,
)
def gradcheck(subject: Subject, case: Case) -> None:
    """Binds what has gradients, and serves float64."""
    x = case.inputs()
    if x.q.dtype != torch.float64:
        raise Refused("finite differences need float64, which it does not serve")
    leaves = {w: t.requires_grad_() for w, t in x.leaves().items()}
    subject.require(x)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return subject.out(x.but(**dict(zip(leaves, tensors, strict=True))))

    try:
        torch.autograd.gradcheck(run, tuple(leaves.values()), nondet_tol=0.0, fast_mode=False)
    except GradcheckError as error:
        raise Broken(str(error).strip().splitlines()[0]) from error


@law(
    "Long rows of half numbers are summed in float32: the result is good to its own last digit.",
    tuple(
        Case(2, 6000, d=8, heads=1, dtype=dtype, spread=0.3, causal=True, seed=seed)
        for seed, dtype in enumerate(("bfloat16", "float16"))
    ),
)
def long_half_rows_are_summed_wide(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    # Values of one sign: what a sum in the half type drops does not cancel.
    x = x.but(v=x.v.abs() + 0.5)
    subject.require(x)
    call, dtype = subject.call(x), x.q.dtype
    with torch.no_grad():
        ref = reference.evaluate(subject.mechanism, x.q, x.k, x.v, call)[0]
        single = reference.evaluate(subject.mechanism, x.q, x.k, x.v, call, torch.float32)[0]
    budget = 2 * distance(single.to(dtype), ref) + 2 * rounding(ref, dtype)
    hold(Verdict(distance(subject.out(x), ref), budget), "out of a long row")
