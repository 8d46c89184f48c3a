"""The calls that laws are tried on: small, seeded, and ordered from the smallest to the largest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_DEFAULT_WIDTH = 4


@dataclass(frozen=True)
class Case:
    """One call, described so that a failure can be read and built again.

    Attributes:
        n, m: queries and keys; m None is n.
        batch, heads, kv_heads, d, dv: the other sizes; kv_heads None is heads, dv None is d.
        dtype: a name of `torch`, such as `float32`.
        softcap, scale: as in `attention`. sink: whether the call has sink logits.
        bias: the axes over which `bias` is not broadcast: `hnm` is [1, Hq, N, M]; "" is no bias.
        mask: what `key_mask` hides: `left` or `right` padding, `holes`, all of one row (`nothing`),
            the last keys (`tail`), a long run `within`, or no mask at all.
        documents: (queries, keys) of each packed document.
        offset: `q_offset`; "tensor" is a different one for each row, "apart" before the first key,
            within and past the last.
        strides: `contiguous`, `transposed` heads and lengths, `expanded` over the batch, `spread`
            out to every second number of every second row, or `columns` first.
        spread: standard deviation of q and k. loud: factor of v.
    """

    n: int
    m: int | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int | None = None
    d: int = _DEFAULT_WIDTH
    dv: int | None = None
    dtype: str = "float32"
    causal: bool = False
    scale: float | None = None
    softcap: float | None = None
    sink: bool = False
    bias: str = ""
    mask: str = ""
    documents: tuple[tuple[int, int], ...] = ()
    offset: int | str | None = None
    strides: str = "contiguous"
    spread: float = 1.0
    loud: float = 1.0
    seed: int = 0

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return self.n if self.m is None else self.m

    def but(self, **changes: Any) -> Case:
        """The same case with some fields changed."""
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        kv = self.heads if self.kv_heads is None else self.kv_heads
        dv = self.d if self.dv is None else self.dv
        words = [
            f"q {[self.batch, self.heads, self.n, self.d]}",
            f"k {[self.batch, kv, self.keys, self.d]}",
            f"v {[self.batch, kv, self.keys, dv]}",
            self.dtype,
            "causal" if self.causal else "not causal",
        ]
        shown = ("scale", "softcap", "sink", "bias", "mask", "documents", "offset")
        for word in shown:
            value = getattr(self, word)
            if not (value is None or value is False or value in ("", ())):
                words.append(f"{word}={value}")
        words += [f"strides={self.strides}"] if self.strides != "contiguous" else []
        words += [f"spread={self.spread:g}"] if self.spread != 1 else []
        words += [f"loud={self.loud:g}"] if self.loud != 1 else []
        return ", ".join([*words, f"seed={self.seed}"])

    def generator(self) -> torch.Generator:
        """The source of the case's numbers."""
        return torch.Generator().manual_seed(1000 + self.seed)

    def inputs(self) -> Inputs:
        """Fresh tensors of the case: the same numbers each time."""
        g = self.generator()
        dtype = getattr(torch, self.dtype)
        kv = self.heads if self.kv_heads is None else self.kv_heads
        dv = self.d if self.dv is None else self.dv

        q = self._laid_out((self.batch, self.heads, self.n, self.d), self.spread, g)
        k = self._laid_out((self.batch, kv, self.keys, self.d), self.spread, g)
        v = self._laid_out((self.batch, kv, self.keys, dv), self.loud, g)
        kw: dict[str, Any] = {"causal": self.causal}
        if self.scale is not None:
            kw["scale"] = self.scale
        if self.softcap is not None:
            kw["softcap"] = self.softcap
        if self.sink:
            kw["sink_logits"] = torch.randn(self.heads, generator=g, dtype=torch.float64).to(dtype)
        if self.bias:
            sizes = {"b": self.batch, "h": self.heads, "n": self.n, "m": self.keys}
            shape = tuple(size if axis in self.bias else 1 for axis, size in sizes.items())
            kw["bias"] = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        if self.mask:
            kw["key_mask"] = self._key_mask(g)
        if self.documents:
            kw |= self._segments()
        if self.offset == "tensor":
            kw["q_offset"] = self.keys - self.n - torch.arange(self.batch)
        elif self.offset == "apart":
            starts = torch.tensor([-self.n - 2, self.keys // 2, self.keys + 2])
            kw["q_offset"] = starts[torch.arange(self.batch) % 3]
        elif self.offset is not None:
            kw["q_offset"] = self.offset
        return Inputs(q, k, v, kw)

    def _laid_out(self, shape: tuple[int, ...], spread: float, g: torch.Generator) -> Tensor:
        """Random numbers of a shape `[B, H, n, d]`, in memory as `strides` says."""
        dtype = getattr(torch, self.dtype)
        b, h, n, d = shape

        def made(*sizes: int) -> Tensor:
            return (torch.randn(sizes, generator=g, dtype=torch.float64) * spread).to(dtype)

        if self.strides == "expanded":
            return made(1, h, n, d).expand(shape)
        if self.strides == "transposed":
            return made(b, n, h, d).transpose(1, 2)
        if self.strides == "columns":
            return made(b, h, d, n).transpose(2, 3)
        if self.strides == "spread":
            return made(b, h, 2 * n + 1, 2 * d)[:, :, 1::2, ::2]
        return made(*shape)

    def _key_mask(self, g: torch.Generator) -> Tensor:
        mask = torch.ones(self.batch, self.keys, dtype=torch.bool)
        rows = torch.arange(self.batch)[:, None]
        at = torch.arange(self.keys)[None]
        # Each row hides another number of keys, the first a third of them.
        count = (self.keys // 3 + rows) % max(self.keys, 1)
        if self.mask == "left":
            return at >= count
        if self.mask == "right":
            return at < self.keys - count
        if self.mask == "tail":
            return (at < self.keys - max(1, self.keys // 4)).expand_as(mask).clone()
        if self.mask == "within":
            first = self.keys // 3 + rows
            return (at < first) | (at >= first + self.keys // 2)
        if self.mask == "nothing":
            mask[0] = False
            return mask
        holes = torch.rand(self.batch, self.keys, generator=g) < 0.3
        return mask & ~holes

    def _segments(self) -> dict[str, Tensor]:
        # Ids are neither sorted nor small: only their equality may count.
        names = [(7 * at + 3) % 11 + 11 * (at // 11) for at in range(len(self.documents))]
        q_ids = [name for name, (n, _) in zip(names, self.documents, strict=True) for _ in range(n)]
        k_ids = [name for name, (_, m) in zip(names, self.documents, strict=True) for _ in range(m)]
        one = {"q_segments": torch.tensor(q_ids), "kv_segments": torch.tensor(k_ids)}
        return {word: ids[None].repeat(self.batch, 1) for word, ids in one.items()}


@dataclass
class Inputs:
    """Tensors of a call: q `[B, Hq, N, D]`, k `[B, Hkv, M, D]`, v `[B, Hkv, M, Dv]`, keywords."""

    q: Tensor
    k: Tensor
    v: Tensor
    kw: dict[str, Any]

    def but(self, **changes: Any) -> Inputs:
        """A copy with other tensors (`q`, `k`, `v`) or other keywords; None takes one away."""
        own = {word: changes.pop(word, getattr(self, word)) for word in ("q", "k", "v")}
        kw = {word: x for word, x in (self.kw | changes).items() if x is not None}
        return Inputs(own["q"], own["k"], own["v"], kw)

    def clone(self) -> Inputs:
        """The same numbers in other memory."""
        kw = {w: x.clone() if isinstance(x, Tensor) else x for w, x in self.kw.items()}
        return Inputs(self.q.clone(), self.k.clone(), self.v.clone(), kw)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the call by its name."""
        kw = {word: x for word, x in self.kw.items() if isinstance(x, Tensor)}
        return {"q": self.q, "k": self.k, "v": self.v, **kw}

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that have gradients, in the order in which budgets judge them."""
        found = self.tensors()
        return {w: found[w] for w in ("q", "k", "v", "sink_logits", "bias") if w in found}
