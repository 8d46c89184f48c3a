"""Decode caches of constant size for static patterns of bounded reach: windows, sinks, chunks.

What such a pattern needs is read off its clauses: the first `sinks` keys of each row, and the last
`reach` keys before a query. Which of the kept keys a query sees is asked of its definition, at
their true positions, so that one cache serves every such pattern.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .cache import Cache, keeping, starts
from .cache_rows import ROW_KERNELS, attend_rows
from .call import AttentionCall, Placement
from .clauses import Band, Chunks, FirstKeys, FirstQueries, Term
from .errors import SparseAttnError
from .layout import Grid

if TYPE_CHECKING:
    from .base import Mechanism
    from .implementation import Implementation

# Grids on which a pattern must say the same of itself, to be believed for all.
_GRIDS = ((1, 1), (48, 48), (1, 2**12), (1, 2**16))
_ROOM = 2**10  # keys held at once from the start; more come by doubling
_PAIRS = 2**20  # of a piece of a chunk and the keys it is weighed with
_LEAST_PIECE = 16


class Bound(NamedTuple):
    """Keys that a causal query at position i may see: `j < sinks` or `i - reach <= j <= i`.

    `exactly` says that it sees all of them.
    """

    sinks: int
    reach: int
    exactly: bool


def _bound_of_term(term: Term) -> tuple[int, int] | None:
    """(sinks, reach) of an intersection; None where it is unbounded."""
    reaches, firsts = [], []
    for clause in term:
        if isinstance(clause, Band) and clause.left is not None:
            reaches.append(max(clause.left, 0))
        elif isinstance(clause, Chunks):
            reaches.append(clause.size - 1)
        elif isinstance(clause, FirstQueries):  # which stand before `count`, and so do their keys
            reaches.append(max(clause.count - 1, 0))
        elif isinstance(clause, FirstKeys):
            firsts.append(clause.count)
    if reaches and (not firsts or min(reaches) < min(firsts)):
        return 0, min(reaches)
    return (min(firsts), 0) if firsts else None


def _bound_on(mechanism: Any, n: int, m: int) -> Bound | None:
    terms = mechanism.clauses(Grid(n, m, True)).terms
    found = [_bound_of_term(term) for term in terms]
    sinks = reach = 0
    for one in found:
        if one is None:
            return None
        sinks, reach = max(sinks, one[0]), max(reach, one[1])
    alone = [term[0] for term in terms if len(term) == 1]
    near = any(
        isinstance(x, Band) and x.left == reach and (x.right is None or x.right >= 0) for x in alone
    )
    return Bound(sinks, reach, near and (sinks == 0 or FirstKeys(sinks) in alone))


def sees_all(mechanism: Any) -> bool:
    """Whether a static pattern says that it uses every pair."""
    try:
        return all(mechanism.clauses(Grid(n, m, True)).terms == ((),) for n, m in _GRIDS)
    except SparseAttnError:
        return False


def bound_of(mechanism: Mechanism) -> Bound | None:
    """What a static pattern needs of the past, or None where that grows with the past."""
    try:
        found = {_bound_on(mechanism, n, m) for n, m in _GRIDS}
    except SparseAttnError:  # it serves no such length
        return None
    return found.pop() if len(found) == 1 else None


class _Buffers(NamedTuple):
    """Kept keys: `sinks` slots, slot s for position s of each row, then `ring` slots, slot
    `t % ring` for token t.

    `mask` is bool `[B, sinks + ring]`, or None while no key was masked.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: int
    ring: int


class RingCache(Cache):
    """Keeps the first `sinks` keys of each row and the last `reach`, whatever the length."""

    def __init__(self, mechanism: Mechanism, *args: Any, bound: Bound, **kwargs: Any) -> None:
        super().__init__(mechanism, *args, **kwargs)
        self.bound = bound
        self.most = bound.reach + 1  # slots of the ring: one for the token that comes
        with keeping():
            self._clear()

    def _clear(self) -> None:
        self._first: list[int] | None = None
        self._held = self._empty(min(self.bound.sinks, _ROOM), min(self.most, _ROOM))

    def _empty(self, sinks: int, ring: int) -> _Buffers:
        k, v = (
            torch.zeros(
                *(self.batch, self.kv_heads, sinks + ring, width),
                dtype=self.dtype,
                device=self.device,
            )
            for width in (self.head_dim, self.value_dim)
        )
        return _Buffers(k, v, None, sinks, ring)

    def _tensors(self) -> list[Tensor]:
        return [x for x in self._held[:3] if x is not None]

    def _select(self, index: Tensor) -> None:
        held = self._held
        mask = None if held.mask is None else held.mask[index]
        self._held = held._replace(k=held.k[index], v=held.v[index], mask=mask)
        if self._first is not None:
            self._first = [self._first[row] for row in index.tolist()]

    # Writing: what a buffer holds for tokens that `length` does not count, nothing reads, and what
    # the slot of a new token held before, no later query can reach.

    def _room(self, total: int, masked: bool) -> _Buffers:
        """The buffers, or larger ones with the same content, for so many tokens."""
        old = self._held
        sinks, ring = min(self.bound.sinks, total), min(self.most, total)
        if sinks > old.sinks or ring > old.ring:
            # A ring that grows has not come round yet: its slots are still the tokens' numbers.
            sinks = max(old.sinks, min(self.bound.sinks, max(sinks, 2 * old.sinks)))
            ring = max(old.ring, min(self.most, max(ring, 2 * old.ring)))
            new = self._empty(sinks, ring)
            for to, what in ((new.k, old.k), (new.v, old.v)):
                to[:, :, : old.sinks] = what[:, :, : old.sinks]
                to[:, :, sinks : sinks + old.ring] = what[:, :, old.sinks :]
            if old.mask is not None:
                mask = torch.ones(self.batch, sinks + ring, dtype=torch.bool, device=self.device)
                mask[:, : old.sinks] = old.mask[:, : old.sinks]
                mask[:, sinks : sinks + old.ring] = old.mask[:, old.sinks :]
                new = new._replace(mask=mask)
            old = new
        if masked and old.mask is None:
            shape = (self.batch, old.sinks + old.ring)
            old = old._replace(mask=torch.ones(shape, dtype=torch.bool, device=self.device))
        return old

    def _put_sinks(
        self, held: _Buffers, k: Tensor, v: Tensor, mask: Tensor | None, first: list[int] | None
    ) -> None:
        """Write the new tokens that are among the first of their row."""
        most, seen, n = self.bound.sinks, self.length, k.shape[2]
        rows: list[tuple[Any, int]] = [(slice(None), 0)]
        if first is not None:
            rows = [(slice(b, b + 1), x) for b, x in enumerate(first) if x >= 0]
        for row, start in rows:
            low, high = max(seen - start, 0), min(seen + n - start, most)
            if low >= high:
                continue
            new = slice(start + low - seen, start + high - seen)
            held.k[row, :, low:high] = k[row, :, new]
            held.v[row, :, low:high] = v[row, :, new]
            if held.mask is not None:
                held.mask[row, low:high] = True if mask is None else mask[row, new]

    def _put_ring(self, held: _Buffers, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Write the last of the new tokens into their slots."""
        n = k.shape[2]
        last = min(n, held.ring)
        at: Any
        if n == 1:
            slot = held.sinks + self.length % held.ring
            at = slice(slot, slot + 1)
        else:
            tokens = torch.arange(n - last, n, device=self.device) + self.length
            at = held.sinks + tokens % held.ring
        held.k[:, :, at] = k[:, :, n - last :]
        held.v[:, :, at] = v[:, :, n - last :]
        if held.mask is not None:
            held.mask[:, at] = True if mask is None else mask[:, n - last :]

    def _append(self, k: Tensor, v: Tensor, call: AttentionCall, ready: Any) -> None:
        mask = self.new_mask(call)
        first = starts(self._first, self.length, call, mask)
        held = self._room(call.m, mask is not None) if ready is None else ready
        if call.n and ready is None:
            self._put_sinks(held, k, v, mask, first)
        if call.n and (ready is None or call.n > 1):
            self._put_ring(held, k, v, mask)
        self._first, self._held = first, held

    # Reading.

    def serves(self, implementation: Implementation, call: AttentionCall) -> list[str]:
        if self.length == 0:
            return []
        known = getattr(implementation, "kernel", "")
        if known in ROW_KERNELS or implementation.name == "reference":
            return []
        return [
            "it takes whole calls, and this cache keeps only the keys that later queries may see; "
            'the engine ("torch", "native", "triton") and "reference" can use those'
        ]

    def attend(
        self, implementation: Implementation, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        if self.length == 0:
            return implementation.run(self.mechanism, q, k, v, call)
        if call.n == 0:
            return implementation.run(self.mechanism, q, k, v, call.replace(m=0, key_mask=None))
        mask = self.new_mask(call)
        first = starts(self._first, self.length, call, mask)
        with keeping():
            held = self._room(call.m, mask is not None)
            self._put_sinks(held, k, v, mask, first)
            if call.n == 1:
                self._put_ring(held, k, v, mask)
        if call.n == 1:
            result = self._step(implementation, q, held, first, call)
        else:
            result = self._chunk(implementation, q, k, v, held, first, mask, call)
        self._ready = (call, held)
        return result

    def _places(self, tokens: Tensor, first: list[int] | None) -> Tensor:
        """Positions of tokens `[L]` in each row: `[1 or B, L]`; those of a row that has not begun
        are negative."""
        if first is None:
            return tokens[None]
        begun = [x if x >= 0 else 2**40 for x in first]
        return tokens[None] - torch.tensor(begun, device=self.device)[:, None]

    def _kept(
        self,
        implementation: Implementation,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tokens: tuple[Tensor, Tensor],
        mask: Tensor | None,
        first: list[int] | None,
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over kept keys: the sinks, then keys by token.

        Args:
            q: `[B, Hq, n, D]`; k, v: `[B, Hkv, L, .]`.
            tokens: which tokens the queries `[n]` and the keys after the sinks `[L - sinks]` are;
                those before token 0 are empty slots.
            mask: bool `[B, L]` or None.
        """
        at_q, at_k = (self._places(x, first) for x in tokens)
        sinks = k.shape[2] - at_k.shape[1]
        # Each key counts once: a sink among the last keys is hidden there.
        own = at_k >= self.bound.sinks
        if sinks:
            slots = torch.arange(sinks, device=self.device)[None].expand(at_k.shape[0], -1)
            at_k = torch.cat([slots, at_k], dim=1)
            own = torch.nn.functional.pad(own, (sinks, 0), value=True)
        own = own.expand(self.batch, -1) if mask is None else own & mask
        n = q.shape[2]
        extent = (at_q[:, -1:] + 1).expand(-1, n)
        call = call.replace(
            n=n, m=k.shape[2], key_mask=own, fixed_placement=Placement(at_q, at_k, extent)
        )
        if implementation.name == "reference":
            return implementation.run(self.mechanism, q, k, v, call)
        kernel = implementation.kernel  # type: ignore[attr-defined]  # see `serves`
        if kernel == "softmax:torch" and bool(own.all()):
            call = call.replace(key_mask=None)
        return attend_rows(self.mechanism, q, k, v, call, kernel=kernel)

    def _step(
        self,
        implementation: Implementation,
        q: Tensor,
        held: _Buffers,
        first: list[int] | None,
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor | None]:
        """One new token, which the buffers hold already."""
        total = self.length + 1
        k, v, mask = held.k, held.v, held.mask
        used = min(held.ring, total)
        if used < held.ring:
            stop = held.sinks + used
            k, v = k[:, :, :stop], v[:, :, :stop]
            mask = None if mask is None else mask[:, :stop]
        whole = first is None and mask is None and implementation.name != "reference"
        if whole and self.bound.exactly and total - used >= self.bound.sinks:
            kernel = implementation.kernel  # type: ignore[attr-defined]
            return attend_rows(self.mechanism, q, k, v, call, True, kernel)
        slots = torch.arange(used, device=self.device)
        tokens = self.length - (self.length - slots) % held.ring
        at = torch.tensor([self.length], device=self.device)
        return self._kept(implementation, q, k, v, (at, tokens), mask, first, call)

    def _chunk(
        self,
        implementation: Implementation,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        held: _Buffers,
        first: list[int] | None,
        mask: Tensor | None,
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor | None]:
        """Several new tokens, piece by piece: each sees the sinks, and what is near in one line of
        the last keys kept and the new ones."""
        near = min(self.length, self.bound.reach)
        tokens = torch.arange(self.length - near, call.m, device=self.device)
        slots = held.sinks + tokens[:near] % held.ring
        line_k = torch.cat([held.k[:, :, slots], k], dim=2)
        line_v = torch.cat([held.v[:, :, slots], v], dim=2)
        line_mask = None
        if held.mask is not None:
            new = held.mask.new_ones(self.batch, call.n) if mask is None else mask
            line_mask = torch.cat([held.mask[:, slots], new], dim=1)
        sinks = min(held.sinks, call.m)
        reach = self.bound.reach
        size = max(_LEAST_PIECE, min(reach, _PAIRS // (sinks + 2 * reach + 1)))
        outs, lses = [], []
        for start in range(0, call.n, size):
            stop = min(start + size, call.n)
            line = slice(max(0, near + start - reach), near + stop)
            ks, vs, own = line_k[:, :, line], line_v[:, :, line], None
            if line_mask is not None:
                own = line_mask[:, line]
            if sinks:
                ks = torch.cat([held.k[:, :, :sinks], ks], dim=2)
                vs = torch.cat([held.v[:, :, :sinks], vs], dim=2)
                if own is not None and held.mask is not None:
                    own = torch.cat([held.mask[:, :sinks], own], dim=1)
            at = (tokens[near + start : near + stop], tokens[line])
            part = q[:, :, start:stop]
            out, lse = self._kept(implementation, part, ks, vs, at, own, first, call)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, dim=2), None if lses[0] is None else torch.cat(lses, dim=2)  # type: ignore[arg-type]
