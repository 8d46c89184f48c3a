"""Laws of derivatives beyond the first backward pass: right, or refused; never silent zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import SparseAttnError
from ..functional import attention
from .cases import Case, Inputs
from .laws import Broken, Subject, law, takes_gradients

_CASES = (
    Case(2, 3, dtype="float64", heads=1, seed=1),
    Case(3, 4, dtype="float64", causal=True, seed=2),
    Case(3, 4, dtype="float64", causal=True, sink=True, bias="hm", seed=3),
    Case(5, dtype="float64", causal=True, heads=4, kv_heads=2, batch=2, mask="left", seed=4),
)
_Named = dict[str, Tensor]


def _run(subject: Subject, x: Inputs, impl: str) -> list[Tensor]:
    """Out, and lse where there is one, of a call that is known to be served."""
    if "lse" not in subject.mechanism.honours:
        return [attention(x.q, x.k, x.v, subject.mechanism, impl=impl, **x.kw)]
    return list(attention(x.q, x.k, x.v, subject.mechanism, impl=impl, return_lse=True, **x.kw))


def _energy(outputs: list[Tensor]) -> Tensor:
    """A number that depends on the outputs, and on their slopes, everywhere."""
    finite = [t.masked_fill(~t.isfinite(), 0.0) for t in outputs]
    return torch.stack([(t * t).sum() + t.sin().sum() for t in finite]).sum()


def _refused(what: str, error: Exception) -> None:
    """Accept an error that says something in words; a wordless one breaks the law."""
    if not str(error).strip():
        raise Broken(f"{what} is refused without a word: {type(error).__name__}") from error


_REFUSALS = (SparseAttnError, RuntimeError, NotImplementedError)


def _agree(found: _Named, wanted: _Named, what: str) -> None:
    """Agreement to half the digits of float64: enough to tell a derivative from zeros."""
    digits = torch.finfo(torch.float64).eps ** 0.5
    for word, tensor in wanted.items():
        size = float(tensor.abs().max())
        error = float((found[word].to(torch.float64) - tensor).abs().max())
        if not error <= digits * (1 + size):
            zeros = ", which is 0 throughout" if not bool(found[word].any()) else ""
            raise Broken(
                f"{what} {word}{zeros}: error {error:.3g}, {digits * (1 + size):.3g} is half the "
                "digits"
            )


def _twice(subject: Subject, x: Inputs, words: list[str], impl: str) -> _Named:
    """The gradients of `sum of squares of the gradients + energy`, of some of the inputs.

    The energy stands beside the gradients: where those have lost their history, the sum still has
    one, and is silently wrong.
    """
    leaves = {word: x.leaves()[word].detach().requires_grad_() for word in words}
    outputs = _run(subject, x.but(**leaves), impl)
    if not outputs[0].requires_grad:
        raise Broken(f"{', '.join(words)} require gradients, and the output has none")
    energy = _energy(outputs)
    first = torch.autograd.grad(energy, list(leaves.values()), create_graph=True, allow_unused=True)
    squares = [(g * g).sum() for g in first if g is not None]
    total = torch.stack([*squares, energy]).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    zeros = (
        torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves.values(), strict=True)
    )
    return dict(zip(words, zeros, strict=True))


def _subsets(x: Inputs) -> list[list[str]]:
    words = list(x.leaves())
    return [words, *([word] for word in words)]


@law(
    "Second derivatives, by reverse over reverse, are right or refused in words: never silent "
    "zeros.",
    _CASES,
    takes_gradients,
)
def second_derivatives_are_right_or_refused(subject: Subject, case: Case) -> None:
    """Binds what has gradients."""
    x = case.inputs()
    subject.require(x)
    for words in _subsets(x):
        try:
            found = _twice(subject, x, words, subject.name)
        except _REFUSALS as error:
            _refused("a second derivative", error)
            continue
        wanted = _twice(subject, x, words, "reference")
        _agree(found, wanted, "second derivative, by reverse over reverse, of")


def _of_words(subject: Subject, x: Inputs, words: list[str], impl: str) -> Callable[..., Any]:
    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_run(subject, x.but(**dict(zip(words, tensors, strict=True))), impl))

    return run


@law(
    "torch.func's gradients, and its derivatives of gradients, are right or refused in words.",
    _CASES[:3],
    takes_gradients,
)
def func_transforms_are_right_or_refused(subject: Subject, case: Case) -> None:
    """Binds what has gradients."""
    x = case.inputs()
    subject.require(x)
    words = ["q", "k", "v"]
    tensors = tuple(x.leaves()[word] for word in words)
    tangents = tuple(torch.cos(3 * t) for t in tensors)

    def transformed(impl: str, how: str) -> _Named:
        run = _of_words(subject, x, words, impl)

        def energy(*given: Tensor) -> Tensor:
            return _energy(list(run(*given)))

        slope = torch.func.grad(energy, argnums=(0, 1, 2))

        def steepness(*given: Tensor) -> Tensor:
            return torch.stack([(g * g).sum() for g in slope(*given)]).sum() + energy(*given)

        if how == "grad":
            found = slope(*tensors)
        elif how == "grad of grad":
            found = torch.func.grad(steepness, argnums=(0, 1, 2))(*tensors)
        else:
            found = torch.func.jvp(slope, tensors, tangents)[1]
        return dict(zip(words, found, strict=True))

    for how in ("grad", "grad of grad", "jvp of grad"):
        try:
            found = transformed(subject.name, how)
        except _REFUSALS as error:
            _refused(f"torch.func's {how}", error)
            continue
        _agree(found, transformed("reference", how), f"torch.func's {how}, of")


@law(
    "Forward-mode derivatives, of each input and of all, are right or refused in words: never "
    "silent zeros.",
    _CASES,
    takes_gradients,
)
def forward_mode_is_right_or_refused(subject: Subject, case: Case) -> None:
    """Binds what has gradients."""
    x = case.inputs()
    subject.require(x)
    for words in _subsets(x):
        primals = tuple(x.leaves()[word] for word in words)
        tangents = tuple(torch.cos(3 * t) for t in primals)
        run = _of_words(subject, x, words, subject.name)
        wanted = _by_dual_numbers(_of_words(subject, x, words, "reference"), primals, tangents)
        for how in (_by_func, _by_dual_numbers):
            try:
                found = how(run, primals, tangents)
            except _REFUSALS as error:
                _refused("forward mode", error)
                continue
            ours, theirs = (dict(zip(("out", "lse"), t, strict=False)) for t in (found, wanted))
            _agree(ours, theirs, f"forward-mode derivative along {', '.join(words)} of")


def _by_func(run: Any, primals: Any, tangents: Any) -> tuple[Tensor, ...]:
    return torch.func.jvp(run, primals, tangents)[1]


def _by_dual_numbers(run: Any, primals: Any, tangents: Any) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True))
        parts = [forward_ad.unpack_dual(out) for out in run(*duals)]
    return tuple(
        torch.zeros_like(p.primal) if p.tangent is None else p.tangent.clone() for p in parts
    )
