"""Laws of static patterns: the fast structure and the options mean what the definition says."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from ..base import MaskedSoftmax, Mechanism
from ..layout import Grid
from .cases import Case
from .laws import Broken, Subject, law, with_options
from .laws_definition import CASES

_EPS = torch.finfo(torch.float64).eps


def _has_clauses(mechanism: Mechanism) -> str:
    if not isinstance(mechanism, MaskedSoftmax):
        return "it has no layout"
    return "it is dynamic" if mechanism.is_dynamic else ""


def _grids() -> tuple[Case, ...]:
    sizes = [(1, 1), (2, 2), (3, 5), (5, 3), (7, 7), (17, 30), (33, 33), (65, 63), (130, 130)]
    found = [(n, m, m - n) for n, m in sizes]
    found += [(5, 9, -3), (9, 9, 4), (40, 20, 30), (1, 200, 199), (257, 257, 0), (700, 700, 0)]
    return tuple(
        Case(n, m, offset=offset, causal=causal)
        for n, m, offset in sorted(found, key=lambda s: s[0] * s[1])
        for causal in (True, False)
    )


@law(
    "The layout is the pattern of visible(i, j), pair by pair.",
    _grids(),
    _has_clauses,
    definition=True,
)
def layout_is_what_is_visible(subject: Subject, case: Case) -> None:
    """Binds static patterns of softmax."""
    mechanism = subject.mechanism
    assert isinstance(mechanism, MaskedSoftmax) and isinstance(case.offset, int)
    aligned = case.offset == case.keys - case.n

    def difference(n: int, m: int) -> str | None:
        offset = m - n if aligned else case.offset
        return _first_difference(mechanism, n, m, offset, case.causal)  # type: ignore[arg-type]

    found = difference(case.n, case.keys)
    if found is not None:
        raise Broken(_smallest(difference, case.n, case.keys) or found)


_FEW = 12


def _smallest(difference: Callable[[int, int], str | None], n: int, m: int) -> str | None:
    """The difference of the smallest sizes, up to n and m, that have one."""
    sizes = itertools.product(range(1, min(n, _FEW) + 1), range(1, min(m, _FEW) + 1))
    for few in sorted(sizes, key=math.prod):
        found = difference(*few)
        if found is not None:
            return found
    # Among greater ones: the queries, then the keys, are cut by ever smaller pieces.
    for step in (1 << power for power in reversed(range(max(n, m).bit_length()))):
        while n > step and difference(n - step, m) is not None:
            n -= step
        while m > step and difference(n, m - step) is not None:
            m -= step
    return difference(n, m)


def _first_difference(
    mechanism: MaskedSoftmax, n: int, m: int, offset: int, causal: bool
) -> str | None:
    """The first pair about which `visible` and the layout disagree, in words."""
    layout = mechanism.clauses(Grid(n, m, causal, offset))
    i = torch.arange(n)[:, None] + offset
    j = torch.arange(m)[None]
    wanted = mechanism.visible_in(i, j, torch.tensor(m), causal).expand(n, m)
    if causal:
        wanted = wanted & (j <= i)
    found = layout.mask()
    at = f"n={n}, m={m}, {'causal' if causal else 'not causal'}"
    if not torch.equal(found, wanted):
        q, k = (found != wanted).nonzero()[0].tolist()
        return (
            f"{at}, i={q + offset}, j={k} (positions of a query and a key): visible() says "
            f"{bool(wanted[q, k])}, the layout says {bool(found[q, k])}; "
            f"{int((found != wanted).sum())} pairs differ"
        )
    if layout.pairs() != int(wanted.sum()):
        return f"{at}: the layout counts {layout.pairs()} pairs, there are {int(wanted.sum())}"
    return None


@law(
    "density() is the pairs used over the pairs that the masks allow.",
    CASES,
    definition=True,
)
def density_counts_the_pairs(subject: Subject, case: Case) -> None:
    """Binds all natures."""
    x = case.inputs()
    call = subject.mechanism.with_selection(x.q, x.k, subject.require(x))
    used = subject.mechanism.mask(call)
    allowed = call.allowed().expand(used.shape[0], used.shape[1], -1, -1)
    wanted = float(used.sum()) / max(1.0, float(allowed.sum()))
    found = subject.mechanism.density(call)
    if not abs(found - wanted) <= 64 * _EPS:
        raise Broken(f"density() is {found}, the pairs say {wanted}")


def _has_window(mechanism: Mechanism) -> str:
    reason = _has_clauses(mechanism)
    if reason:
        return reason
    if not hasattr(mechanism, "window") or hasattr(mechanism, "dilation"):
        return "it has no option `window` of single keys"
    return ""


@law(
    "window=W shows the keys at distance < W, (left, right) inclusive counts, sinks the first S.",
    (Case(5), Case(9, 14), Case(33, causal=True)),
    _has_window,
    definition=True,
)
def window_means_what_it_says(subject: Subject, case: Case) -> None:
    """Binds static patterns with an option `window`."""
    mechanism: Any = subject.mechanism
    sizes = {f.name for f in dataclasses.fields(mechanism)}
    for window in (1, 3, (2, 0), (1, 4)):
        changed: Any = with_options(mechanism, {"window": window})
        if changed is None:
            continue
        left, right = (window - 1, window - 1) if isinstance(window, int) else window
        i, j = torch.arange(case.n)[:, None] + case.keys - case.n, torch.arange(case.keys)[None]
        inside = (j - i >= -left) & (j - i <= right) | (j < getattr(mechanism, "sinks", 0))
        seen = changed.visible_in(i, j, torch.tensor(case.keys), case.causal).expand_as(inside)
        # Other options may only add to the window.
        wrong = seen != inside if sizes <= {"window", "sinks"} else inside & ~seen
        if bool(wrong.any()):
            q, k = wrong.nonzero()[0].tolist()
            raise Broken(
                f"{changed!r}: query position {q + case.keys - case.n} and key position {k} are "
                f"{'visible' if bool(seen[q, k]) else 'not visible'}"
            )
