"""Laws of single arguments at the ends of their ranges: widths, scales, biases, offsets, ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInputError
from ..functional import attention
from .cases import Case, Inputs
from .laws import LONGEST_MESSAGE, Broken, Subject, hold, honours, law, same


def as_defined(subject: Subject, case: Case, tag: str = "") -> None:
    """Hold out, lse and all gradients of a case against the definition."""
    x = case.inputs()
    grads: dict[str, Tensor] = {}
    if subject.mechanism.looks_ahead:
        out, lse = subject.both(x)
    else:
        out, lse, grads = subject.with_grads(x, subject.seeds(case, x))
    budgets = subject.budgets(case, x, grads=bool(grads), tag=tag)
    hold(budgets.out(out), "out against the definition in float64")
    if lse is not None:
        hold(budgets.lse(lse), "lse against the definition in float64")
    if not grads:
        return
    for word, verdict in zip(grads, budgets.grads(list(grads.values()), nearby=True), strict=True):
        hold(verdict, f"gradient of {word} against that of the definition in float64")


@law(
    "Heads of any width are served whole, of keys and of values: out, lse and gradients.",
    (
        Case(3, d=1, dv=1, causal=True, seed=1),
        Case(3, d=65, dv=3, causal=True, seed=2),
        Case(5, 7, d=3, dv=80, seed=3),
        Case(5, causal=True, d=80, dv=128, heads=4, kv_heads=2, seed=4),
        Case(9, 12, d=160, dv=96, causal=True, seed=5),
        Case(9, d=257, dv=129, causal=True, heads=1, seed=6),
    ),
)
def any_width_is_served_whole(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    as_defined(subject, case)


@law(
    "Any finite scale multiplies q . k: 0 and negative ones too.",
    (
        Case(3, causal=True, scale=0.0, seed=1),
        Case(3, causal=True, scale=-0.7, seed=2),
        Case(9, 12, scale=-2.0, heads=4, kv_heads=2, seed=3),
        Case(17, causal=True, scale=1e-3, seed=4),
        Case(17, causal=True, scale=0.0, dtype="bfloat16", seed=5),
    ),
    honours("scale"),
)
def any_finite_scale_is_taken(subject: Subject, case: Case) -> None:
    """Binds what has a scale."""
    as_defined(subject, case)


@law(
    "bias may be one for all rows, heads or queries, and its gradient is then the sum over them.",
    (
        Case(3, 4, bias="m", seed=1),
        Case(3, causal=True, bias="nm", seed=2),
        Case(4, 5, batch=2, bias="bm", seed=3),
        Case(5, causal=True, batch=2, bias="bnm", heads=4, kv_heads=2, seed=4),
        Case(5, 7, batch=2, bias="hm", softcap=1.5, seed=5),
        Case(9, causal=True, batch=2, bias="bhnm", mask="left", heads=4, kv_heads=2, seed=6),
        Case(9, 12, documents=((4, 5), (5, 7)), batch=2, bias="bhm", sink=True, seed=7),
        Case(33, 40, causal=True, batch=2, bias="bm", offset="tensor", seed=8),
        Case(65, causal=True, bias="hnm", mask="holes", seed=9),
        Case(65, causal=True, bias="nm", dtype="bfloat16", seed=10),
    ),
    honours("bias"),
)
def bias_may_be_broadcast(subject: Subject, case: Case) -> None:
    """Binds what takes a bias."""
    as_defined(subject, case)


@law(
    "Queries may stand before the first key and past the last: positions have no ends.",
    (
        Case(2, 3, offset=3, causal=True, seed=1),
        Case(3, 4, offset=2, seed=2),
        Case(3, 4, offset=-2, seed=3),
        Case(3, 4, offset=-2, causal=True, seed=4),
        Case(4, 9, offset=30, causal=True, heads=4, kv_heads=2, seed=5),
        Case(4, 9, offset=-30, seed=6),
        Case(4, 9, offset=-30, causal=True, sink=True, seed=7),
        Case(5, 9, offset=1000, batch=2, mask="left", causal=True, seed=8),
        Case(9, 4, batch=3, offset="apart", causal=True, seed=9),
        Case(33, 40, batch=3, offset="apart", seed=10),
        Case(4, 9, offset=2**40, causal=True, seed=11),
    ),
)
def queries_may_stand_outside_the_keys(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    as_defined(subject, case)


# Ids that are one number to whoever keeps their lowest 8, 16 or 32 bits, their size, or a float.
_NAMES = (3, 3 + 2**8, 3 + 2**16, 3 + 2**32, -3, -3 - 2**32, 2**62 + 3, 2**62 + 2, -(2**63), 0)


@law(
    "Segment ids only name documents: any int64 will do, negative ones and great ones too.",
    (
        Case(3, documents=((1, 1), (2, 2)), causal=True, seed=1),
        Case(9, documents=((3, 3), (4, 4), (2, 2)), seed=2),
        Case(20, 30, documents=((2, 3),) * 10, batch=2, causal=True, seed=3),
    ),
)
def segment_ids_only_name_documents(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    plain = [_renamed(x, range(10), torch.int32), _renamed(x, _NAMES, torch.int64)]
    out, named = (subject.out(y) for y in plain)
    hold(subject.budgets(case, x).out(out), "out with ids counted from 0")
    same(named, out, f"ids {', '.join(map(str, _NAMES[: len(case.documents)]))} and ids from 0")


def _renamed(x: Inputs, names: Any, dtype: torch.dtype) -> Inputs:
    changes = {}
    order = list(dict.fromkeys(x.kw["q_segments"][0].tolist()))
    for word in ("q_segments", "kv_segments"):
        ids = x.kw[word]
        renamed = torch.zeros_like(ids)
        for at, name in enumerate(order):
            renamed = renamed.masked_fill(ids == name, names[at])
        changes[word] = renamed.to(dtype)
    return x.but(**changes)


@law(
    "In float16 products and sums beyond 65,504 stay finite where the definition, rounded, is.",
    (
        Case(2, d=64, spread=60.0, causal=True, dtype="float16", seed=1),
        Case(3, 65, d=16, loud=16000.0, dtype="float16", seed=2),
        Case(17, d=64, spread=60.0, loud=1000.0, causal=True, dtype="float16", seed=3),
        Case(33, 40, d=128, spread=60.0, heads=4, kv_heads=2, dtype="float16", seed=4),
    ),
)
def great_half_numbers_stay_finite(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    # What is clipped is finite itself.
    x = x.but(**{w: t.clamp(-60000, 60000) for w, t in (("q", x.q), ("k", x.k), ("v", x.v))})
    out, lse = subject.both(x)
    budgets = subject.budgets(case, x, tag="clipped")
    for word, found, ref in (("out", out, budgets.ref.out), ("lse", lse, budgets.ref.lse)):
        if found is None or ref is None:
            continue
        lost = ref.to(found.dtype).isfinite() & ~found.isfinite()
        if bool(lost.any()):
            at = tuple(lost.nonzero()[0].tolist())
            raise Broken(
                f"{word} is {float(found[at])} at {list(at)}, the definition {float(ref[at]):.6g}"
            )
    hold(budgets.out(out), "out against the definition in float64")


def malformed(x: Inputs) -> dict[str, tuple[str, dict[str, Any]]]:
    """Calls that are wrong, each with the argument that its error must name.

    Args:
        x: a right call, of batch 2, 4 heads on 2, fewer queries than keys.
    """
    q, k, v = x.q, x.k, x.v
    (b, hq, n, _), m = q.shape, k.shape[2]
    yes = torch.ones(b, m, dtype=torch.bool)
    ids = {
        "q_segments": torch.zeros(b, n, dtype=torch.int64),
        "kv_segments": torch.zeros(b, m, dtype=torch.int64),
    }
    twice = torch.zeros(b, m, dtype=torch.int64)
    twice[1, m // 2] = 1
    return {
        "a q of 3 dimensions": ("q", {"q": q[0]}),
        "a q that is a list": ("q", {"q": q.tolist()}),
        "a k of another width": ("k", {"k": k[..., :-1]}),
        "a v of another length": ("v", {"v": v[:, :, :-1]}),
        "a k of another batch": ("k", {"k": k[:1]}),
        "a v of other heads": ("v", {"v": v[:, :1]}),
        "heads that do not divide": ("heads", {"q": q[:, :3]}),
        "a k of another dtype": ("k", {"k": k.to(torch.float64)}),
        "int inputs": ("q", {w: t.to(torch.int64) for w, t in (("q", q), ("k", k), ("v", v))}),
        "D = 0": ("q", {"q": q[..., :0], "k": k[..., :0]}),
        "a k on another device": ("k", {"k": k.to("meta")}),
        "a float key_mask": ("key_mask", {"key_mask": yes.to(q.dtype)}),
        "an int key_mask": ("key_mask", {"key_mask": yes.to(torch.int64)}),
        "a key_mask to be broadcast": ("key_mask", {"key_mask": yes[:1]}),
        "a key_mask of the queries' length": ("key_mask", {"key_mask": yes[:, :n]}),
        "float segments": ("q_segments", ids | {"q_segments": ids["q_segments"].to(q.dtype)}),
        "segments to be broadcast": ("kv_segments", ids | {"kv_segments": ids["kv_segments"][:1]}),
        "segments of the queries alone": ("kv_segments", {"q_segments": ids["q_segments"]}),
        "a segment in two runs": ("kv_segments", ids | {"kv_segments": twice}),
        "segments beside q_offset": ("q_offset", ids | {"q_offset": 0}),
        "a float q_offset": ("q_offset", {"q_offset": 1.0}),
        "a bool q_offset": ("q_offset", {"q_offset": True}),
        "a q_offset for each query": ("q_offset", {"q_offset": torch.zeros(n, dtype=torch.int64)}),
        "a scale of NaN": ("scale", {"scale": float("nan")}),
        "an infinite scale": ("scale", {"scale": float("inf")}),
        "a scale in words": ("scale", {"scale": "small"}),
        "a softcap of 0": ("softcap", {"softcap": 0.0}),
        "a negative softcap": ("softcap", {"softcap": -1.0}),
        "a sink for each key-value head": ("sink_logits", {"sink_logits": torch.zeros(hq // 2)}),
        "int sinks": ("sink_logits", {"sink_logits": torch.zeros(hq, dtype=torch.int64)}),
        "a bias of 2 dimensions": ("bias", {"bias": torch.zeros(n, m)}),
        "a bias without keys": ("bias", {"bias": torch.zeros(1, 1, n, 1)}),
        "a bool bias": ("bias", {"bias": torch.zeros(1, 1, n, m, dtype=torch.bool)}),
        "causal in words": ("causal", {"causal": "yes"}),
    }


@law(
    "A malformed call raises InvalidInputError, a ValueError of less than 600 characters that "
    "names the argument, and nothing is computed.",
    (Case(3, 5, batch=2, heads=4, kv_heads=2, seed=1),),
)
def malformed_calls_are_refused_in_words(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    for what, (word, changes) in malformed(case.inputs()).items():
        x = case.inputs().but(**changes)
        try:
            attention(x.q, x.k, x.v, subject.mechanism, impl=subject.name, **x.kw)
        except InvalidInputError as error:
            if word not in str(error):
                raise Broken(f"{what}: the error does not name {word}: {error}") from error
            if len(str(error)) >= LONGEST_MESSAGE or not isinstance(error, ValueError):
                raise Broken(f"{what}: {type(error).__name__}: {error}") from error
        except Exception as error:
            raise Broken(
                f"{what} raised {type(error).__name__} instead of InvalidInputError: {error}"
            ) from error
        else:
            raise Broken(f"{what} was accepted")
