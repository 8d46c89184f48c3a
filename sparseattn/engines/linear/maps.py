"""Feature maps that a kernel can evaluate by itself, in words: `KernelizedLinear.fused_maps`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...call import AttentionCall

Function = Literal["identity", "elu_plus_one", "relu", "exp"]
Lowered = Literal["most", "half_square"]

_FUNCTIONS = {
    "identity": lambda y: y,
    "elu_plus_one": lambda y: torch.nn.functional.elu(y) + 1,
    "relu": torch.relu,
    "exp": torch.exp,
}


@dataclass(frozen=True, eq=False)
class FusedMap:
    """A feature map as an elementwise function of the row, or of a projection of it.

        y = scale * x                                  [D] -> [D]
        y = projection @ (scale * x) - lowered - drop  [D] -> [F], with a projection
        phi = function(y)
        phi = [phi * cos(t), phi * sin(t)]             with a turn: t = turn * position

    Attributes:
        function: elementwise.
        scale: multiplies the row first.
        turn: radians a position; twice the features.
        projection: `[F, D]`, in the dtype of features.
        lowered: of a projection, what each row's exponents are lowered by: `most`, their greatest,
            which has no gradient (it must cancel in the division), or `half_square`, half the
            square of the scaled row.
        drop: a constant to lower them by too.
    """

    function: Function = "identity"
    scale: float = 1.0
    turn: float | None = None
    projection: Tensor | None = None
    lowered: Lowered = "half_square"
    drop: float = 0.0

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """The map in torch: x `[B, H, n, D]`, positions `[B or 1, 1, n]` -> `[B, H, n, F]`.

        What `feature_map` must give too: a test holds the two together.
        """
        y = x * self.scale
        if self.projection is not None:
            exponent = y @ self.projection.T.to(y.dtype)
            if self.lowered == "most":
                low = exponent.detach().amax(-1, keepdim=True)
            else:
                low = y.square().sum(-1, keepdim=True) / 2
            y = exponent - low - self.drop
        phi = _FUNCTIONS[self.function](y)
        if self.turn is None:
            return phi
        angle = positions[..., None].to(x.dtype) * self.turn
        return torch.cat([phi * angle.cos(), phi * angle.sin()], dim=-1)


def in_words(mechanism: Any, call: AttentionCall) -> tuple[FusedMap, FusedMap] | None:
    """The maps of queries and of keys that a mechanism declares, where they are alike; else None.

    A subclass that gives another map, and does not say which, is not taken at its parent's word.
    """
    kind: Any = type(mechanism)
    if not _says_so(kind):
        return None
    maps: tuple[FusedMap, FusedMap] | None = mechanism.fused_maps(call)
    if maps is None:
        return None
    one, other = maps
    alike = (one.function, one.turn) == (other.function, other.turn)
    return maps if alike and one.projection is other.projection else None


@lru_cache(maxsize=256)
def _says_so(cls: type) -> bool:
    """Whether `fused_maps` is of the class that gives the maps, or of a subclass."""

    def place(method: str) -> int:
        order = enumerate(cls.__mro__)
        return next((i for i, one in order if method in one.__dict__), len(cls.__mro__))

    return place("fused_maps") <= min(place("feature_map"), place("query_map"))
