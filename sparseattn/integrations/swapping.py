"""`swap`: mechanisms by name in a model that someone else wrote, with a report and the way back."""

from __future__ import annotations

import fnmatch
import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import choice, registry
from ..base import Mechanism
from ..errors import InvalidInputError, SwapError, did_you_mean
from . import places, sdpa_route, transformers_route
from .places import Place


@dataclass(frozen=True)
class ModuleRecord:
    """What a swap did in one module.

    Attributes:
        module: its qualified name in the model.
        mechanism: the spec. impl: the implementation that served last, None before any call.
        calls: how often its attention was asked for.
        fallback: how many of the calls the original attention served instead.
        reason: why, or what else there is to say; empty if nothing.
    """

    module: str
    mechanism: str
    impl: str | None
    calls: int
    fallback: int
    reason: str


class Swap:
    """A mechanism at work in a model: a context, or a handle to `restore()`. Made by `swap`."""

    def __init__(
        self,
        model: nn.Module,
        mechanism: Mechanism,
        layers: list[tuple[str, Mechanism]],
        impl: str,
        on_unsupported: str,
        cross: Mechanism | None,
    ) -> None:
        self.mechanism, self.impl = mechanism, impl
        self.on_unsupported, self.cross = on_unsupported, cross
        self._kind = type(model).__name__
        self._undo: list[Callable[[], None]] = []
        self._places: dict[str, Place] = {}
        self._chosen = _choices(model, mechanism, layers)
        self._restored = False
        try:
            self._enter(model)
        except BaseException:
            self.restore()
            raise

    def chosen(self, name: str) -> Mechanism:
        """The mechanism of a module."""
        return self._chosen.get(name, self.mechanism)

    def _enter(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        asking = {n: m for n, m in modules.items() if places.asks_transformers(m)}
        calling = {n: m for n, m in modules.items() if sdpa_route.may_reach(m) and n not in asking}
        _check_reachable(model, asking, calling)
        if asking:
            transformers_route.install()
            views: dict[int, Any] = {}
            for module in modules.values():
                transformers_route.hold(module, views)
                self._undo_in(module, transformers_route.release)
            for name, module in asking.items():
                self._put(name, module, places.watch_asking)
        if calling or not asking:
            for name, module in modules.items():
                if name not in asking and not sdpa_route.is_plain(module):
                    self._put(name, module, sdpa_route.watch)
        self._expected = {*asking, *calling}
        _forget_compiled()

    def _put(self, name: str, module: nn.Module, watch: places.Watch) -> None:
        place = self._places[name] = Place(self, name)
        places.put(module, place, watch)
        self._undo_in(module, functools.partial(places.take_away, place))

    def _undo_in(self, module: nn.Module, undo: Callable[[nn.Module], None]) -> None:
        # A swap keeps no model alive, for a table that all models share keeps the swap.
        found = weakref.ref(module)

        def undo_if_alive() -> None:
            alive = found()
            if alive is not None:
                undo(alive)

        self._undo.append(undo_if_alive)

    @property
    def report(self) -> list[ModuleRecord]:
        """A record a module that attends, in the model's order."""
        return [
            ModuleRecord(
                module=name,
                mechanism=str(place.mechanism or self.chosen(name)),
                impl=place.impl,
                calls=place.calls,
                fallback=place.fallbacks,
                reason=place.reason or ("" if place.calls else "never called"),
            )
            for name, place in self._places.items()
            if place.calls or name in self._expected
        ]

    def restore(self) -> None:
        """Give the model back as it was. Doing it twice does nothing more."""
        if not self._restored:
            self._restored = True
            while self._undo:
                self._undo.pop()()
            _forget_compiled()

    def __enter__(self) -> Swap:
        if self._restored:
            raise SwapError("this swap was restored; call sparseattn.swap again for another")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.restore()
        if kind is None:
            self._check_called()

    def _check_called(self) -> None:
        held = list(self._places.values())
        if any(place.served for place in held):
            return
        reasons = list(dict.fromkeys(place.reason for place in held if place.reason))
        calls = sum(place.calls for place in held)
        why = (
            f"the original attention served all {calls} calls: {'; '.join(reasons)}"
            if calls
            else "no forward of this model ran in the swap, or it has attention of its own making "
            "that cannot be reached: torch.nn.MultiheadAttention with need_weights=True, direct "
            "torch.ops.aten calls, plain matrix products, or sparseattn.MultiheadAttention, whose "
            "mechanism is set by assignment"
        )
        raise SwapError(f"{self.mechanism!r} was never called in {self._kind}: {why}", reasons)

    def __repr__(self) -> str:
        state = "restored" if self._restored else "active"
        return f"Swap({self.mechanism!r} in {self._kind}, {state}, {len(self.report)} modules)"


def _forget_compiled() -> None:
    """Drop what torch.compile made: it does not ask whether a module's hooks have changed, and
    would go on computing what the model computed before."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _choices(
    model: nn.Module, default: Mechanism, layers: list[tuple[str, Mechanism]]
) -> dict[str, Mechanism]:
    """The mechanism of every module: the last glob that matches it, or what holds it, decides."""
    names = [name for name, _ in model.named_modules()]
    rank: dict[str, int] = {}
    for at, (glob, _) in enumerate(layers):
        if not isinstance(glob, str):
            raise InvalidInputError(
                f"layers has the key {glob!r:.80}; expected a glob over the names of "
                "model.named_modules()"
            )
        matched = [name for name in names if fnmatch.fnmatchcase(name, glob)]
        if not matched:
            near = did_you_mean(glob, names)
            raise InvalidInputError(
                f"layers has {glob!r:.120}, which matches no module of {type(model).__name__}; "
                f"expected a glob over the names of model.named_modules().{near}"
            )
        rank.update(dict.fromkeys(matched, at))
    found: dict[str, Mechanism] = {}
    for name in names:
        parts = name.split(".")
        above = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        best = max((rank[one] for one in above if one in rank), default=None)
        found[name] = default if best is None else layers[best][1]
    return found


def _check_reachable(
    model: nn.Module, asking: dict[str, nn.Module], calling: dict[str, nn.Module]
) -> None:
    """Raise where a model's classes show that no swap can reach its attention."""
    plain = all(map(sdpa_route.is_plain, model.modules()))
    if asking or calling or not (plain or hasattr(model, "config")):
        return  # what code outside of the modules calls shows at run time
    own = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if "attention" in type(module).__name__.lower()
            or "mixer" in type(module).__name__.lower()
        }
    )
    raise SwapError(
        f"{type(model).__name__} cannot be swapped: "
        + (f"its {', '.join(own)} " if own else "it ")
        + "neither asks transformers for an attention function nor calls torch's "
        "scaled_dot_product_attention. What would work: a model of the same family whose attention "
        "does, or sparseattn.attention called in that class's forward"
    )


def check_on_unsupported(said: str) -> None:
    if said not in ("raise", "full"):
        raise InvalidInputError(f'on_unsupported got {said!r:.80}; expected "raise" or "full"')


def swap(
    model: nn.Module,
    mechanism: str | Mechanism = "full",
    *,
    layers: Mapping[str, str | Mechanism] | None = None,
    impl: str = "auto",
    on_unsupported: str = "raise",
    cross: str | Mechanism | None = None,
    **options: Any,
) -> Swap:
    """Put a mechanism in the place of a model's attention, as a context or until `restore()`.

    Args:
        model: any module whose attention asks transformers for its function, or calls torch's
            `scaled_dot_product_attention`.
        mechanism: a name (with its `options`), a spec string or an instance.
        layers: mechanisms for some modules, by globs over the names of `model.named_modules()`; a
            glob also rules what the module holds, and the last match wins.
        impl: the implementation, for all; "auto" for the first that serves.
        on_unsupported: "raise", or "full" to let a module's original attention serve a call that
            the mechanism refuses; the report then says so.
        cross: the mechanism of cross-attention, which otherwise stays exact.

    Returns:
        the swap, already at work. Its `report` has a record a module. Leaving it as a context
        restores the model, and raises SwapError if no mechanism was ever called.

    Raises:
        InvalidInputError: an argument is malformed, or a glob matches no module.
        SwapError: the model's classes show that its attention cannot be reached.
        UnknownMechanismError, UnknownOptionError: no such name or option.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_on_unsupported(on_unsupported)
    if layers is not None and not isinstance(layers, Mapping):
        raise InvalidInputError(
            f"layers must be a dict of globs and mechanisms, got {type(layers).__name__}"
        )
    main = registry.mechanism(mechanism, **options)
    given = [(glob, registry.mechanism(one)) for glob, one in (layers or {}).items()]
    other = None if cross is None else registry.mechanism(cross)
    used = {m: None for m in (main, *(one for _, one in given), *([other] if other else []))}
    for one in used:
        known = ["auto", *(found.name for found in choice.candidates(one))]
        if impl not in known:
            raise InvalidInputError(
                f"impl={impl!r:.80} is no implementation of {one.name!r}; expected one of "
                f"{', '.join(known)}.{did_you_mean(str(impl), known)}"
            )
        if one.nature == "different_function":
            warnings.warn(
                f"{one!r} is another function than softmax attention (different_function): weights "
                "that were trained with softmax need training for it",
                stacklevel=2,
            )
    return Swap(model, main, given, impl, on_unsupported, other)
