"""The calls that between them choose every kernel configuration: dtypes, widths, patterns, options.

What decides a configuration is the dtype that is computed in, the head widths, whether a pattern is
a band or lists of blocks, holes in the key mask, a softcap, and the query heads of a group; lengths
do not. Beside these calls, each mechanism is called by its name, so that a new kernel comes in by
itself. No call here depends on a device: `make` draws inputs for any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import sparseattn as sa
from sparseattn.testing import default

REFUSALS = (sa.UnsupportedCallError, sa.InvalidInputError, NotImplementedError)
BAND = "windowed(window=100)"
LISTS = "bigbird(block=8, window_blocks=1, global_blocks=1, random_blocks=1)"
# Lengths: so many that half and single precision compute as they are, with gradients too; and by
# the heads of a group, so few that twice the digits are used (`FEW_PAIRS` of the operator).
_ENOUGH, _FEW = 600, {1: 48, 4: 31, 16: 15}
WIDTHS = (64, 128, 256)  # where the tables of tiles have an entry
_HALF, _SINGLE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Call:
    """One call of the public function with `impl="triton"`.

    Attributes:
        mech: the mechanism, or its spec. dtype: of q, k and v.
        width, value_width: of the heads; values are as wide as keys where it is 0.
        group: query heads for one of keys and values.
        few: so few tokens that twice the digits are used: float64 for float32.
        holes: a key mask that hides some keys in the middle. backward: with gradients.
        steps: new tokens of a decoding call, after a cache took in the others; 0 for none.
    """

    mech: Any
    dtype: torch.dtype = _HALF
    width: int = 128
    value_width: int = 0
    group: int = 1
    few: bool = False
    causal: bool = True
    holes: bool = False
    softcap: bool = False
    backward: bool = False
    steps: int = 0

    @property
    def n(self) -> int:
        """Queries and keys."""
        return _FEW[self.group] if self.few else _ENOUGH

    @property
    def name(self) -> str:
        """The call in a line."""
        words = [str(self.mech), str(self.dtype).removeprefix("torch."), f"D={self.width}"]
        words += [f"Dv={self.value_width}"] if self.value_width else []
        words += [f"group={self.group}"] if self.group > 1 else []
        words += [] if self.causal else ["not causal"]
        words += [word for word in ("few", "holes", "softcap", "backward") if getattr(self, word)]
        words += [f"decode {self.steps}"] if self.steps else []
        return ", ".join(words)

    def make(self, device: str = "cpu", seed: int = 0) -> tuple[dict[str, Any], Tensor]:
        """Keywords of `sa.attention` but the mechanism, and a gradient of its output."""
        g = torch.Generator().manual_seed(seed)

        def normal(heads: int, width: int) -> Tensor:
            drawn = torch.randn(1, heads, self.n, width, generator=g)
            return drawn.to(device=device, dtype=self.dtype)

        value_width = self.value_width or self.width
        kv = 1 if self.group > 1 or self.few else 2
        q, k, v = (
            normal(kv * self.group, self.width),
            normal(kv, self.width),
            normal(kv, value_width),
        )
        made: dict[str, Any] = {"q": q, "k": k, "v": v, "causal": self.causal}
        if self.holes:
            mask = torch.ones(1, self.n, dtype=torch.bool)
            mask[:, self.n // 3 : self.n // 2 : 3] = False
            made["key_mask"] = mask.to(device)
        if self.softcap:
            made["softcap"] = 20.0
        return made, normal(kv * self.group, value_width)

    def run(self, device: str = "cpu", impl: str = "triton") -> tuple[Tensor, ...]:
        """The output, and with `backward` the gradients of q, k and v."""
        made, grad = self.make(device)
        mech = sa.mechanism(self.mech) if isinstance(self.mech, str) else self.mech
        if self.steps:
            return (self._decode(mech, made, impl),)
        inputs = [made[word] for word in "qkv"]
        if not self.backward:
            return (sa.attention(mechanism=mech, impl=impl, **made),)
        for x in inputs:
            x.requires_grad_()
        out = sa.attention(mechanism=mech, impl=impl, **made)
        return (out, *torch.autograd.grad(out, inputs, grad))

    def _decode(self, mech: sa.Mechanism, made: dict[str, Any], impl: str) -> Tensor:
        q, k, v = (made.pop(word) for word in "qkv")
        cache = mech.new_cache(
            k.shape[0], k.shape[1], k.shape[3], v.shape[3], dtype=k.dtype, device=k.device
        )
        made.pop("key_mask", None)
        before = slice(0, self.n - self.steps)
        # What fills the cache is another call's matter.
        sa.attention(q[:, :, before], k[:, :, before], v[:, :, before], mech, cache=cache, **made)
        new = slice(self.n - self.steps, None)
        return sa.attention(
            q[:, :, new], k[:, :, new], v[:, :, new], mech, cache=cache, impl=impl, **made
        )


def _hard(call: Call) -> Call:
    """The call with all that needs registers."""
    return replace(call, holes=True, softcap=True, group=4)


def _softmax() -> Iterator[Call]:
    for spec in (BAND, LISTS):
        for dtype, few in ((_HALF, False), (_SINGLE, False), (_SINGLE, True)):
            base = Call(spec, dtype, few=few)
            for width in WIDTHS:
                yield replace(base, width=width)
            for width in (16, 32, 80, *WIDTHS):
                yield _hard(replace(base, width=width))
        base = Call(spec)
        for width in WIDTHS:
            yield _hard(replace(base, width=width, dtype=torch.float16))
        for group in (2, 3, 8, 16):
            yield replace(base, group=group)
        for few in (False, True):
            yield replace(base, group=16, dtype=_SINGLE, few=few)
        yield replace(base, width=192, value_width=128)
        yield replace(base, width=100)  # rows that no wide load may begin at
        yield replace(base, holes=True)
        yield replace(base, softcap=True)
        yield replace(base, causal=False)


def _mechanisms(dtypes: Sequence[torch.dtype], widths: Sequence[int]) -> Iterator[Call]:
    """Every mechanism by its name: in one call, in a step of decoding, and in a longer piece."""
    for record in sa.list_mechanisms():
        if record.provider != "sparseattn":
            continue
        mech = default(record.name)
        for dtype in dtypes:
            for width in widths:
                base = Call(mech, dtype, width)
                yield base
                if not mech.looks_ahead:
                    yield replace(base, backward=True)
                    yield replace(base, steps=1)
                    yield replace(base, steps=9, group=4)


def every() -> list[Call]:
    """The calls of the full check."""
    softmax = [replace(one, backward=way) for one in _softmax() for way in (False, True)]
    # So few features that a program carries their state, as it does not with the default.
    carried = Call("performer(features=128)", width=64, backward=True)
    return [*softmax, *_mechanisms((_HALF, _SINGLE), (64, 128)), carried]


def representative() -> list[Call]:
    """Each entry of the tables of tiles once, with all that needs registers; each kernel."""
    made = []
    for at, width in enumerate(WIDTHS):
        for then, (dtype, few) in enumerate(((_HALF, False), (_SINGLE, False), (_SINGLE, True))):
            spec = (BAND, LISTS)[(at + then) % 2]
            one = _hard(Call(spec, dtype, width, few=few))
            made += [one, replace(one, backward=True)]
    return [*made, *_mechanisms((_HALF,), (64,))]


def brief() -> list[Call]:
    """What the tests compile: each kernel of both engines, at one width."""
    names = ("topk_blocks", "linear", "retention")
    return [
        Call(BAND, _HALF, 128, backward=True),
        _hard(Call(LISTS, _HALF, 64, backward=True)),
        Call(BAND, _SINGLE, 64, few=True),
        Call(BAND, _HALF, 64, steps=1),
        *(Call(default(name), _HALF, 64, backward=True) for name in names),
        Call(default("linear"), _SINGLE, 64, backward=True),  # whose kernels carry no state
    ]
