"""Laws of the definition itself: a map of the right kind, and its fast structure the same map."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import reference, registry
from ..base import KernelizedLinear, Mechanism
from ..call import AttentionCall
from ..errors import SparseAttnError
from ..functional import attention
from .budgets import largest
from .cases import Case, Inputs
from .laws import Broken, Refused, Subject, Unavailable, hold, law, softmax_nature

_EPS = torch.finfo(torch.float64).eps
CASES = tuple(
    case.but(dtype="float64")
    for case in (
        Case(1, seed=1),
        Case(3, 5, seed=2),
        Case(5, causal=True, heads=4, kv_heads=2, seed=3),
        Case(5, 3, causal=True, seed=4),
        Case(9, batch=2, mask="left", causal=True, seed=5),
        Case(9, batch=2, mask="nothing", seed=6),
        Case(9, 10, documents=((2, 5), (4, 4), (3, 1)), seed=7),
        Case(9, causal=True, softcap=1.5, sink=True, seed=8),
        Case(10, 16, batch=2, offset="tensor", causal=True, seed=9),
        Case(33, batch=2, mask="holes", causal=True, heads=4, kv_heads=2, seed=10),
        Case(65, 100, scale=2.0, seed=11),
    )
)


def _weights(subject: Subject, x: Inputs) -> tuple[Tensor, AttentionCall]:
    """The map in float64, of inputs whose unseen keys are already inert, and its call."""
    mechanism = subject.mechanism
    call = mechanism.with_selection(x.q, x.k, subject.require(x))
    q, k, _ = reference.make_inert(x.q, x.k, x.v, mechanism.mask(call), call.groups)
    w = mechanism.weights(q, k, call)
    shape = (call.batch, call.q_heads, call.n, call.m)
    if not isinstance(w, Tensor) or tuple(w.shape) != shape or w.dtype != x.q.dtype:
        came = f"{w.dtype} {list(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
        raise Broken(f"weights() gave {came}, expected {x.q.dtype} {list(shape)}")
    return w, call


def _plainest(case: Case) -> list[Case]:
    dtypes = ("float32", "bfloat16", "float16", "float64")
    return [case.but(causal=causal, dtype=d) for causal in (True, False) for d in dtypes]


@law(
    "impl='auto' serves a plain call of 16 tokens, causal or not, in some dtype.",
    (Case(16),),
    definition=True,
)
def serves_the_basic_call(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    refused = ""
    for plain in _plainest(case):
        x = plain.inputs()
        try:
            subject.require(x)
        except Refused as refusal:
            refused = refused or str(refusal)
            continue
        out = attention(x.q, x.k, x.v, subject.mechanism, **x.kw)
        hold(subject.budgets(plain, x).out(out), "out of impl='auto' against the definition")
        return
    raise Broken(f"causal or not, in every dtype, it refuses: {refused}")


@law(
    "An implementation serves the plainest call that its mechanism takes, in some dtype.",
    (Case(16),),
)
def every_implementation_serves(subject: Subject, case: Case) -> None:
    """Binds all natures; one that says it needs a device or library that is not here is skipped."""
    reasons = []
    for plain in _plainest(case):
        x = plain.inputs()
        call = subject.call(x)
        if subject.mechanism.refusals(call):
            continue
        try:
            out = subject.out(x)
        except Refused as refusal:
            reasons.append(str(refusal))
            continue
        hold(subject.budgets(plain, x).out(out), "out against the definition in float64")
        return
    assert subject.impl is not None
    if reasons and (missing := subject.impl.missing()):
        raise Unavailable("; ".join(missing))
    for plain in _plainest(case) if not torch.cuda.is_available() and reasons else ():
        # `supports` reads no values: it can be asked about a device that is not here.
        call = subject.call(plain.inputs()).replace(device=torch.device("cuda"))
        if not subject.impl.supports(subject.mechanism, call):
            raise Unavailable("it serves CUDA devices, and this machine has none")
    if reasons:
        raise Broken(f"causal or not, in every dtype, it refuses: {reasons[0]}")


@law(
    "The map is finite, and 0 wherever the call's own masks allow nothing.",
    CASES,
    definition=True,
)
def the_map_stays_within_the_masks(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    w, call = _weights(subject, case.inputs())
    if not bool(w.isfinite().all()):
        raise Broken("the map is not finite")
    outside = w.masked_fill(call.allowed(), 0.0)
    if largest(outside) != 0:
        at = (outside != 0).nonzero()[0].tolist()
        raise Broken(f"weight {float(outside[tuple(at)]):.3g} at {at}, which the masks hide")
    used = subject.mechanism.mask(call)
    if bool((used & ~call.allowed()).any()):
        raise Broken("mask() uses pairs that the call's own masks hide")
    if largest(w.masked_fill(used, 0.0)) != 0:
        raise Broken("there is weight where mask() says that none is")


@law(
    "A softmax map is not negative, and each row sums to 1, or to 0 where it sees no key.",
    CASES,
    softmax_nature,
    definition=True,
)
def softmax_rows_sum_to_one(subject: Subject, case: Case) -> None:
    """Binds `exact` and `masked_softmax`."""
    w, call = _weights(subject, case.inputs())
    if not bool((w >= 0).all()):
        raise Broken("a weight is negative or NaN")
    total = w.sum(-1)
    sees = subject.mechanism.mask(call).any(-1).expand_as(total)
    if largest(total[~sees]) != 0:
        raise Broken("a row that sees no key has weight")
    budget = 64 * _EPS
    if call.sink_logits is not None:
        wrong = ~((total[sees] > 0) & (total[sees] < 1 + budget))
    else:
        wrong = ~((total[sees] - 1).abs() <= budget)
    if bool(wrong.any()):
        raise Broken(f"a row of weights sums to {float(total[sees][wrong][0]):.12g}")


def _oracle(x: Inputs, call: AttentionCall, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over a given mask, from its textbook lines: k repeated, no help from the package."""
    k = x.k.repeat_interleave(call.groups, dim=1)
    scale = x.q.shape[-1] ** -0.5 if call.scale_given is False else call.scale
    s = torch.einsum("bhnd,bhmd->bhnm", x.q, k) * scale
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.bias is not None:
        s = s + call.bias
    s = torch.where(mask.expand_as(s), s, torch.tensor(-torch.inf, dtype=s.dtype))
    if call.sink_logits is not None:
        sink = call.sink_logits[None, :, None, None].expand(*s.shape[:3], 1)
        s = torch.cat([s, sink], -1)
    lse = s.logsumexp(-1)
    weights = torch.exp(s - lse[..., None]).nan_to_num(0.0)[..., : call.m]
    return weights, lse


@law(
    "A softmax map is the softmax of scale * q . k over its own mask; an exact one, over all.",
    CASES,
    softmax_nature,
    definition=True,
)
def softmax_maps_are_softmax(subject: Subject, case: Case) -> None:
    """Binds `exact` and `masked_softmax`."""
    x = case.inputs()
    w, call = _weights(subject, x)
    exact = subject.mechanism.nature == "exact"
    mask = call.allowed() if exact else subject.mechanism.mask(call)
    wanted, wanted_lse = _oracle(x, call, mask)
    error = largest(w - wanted)
    # |dW| <= W * 2 |ds|, and |s| is at most about 64 here: its rounding is what exp magnifies.
    if not error <= 64 * _EPS:
        raise Broken(f"the map misses the softmax over its mask by {error:.3g}")
    _, lse = subject.mechanism.definition(x.q, x.k, call)
    if lse is not None:
        gap = (lse - wanted_lse).masked_fill(lse == wanted_lse, 0.0)
        if not largest(gap) <= 64 * _EPS * (1 + largest(wanted_lse[wanted_lse.isfinite()])):
            raise Broken(f"lse misses the log of the sum by {largest(gap):.3g}")


def _is_normalised(mechanism: Mechanism) -> str:
    fits = isinstance(mechanism, KernelizedLinear) and mechanism.normalize
    return "" if fits else "its weights are not divided by their sum"


@law(
    "Normalised kernel weights sum to 1 in each row that sees a key, unless they are all 0.",
    CASES,
    _is_normalised,
    definition=True,
)
def kernel_rows_sum_to_one(subject: Subject, case: Case) -> None:
    """Binds normalised kernels."""
    w, _ = _weights(subject, case.inputs())
    total = w.sum(-1)
    some = (w != 0).any(-1)
    error = largest(total[some] - 1)
    if not error <= 64 * _EPS * max(1.0, largest(w.abs().sum(-1))):
        raise Broken(f"a row of weights misses the sum 1 by {error:.3g}")


def _declares_maps(mechanism: Mechanism) -> str:
    if not isinstance(mechanism, KernelizedLinear):
        return "it has no feature maps"
    x = torch.zeros(1, 1, 1, 4)
    declared = mechanism.fused_maps(AttentionCall.make(x, x, x, causal=True))
    return "" if declared is not None else "it does not say which its maps are"


@law(
    "The maps that a kernel is told to evaluate are the feature maps.",
    (Case(1, 3, seed=1), Case(9, causal=True, seed=2), Case(17, 33, batch=2, causal=True, seed=3)),
    _declares_maps,
    definition=True,
)
def fused_maps_are_the_maps(subject: Subject, case: Case) -> None:
    """Binds kernels that have `fused_maps`."""
    x = case.inputs()
    call, mechanism = subject.call(x).to_dtype(torch.float64), subject.mechanism
    assert isinstance(mechanism, KernelizedLinear)
    declared = mechanism.fused_maps(call)
    if declared is None:
        return
    place = call.placement()
    given = (
        (mechanism.query_map, declared[0], x.q, place.q[:, None]),
        (mechanism.feature_map, declared[1], x.k, place.k[:, None]),
    )
    for word, (method, fused, rows, at) in zip(("query_map", "feature_map"), given, strict=True):
        wanted, found = method(rows.double(), at, call), fused(rows.double(), at)
        if found.shape != wanted.shape:
            raise Broken(f"fused_maps gives {[*found.shape]}, and {word} {[*wanted.shape]}")
        error = largest(found - wanted)
        if not error <= 64 * _EPS * max(1.0, largest(wanted)):
            raise Broken(f"fused_maps misses {word} by {error:.3g}")


def _registered(mechanism: Mechanism) -> bool:
    try:
        return registry.lookup(mechanism.name) is type(mechanism)
    except SparseAttnError:
        return False


@law(
    "A mechanism is a frozen, hashable value, and its repr is a spec that gives it back.",
    (Case(1),),
    definition=True,
)
def the_spec_is_the_mechanism(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    mechanism: Any = subject.mechanism
    if not hasattr(mechanism, "__dataclass_fields__"):
        raise Broken(f"{type(mechanism).__name__} is no dataclass")
    fields = dataclasses.fields(mechanism)
    # What sets attributes on a mechanism would change every module and cache that holds it.
    word = fields[0].name if fields else "name"
    before = getattr(mechanism, word)
    try:
        setattr(mechanism, word, before)
    except AttributeError:
        pass
    else:
        raise Broken(f"it is not frozen: setting {word!r} is possible")
    twin = dataclasses.replace(mechanism)
    if twin != mechanism or hash(twin) != hash(mechanism) or repr(twin) != repr(mechanism):
        raise Broken("two mechanisms with equal options differ in ==, hash or repr")
    if not repr(mechanism).startswith(mechanism.name):
        raise Broken(f"its repr {mechanism!r} does not begin with its name {mechanism.name!r}")
    literal = all(isinstance(getattr(mechanism, f.name), _LITERALS) for f in fields)
    if _registered(mechanism) and literal and registry.mechanism(repr(mechanism)) != mechanism:
        raise Broken(f"the spec {mechanism!r} gives another mechanism")


_LITERALS = (int, float, str, bool, tuple, type(None))


def _is_estimate(mechanism: Mechanism) -> str:
    fits = mechanism.nature == "softmax_estimate" and hasattr(mechanism, "features")
    fits = fits and hasattr(mechanism, "seed")
    return "" if fits else "it is no estimate of softmax with options `features` and `seed`"


@law(
    "An estimate of softmax comes nearer to it as its budget grows.",
    (Case(24, dtype="float64", spread=0.5, seed=1),),
    _is_estimate,
    definition=True,
)
def estimates_converge(subject: Subject, case: Case) -> None:
    """Binds `softmax_estimate` with `features` and `seed`."""
    x = case.inputs()
    mechanism: Any = subject.mechanism
    exact, _ = reference.exact(x.q, x.k, x.v, subject.call(x))

    def error(features: int) -> float:
        total = 0.0
        for seed in range(4):
            changed = dataclasses.replace(mechanism, features=features, seed=seed)
            out, _ = reference.evaluate(changed, x.q, x.k, x.v, subject.require(x))
            total += float((out - exact).square().sum())
        return total**0.5

    few, many = error(16), error(16 * 64)
    # 64 times the features: 8 times nearer is expected, and a bias would not shrink at all.
    if not many <= few / 3:
        raise Broken(f"error {few:.3g} with 16 features, {many:.3g} with 1,024")
