"""How a mechanism is computed: `Implementation`, the definition itself, and the core's engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from . import reference
from .arguments import is_readable
from .cache import Cache
from .call import AttentionCall
from .digits import wide
from .engines import op
from .engines.linear import in_native as _linear_in_native  # noqa: F401  (registers its kernel)
from .engines.linear import in_torch as _linear_in_torch  # noqa: F401  (registers its kernel)
from .engines.linear import in_triton as _linear_in_triton  # noqa: F401  (registers its kernel)
from .engines.softmax import in_native as _softmax_in_native  # noqa: F401  (registers its kernel)
from .engines.softmax import in_torch as _softmax_in_torch  # noqa: F401  (registers its kernel)
from .engines.softmax import in_triton as _softmax_in_triton  # noqa: F401  (registers its kernel)
from .errors import UnsupportedCallError

if TYPE_CHECKING:
    from .base import Mechanism


class Implementation:
    """A way to compute a mechanism. Subclasses give `name`, `supports` and `run`.

    Class attributes:
        name: how `impl=` calls it.
        on_request: `check` tries it only where it is named, or with `--expensive`: it compiles for
            seconds, or needs a library or a device that few have.
    """

    name: ClassVar[str] = ""
    on_request: ClassVar[bool] = False

    def missing(self) -> list[str]:
        """What this machine lacks for any call, such as a library: `check` then leaves it out, or
        where it is asked for by name says so.

        `supports` says so too.
        """
        return []

    def supports(self, mechanism: Mechanism, call: AttentionCall) -> list[str]:
        """Why this implementation cannot serve the call; empty when it can.

        Reads static facts only (sizes, dtype, device, which masks are given), never tensor values.
        """
        return []

    def run(
        self, mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the call in differentiable torch.

        Args:
            q, k, v: `[B, Hq, N, D]`, `[B, Hkv, M, D]`, `[B, Hkv, M, Dv]`, of `call.dtype`.

        Returns:
            out `[B, Hq, N, Dv]` in q's dtype, and lse `[B, Hq, N]` in float32 (float64 for
            float64) or None.
        """
        raise UnsupportedCallError(f"implementation {self.name!r} defines no run()")

    def step(
        self,
        mechanism: Mechanism,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Cache,
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute a call with a cache, which this must not change: `attention` appends afterwards.

        The default has the cache call `run` on the keys it keeps, or use what an engine gives it.

        Args:
            q, k, v: of the new tokens: `[B, Hq, n, D]`, `[B, Hkv, n, D]`, `[B, Hkv, n, Dv]`.
            cache: holds the `cache.length` tokens before them.
            call: `n` counts the new tokens, `m` and `key_mask` all of them.

        Returns:
            as `run`.
        """
        return cache.attend(self, q, k, v, call)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class Reference(Implementation):
    """The definition itself in float64, rounded to the inputs' dtype at the end."""

    name = "reference"

    def run(
        self, mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = reference.evaluate(mechanism, q, k, v, call)
        return out.to(q.dtype), None if lse is None else lse.to(wide(q.dtype))


class EngineImplementation(Implementation):
    """One of the core's engines, through the operator; gradients, compile and export included."""

    def __init__(self, engine: str, name: str) -> None:
        self.name = name  # type: ignore[misc]
        self.engine = engine
        self.kernel = f"{engine}:{name}"

    def missing(self) -> list[str]:
        return op.KERNELS[self.kernel].missing()

    def supports(self, mechanism: Mechanism, call: AttentionCall) -> list[str]:
        return op.KERNELS[self.kernel].supports(mechanism, call)

    def run(
        self, mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        if is_readable(q):  # else the operator makes the selection, which runs untraced
            call = mechanism.with_selection(q, k, call)
        out, lse = op.attend(mechanism, self.kernel, q, k, v, call)
        return out, lse.to(wide(q.dtype)) if self.engine == "softmax" else None


REFERENCE = Reference()
_ENGINE_IMPLEMENTATIONS: dict[str, EngineImplementation] = {}


def engine_implementations(engine: str) -> tuple[Implementation, ...]:
    """What an engine offers, the fastest first; a kernel appears here once it is registered."""
    names = [f"{engine}:{name}" for name in ("triton", "native", "torch")]
    for kernel in names:
        if kernel in op.KERNELS and kernel not in _ENGINE_IMPLEMENTATIONS:
            _ENGINE_IMPLEMENTATIONS[kernel] = EngineImplementation(*kernel.split(":"))
    return tuple(_ENGINE_IMPLEMENTATIONS[k] for k in names if k in _ENGINE_IMPLEMENTATIONS)
