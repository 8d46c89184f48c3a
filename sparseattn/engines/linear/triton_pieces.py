"""A call as pieces that kernels are launched on, one after another, a state carried between them.

Where a mechanism says what its feature maps are, a call is one piece: the kernels evaluate them.
Other features are made by torch, and differentiated by it: a short call's at once, a long one's in
slabs along the positions of each run, so that memory does not grow with the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import wide
from ...runs import Run, trim_future
from .maps import FusedMap, in_words
from .sweeps import count_features
from .triton_launcher import Launcher, States, carries, span

# Elements of the features that torch makes at once.
_SLAB_ELEMENTS = 2**26


def declared(mechanism: Any, call: AttentionCall) -> tuple[FusedMap, FusedMap] | None:
    """The maps that these kernels can evaluate, of queries and of keys; None where torch must."""
    from .triton import config

    maps = in_words(mechanism, call)
    if maps is None:
        return None
    projected = maps[0].projection is not None
    if projected and (maps[0].turn is not None or call.head_dim > config.MOST_PROJECTED):
        return None
    return maps


class Fused:
    """A whole call, whose kernels evaluate the feature maps."""

    def __init__(self, launcher: Launcher) -> None:
        self.on = launcher

    def forward(self, out: Tensor, length: Tensor) -> None:
        """Write the outputs `[B, Hq, N, Dv]`, and the row sums `[B, Hq, N]` if they divide."""
        self.on.outputs(out, length, self.on.key_states())

    def grad_queries(self, grad: Tensor, length: Tensor, mean: Tensor, dq: Tensor) -> None:
        """Write dq, and length and mean as `grad_queries.py` has them."""
        _grad_queries(self.on, self.on.key_states(), grad, length, mean, dq)

    def grad_keys(self, grad: Tensor, length: Tensor, mean: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Write dk and dv."""
        states = self.on.query_states(grad, length, mean)
        self.on.grad_keys(grad, length, mean, dk, dv, states)


def _grad_queries(
    on: Launcher, states: States, grad: Tensor, length: Tensor, mean: Tensor, dq: Tensor
) -> None:
    if on.normalize:
        on.means(grad, length, mean, states)
    on.grad_queries(grad, length, mean, dq, states)


class _Carried:
    """The state after a piece, for the next one."""

    state: Tensor | None = None


class Slab:
    """A rectangle of a call, whose features torch makes.

    Args:
        rows, keys: which queries and keys of the call; positions: theirs, `[b or 1, 1, n]`.
        runs: of the rectangle alone; call: the rectangle's.
    """

    def __init__(
        self,
        mechanism: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: AttentionCall,
        runs: list[Run],
        where: tuple[slice, slice, slice],
        positions: tuple[Tensor, Tensor],
        carried: _Carried,
        backward: bool,
    ) -> None:
        self.backward = backward
        self.mechanism, self.call, self.runs = mechanism, call, runs
        batch, rows, keys = where
        self.queries, self.keys = (batch, slice(None), rows), (batch, slice(None), keys)
        self.q, self.k, self.v = q[self.queries], k[self.keys], v[self.keys]
        self.positions, self.carried = positions, carried

    def _features(self, grad_queries: bool = False, grad_keys: bool = False) -> Launcher:
        from .triton import config

        number, (at_q, at_k) = wide(self.call.dtype), self.positions
        self.x_q, self.x_k = (
            x.to(number).detach().requires_grad_(needed)
            for x, needed in ((self.q, grad_queries), (self.k, grad_keys))
        )
        with torch.set_grad_enabled(grad_queries):
            self.phi_q = self.mechanism.query_map(self.x_q, at_q, self.call).to(number)
        with torch.set_grad_enabled(grad_keys):
            self.phi_k = self.mechanism.feature_map(self.x_k, at_k, self.call).to(number)
        identity, factors = (FusedMap(), FusedMap()), config.products(self.call.dtype)
        return Launcher(
            *(self.phi_q.detach().to(factors), self.phi_k.detach().to(factors), self.v),
            *(self.call, self.runs, identity),
            *(self.mechanism.normalize, self.mechanism.decay(self.call), self.backward),
        )

    def _key_states(self, on: Launcher) -> States:
        states = on.key_states(self.carried.state)
        self.carried.state = states.end
        return states

    def forward(self, out: Tensor, length: Tensor) -> None:
        """As `Fused.forward`."""
        on = self._features()
        on.outputs(out[self.queries], length[self.queries], self._key_states(on))

    def grad_queries(self, grad: Tensor, length: Tensor, mean: Tensor, dq: Tensor) -> None:
        """As `Fused.grad_queries`."""
        on = self._features(grad_queries=True)
        d_phi = torch.zeros(on.q.shape, dtype=on.number, device=on.q.device)
        g, total, middle = (x[self.queries] for x in (grad, length, mean))
        _grad_queries(on, self._key_states(on), g, total, middle, d_phi)
        _pull_back(self.phi_q, self.x_q, d_phi, dq[self.queries])

    def grad_keys(self, grad: Tensor, length: Tensor, mean: Tensor, dk: Tensor, dv: Tensor) -> None:
        """As `Fused.grad_keys`."""
        on = self._features(grad_keys=True)
        g, total, middle = (x[self.queries] for x in (grad, length, mean))
        states = on.query_states(g, total, middle, self.carried.state)
        self.carried.state = states.end
        d_phi = torch.zeros(on.k.shape, dtype=on.number, device=on.k.device)
        on.grad_keys(g, total, middle, d_phi, dv[self.keys], states)
        _pull_back(self.phi_k, self.x_k, d_phi, dk[self.keys])


def _pull_back(phi: Tensor, x: Tensor, d_phi: Tensor, d_x: Tensor) -> None:
    if phi.requires_grad:  # else the map does not depend on its input
        d_x.copy_(torch.autograd.grad(phi, x, d_phi.to(phi.dtype))[0])
        # What nothing sees, or sees nothing, may be NaN, which 0 would not silence.
        d_x.masked_fill_((d_phi == 0).all(-1, keepdim=True), 0.0)


def pieces(
    mechanism: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    runs: list[Run],
    backward: bool = False,
    reverse: bool = False,
) -> Iterator[Fused | Slab]:
    """The pieces of a call, of its gradients if `backward`, in the order of their positions, or in
    reverse; runs are those of `cut`."""
    if not runs:
        return
    maps = declared(mechanism, call)
    if maps is not None:
        gamma = mechanism.decay(call)
        yield Fused(Launcher(q, k, v, call, runs, maps, mechanism.normalize, gamma, backward))
        return
    features = count_features(mechanism, k, call)
    rows = call.q_heads * call.n + call.kv_heads * call.m
    if call.batch * rows * features <= _SLAB_ELEMENTS:
        whole = slice(0, call.batch), slice(0, call.n), slice(0, call.m)
        places = _places(call, runs)
        yield Slab(mechanism, q, k, v, call, runs, whole, places, _Carried(), backward)
        return
    for run in runs:
        for batch in range(run.batch.start, run.batch.stop):
            carried = _Carried()
            slabs = list(_slabs(run, call, features, backward))
            for slab in reversed(slabs) if reverse else slabs:
                at, own, place = _cut_out(slab, run, batch, call)
                yield Slab(mechanism, q, k, v, own, [at], *place, carried, backward)


def _places(call: AttentionCall, runs: list[Run]) -> tuple[Tensor, Tensor]:
    """Positions of the queries and keys of a call, 0 where they are in no run."""
    alike = len(runs) == 1
    size = 1 if alike else call.batch
    at_q, at_k = (np.zeros((size, 1, count), dtype=np.int64) for count in (call.n, call.m))
    for run in runs:
        batch = slice(None) if alike else run.batch
        at_q[batch, :, run.queries] = np.arange(run.offset, run.offset + run.n)
        at_k[batch, :, run.keys] = np.arange(run.m)
    made = (torch.from_numpy(x).to(call.device) for x in (at_q, at_k))
    return next(made), next(made)


def _slabs(
    run: Run, call: AttentionCall, features: int, backward: bool
) -> Iterator[tuple[slice, slice, int]]:
    """Queries and keys of each slab, as slices of the run's, and where its positions start."""
    spanned = span(carries(call, features, backward))
    most = _SLAB_ELEMENTS // (features * (call.q_heads + call.kv_heads))
    size = max(1, most // spanned) * spanned
    nothing = slice(0, 0)
    if not call.causal:
        for start in range(0, run.m, size):
            yield nothing, slice(start, min(start + size, run.m)), start
        for start in range(0, run.n, size):
            yield slice(start, min(start + size, run.n)), nothing, 0
        return
    reach, row = trim_future(run.subcall(call)), max(0, -run.offset)
    for start in range(0, reach, size):
        stop = min(start + size, reach)
        last = min(max(start + size - run.offset, row), run.n)
        yield slice(row, last), slice(start, stop), start
        row = last
    # What is left stands after all keys; the state there is that of the end of the last span.
    end = -(-reach // spanned) * spanned
    for start in range(row, run.n, size):
        yield slice(start, min(start + size, run.n)), nothing, end


def _cut_out(
    slab: tuple[slice, slice, int], run: Run, batch: int, call: AttentionCall
) -> tuple[Run, AttentionCall, tuple[tuple[slice, slice, slice], tuple[Tensor, Tensor]]]:
    """A slab of one row of the batch: its run, its call, and where it stands in the whole."""
    rows, keys, origin = slab
    holes = None
    if run.holes is not None:
        own = batch - run.batch.start
        holes = run.holes[own : own + 1, keys]
    n, m = rows.stop - rows.start, keys.stop - keys.start
    offset = run.offset + rows.start
    at = Run(slice(0, 1), slice(0, n), slice(0, m), offset - origin, holes)
    part = call.replace(
        batch=1,
        n=n,
        m=m,
        q_offset=offset - origin,
        key_mask=holes,
        q_segments=None,
        kv_segments=None,
    )
    where = (
        slice(batch, batch + 1),
        slice(run.queries.start + rows.start, run.queries.start + rows.stop),
        slice(run.keys.start + keys.start, run.keys.start + keys.stop),
    )
    positions = (
        torch.arange(offset, offset + n, device=call.device)[None, None],
        torch.arange(keys.start, keys.stop, device=call.device)[None, None],
    )
    return at, part, (where, positions)
