"""Who holds which name: what plugins claim, and what becomes of claims that collide."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from . import specs
from .base import Mechanism
from .discovery import ENVIRONMENT, PluginRecord, Staged
from .errors import did_you_mean
from .implementation import Implementation


@dataclass(frozen=True)
class Claim:
    """Someone's claim to a name. `record` is None for a script's."""

    value: Any
    provider: str
    record: PluginRecord | None


Claims = dict[Any, list[Claim]]


def winner_of(claims: list[Claim]) -> Claim | None:
    """A built-in keeps its name against a stranger; two strangers with one name lose it both."""
    for claim in claims:
        if claim.record is None or claim.record.built_in:
            return claim
    return claims[0] if len(claims) == 1 else None


@dataclass
class State:
    """What is registered. Tables are read without a lock: a later change replaces a whole table."""

    mechanisms: Claims = field(default_factory=dict)  # by name
    implementations: Claims = field(default_factory=dict)  # by (mechanism, name)
    inputs: Claims = field(default_factory=dict)  # by name
    metrics: Claims = field(default_factory=dict)  # by name
    records: list[PluginRecord] = field(default_factory=list)
    # Of each mechanism, ready for every call: what strangers add to it.
    extra: dict[str, tuple[Implementation, ...]] = field(default_factory=dict)
    discovered: bool = False


def publish(state: State, staged: Staged) -> None:
    """Enter a plugin's claims."""
    record = staged.record
    for table, found in (
        (state.mechanisms, staged.mechanisms),
        (state.implementations, staged.implementations),
        (state.inputs, staged.inputs),
        (state.metrics, staged.metrics),
    ):
        for key, value in found.items():
            table.setdefault(key, []).append(Claim(value, record.distribution, record))


def settle(state: State) -> None:
    """Decide who holds each name, and tell those who do not."""
    for key, claims in state.implementations.items():
        holder = winner_of(state.mechanisms.get(key[0], []))
        if holder is not None and key[1] in own_implementations(holder.value):
            claims.insert(0, dataclasses.replace(holder, record=None))
    for word, table in (
        ("mechanism", state.mechanisms),
        ("implementation", state.implementations),
        ("input", state.inputs),
        ("metric", state.metrics),
    ):
        for key, claims in table.items():
            winner = winner_of(claims)
            name = ":".join(key) if isinstance(key, tuple) else key
            for claim in claims:
                if claim.record is None:
                    continue
                if claim is winner:
                    getattr(claim.record, f"{word}s").append(name)
                elif winner is not None:
                    owner = (
                        f"is one of the mechanism's own, from {winner.provider}"
                        if winner.record is None
                        else f"belongs to the built-in plugin {rival(winner)}"
                    )
                    claim.record.fault(f"the {word} name {name!r} {owner}")
                else:
                    rivals = ", ".join(rival(c) for c in claims if c is not claim)
                    claim.record.fault(
                        f"the {word} name {name!r} is also registered by {rivals}: none has it; "
                        f"{way_out(claim.record)}"
                    )
    for (name, own), claims in state.implementations.items():
        winner = winner_of(claims)
        if winner is None or winner.record is None:
            continue
        state.extra[name] = (*state.extra.get(name, ()), winner.value)
        if name not in state.mechanisms:
            winner.record.remark(
                f"{own!r} implements {name!r}, a mechanism that no loaded plugin "
                f"has.{did_you_mean(name, state.mechanisms)}"
            )


def way_out(record: PluginRecord) -> str:
    """What to do about two plugins with one name."""
    return f"uninstall one, or block one, as in {ENVIRONMENT}=-{record.name}"


def rival(claim: Claim) -> str:
    """A plugin's claim in words."""
    assert claim.record is not None
    return f"{claim.record.name!r} of {claim.provider}"


def own_implementations(cls: type[Mechanism]) -> set[str]:
    """The names of the implementations that a mechanism brings itself, as far as they are known."""

    def of_defaults() -> Any:
        return specs.build(cls, {}).implementations()

    def of_any() -> Any:  # where options are required: what the base class says of any instance
        return cls.implementations(object.__new__(cls))

    for ask in (of_defaults, of_any):
        try:
            return {implementation.name for implementation in ask()}
        except KeyboardInterrupt:
            raise
        except BaseException:  # a stranger's code, which costs nobody else anything
            continue
    return set()
