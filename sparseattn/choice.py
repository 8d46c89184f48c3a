"""Which implementation serves a call."""

from __future__ import annotations

from . import registry
from .base import Mechanism
from .cache import Cache
from .call import AttentionCall
from .errors import InvalidInputError, UnsupportedCallError, did_you_mean
from .implementation import REFERENCE, Implementation


def candidates(mechanism: Mechanism) -> list[Implementation]:
    """Every implementation in the order that `impl="auto"` tries them.

    The mechanism's own come first, then other plugins', then `reference`; the preferred ones
    (`sa.prefer`) come before all.
    """
    found = [
        *mechanism.implementations(),
        *registry.extra_implementations(mechanism),
        REFERENCE,
    ]
    preferred = registry.preferred()
    if not preferred:
        return found
    rank = {name: at for at, name in enumerate(preferred)}
    return sorted(found, key=lambda impl: rank.get(impl.name, len(rank)))


def reasons_against(
    one: Implementation, mechanism: Mechanism, call: AttentionCall, cache: Cache | None
) -> list[str]:
    """Why an implementation cannot serve a call, on what a cache keeps where there is one."""
    reasons = list(one.supports(mechanism, call))
    if cache is not None and type(one).step is Implementation.step:
        reasons += cache.serves(one, call)
    return reasons


def choose(
    mechanism: Mechanism, call: AttentionCall, impl: str = "auto", cache: Cache | None = None
) -> Implementation:
    """The implementation that serves a call.

    Args:
        cache: what the call goes on from; the call is then one that `cache.admit` returned.

    Raises:
        InvalidInputError: `impl` names no implementation of this mechanism.
        UnsupportedCallError: it cannot serve the call; `reasons` has every reason.
    """
    found = candidates(mechanism)
    if impl == "auto":
        for one in found:
            if not reasons_against(one, mechanism, call, cache):
                return one
        reasons = [
            f"{one.name}: {r}"
            for one in found
            for r in reasons_against(one, mechanism, call, cache)
        ]
        raise UnsupportedCallError.of(f"every implementation of {mechanism!r}", reasons)
    named = [one for one in found if one.name == impl]
    if not named:
        known = ["auto", *(one.name for one in found)]
        raise InvalidInputError(
            f"impl={impl!r:.80} is no implementation of {mechanism.name!r}; expected one of "
            f"{', '.join(known)}.{did_you_mean(str(impl), known)}"
        )
    reasons = reasons_against(named[0], mechanism, call, cache)
    if reasons:
        raise UnsupportedCallError.of(
            f"implementation {impl!r} of {mechanism!r}", reasons, 'impl="auto" takes one that does'
        )
    return named[0]
