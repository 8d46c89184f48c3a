"""The linear engine in torch alone: any device, no compiler.

`out_i = sum_j W_ij v_j` with `W_ij = gamma ** (i - j) phi(q_i) . phi(k_j)` over the keys that query
i sees, divided by the sum of row i of W unless the mechanism says otherwise. A column of ones beside
v makes that sum one more output, so that numerator and denominator come from the same products.

Time is O(N), memory O(rows of a step x features), forward and backward: the backward makes features
anew, and sweeps twice. Forwards along the positions it has the state `S = sum_j phi(k_j) [v_j, 1]^T`
of the keys seen, which gives the queries' gradients; backwards it has `R = sum_i phi(q_i) g_i^T` of
the queries that see a key, which gives the keys' and values'. Feature maps are differentiated by
autograd, on the rows of one step alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...runs import Run, cut, trim_future
from ..op import KERNELS
from .plan import CHUNK, MOST_CHUNKS, Decay, Step, plan, state_elements

_FEATURES: dict[tuple[Any, int], int] = {}  # of a mechanism and head width: only for step sizes


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _count_features(mechanism: Any, k: Tensor, call: AttentionCall) -> int:
    key = mechanism, call.head_dim
    found = _FEATURES.get(key)
    if found is None:
        position = torch.zeros(1, 1, 1, dtype=torch.int64, device=k.device)
        row = torch.zeros_like(k[:, :, :1], dtype=_wide(k.dtype))
        found = _FEATURES[key] = mechanism.feature_map(row, position, call).shape[-1]
    return found


class _Sweeps:
    """One run: its inputs, and what both directions share.

    State and features are folded so that every product is a batched matrix product. A head of the
    state is a key-value head, whose query heads are rows of one matrix; with a decay, which differs
    between query heads, it is a query head, and chunks of keys are repeated for it.
    """

    def __init__(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> None:
        self.mechanism, self.call = mechanism, call
        self.q, self.k, self.v = q, k, v
        self.dtype = _wide(q.dtype)
        gamma = mechanism.decay(call)
        self.decay = None if gamma is None else Decay(gamma, self.dtype, q.device)
        self.heads = call.kv_heads if gamma is None else call.q_heads
        self.groups = call.q_heads // self.heads
        self.width = call.value_dim + int(mechanism.normalize)
        self.features = _count_features(mechanism, k, call)
        size = call.batch * self.heads * self.features * self.width
        chunks = max(1, min(MOST_CHUNKS, state_elements(q.device) // size))
        self.steps = plan(call, chunks)
        self._values: dict[int, Tensor] = {}

    # Rows of a step, folded: `[b, H, L, x]` -> `[b * heads * chunks, rows of a chunk, x]`.

    def rows(self, step: Step) -> slice:
        """The step's queries, as rows of q."""
        offset = int(self.call.offset)
        return slice(step.start - offset, step.stop - offset)

    def fold_queries(self, x: Tensor, step: Step) -> Tensor:
        b, c, g, size = self.call.batch, step.chunks, self.groups, step.size
        x = x.reshape(b * self.heads, g, c, size, x.shape[-1]).transpose(1, 2)
        return x.reshape(b * self.heads * c, g * size, x.shape[-1])

    def unfold_queries(self, x: Tensor, step: Step) -> Tensor:
        """A view wherever a step has one chunk or the heads are not grouped."""
        b, c, g, size = self.call.batch, step.chunks, self.groups, step.size
        x = x.reshape(b * self.heads, c, g, size, x.shape[-1]).transpose(1, 2)
        return x.reshape(b, self.call.q_heads, c * size, x.shape[-1])

    def fold_keys(self, x: Tensor, step: Step) -> Tensor:
        repeats = self.heads // self.call.kv_heads
        if repeats > 1:
            x = x[:, :, None].expand(-1, -1, repeats, -1, -1)
        return x.reshape(self.call.batch * self.heads * step.chunks, step.size, x.shape[-1])

    def unfold_keys(self, x: Tensor, step: Step) -> Tensor:
        b, kv = self.call.batch, self.call.kv_heads
        x = x.reshape(b, kv, self.heads // kv, step.chunks * step.size, x.shape[-1])
        return x.sum(2) if x.shape[2] > 1 else x[:, :, 0]

    def positions(self, step: Step) -> Tensor:
        return torch.arange(step.start, step.stop, device=self.q.device)[None, None]

    def query_input(self, step: Step) -> Tensor:
        return self.q[:, :, self.rows(step)].to(self.dtype)

    def key_input(self, step: Step) -> Tensor:
        return self.k[:, :, step.start : step.stop].to(self.dtype)

    def query_features(self, x: Tensor, step: Step) -> Tensor:
        return self.mechanism.query_map(x, self.positions(step), self.call).to(self.dtype)

    def key_features(self, x: Tensor, step: Step) -> Tensor:
        phi = self.mechanism.feature_map(x, self.positions(step), self.call).to(self.dtype)
        if self.call.key_mask is not None:
            hidden = ~self.call.key_mask[:, None, step.start : step.stop, None]
            phi = phi.masked_fill(hidden, 0.0)
        return phi

    def values(self, step: Step) -> Tensor:
        """v of the step and its column of ones, folded; overwritten by the next call."""
        v = self.v[:, :, step.start : step.stop]
        held = self._values.get(v.shape[2])
        if held is None:
            shape = (*v.shape[:3], self.width)
            held = self._values[v.shape[2]] = torch.ones(shape, dtype=self.dtype, device=v.device)
        held[..., : v.shape[3]] = v
        return self.fold_keys(held, step)

    # Products.

    def weigh(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        """`x . y` for the causal pairs of each chunk, with their decay; exactly 0 elsewhere."""
        scores = torch.bmm(x, y.transpose(1, 2))
        pairs = scores.view(self.call.batch, self.heads, -1, step.size, step.size)
        if self.decay is not None:
            pairs.mul_(self.decay.within(step.size))
        pairs.tril_()  # after the product: what it writes is 0 whatever stood there
        return scores

    def decayed(self, x: Tensor, step: Step, powers: str) -> Tensor:
        """Rows times `since_start` or `until_end` of their chunk."""
        if self.decay is None:
            return x
        by = getattr(self.decay, powers)(step.size)
        shape = (self.call.batch, self.heads, step.chunks, step.size, x.shape[-1])
        return (x.reshape(shape) * by).view(x.shape)

    def new_state(self) -> Tensor:
        shape = (self.call.batch, self.heads, self.features, self.width)
        return torch.zeros(shape, dtype=self.dtype, device=self.q.device)

    def scan(
        self, state: Tensor, added: Tensor | None, step: Step, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The state that each chunk of a step meets, and the one after all of them.

        Args:
            state: `[b, heads, F, E]`, met by the first chunk (the last one in `reverse`).
            added: what the chunks add, `[b * heads * chunks, F, E]`, or None for nothing.
        """
        if added is None and self.decay is None:  # nothing changes
            met = state
            if step.chunks > 1:
                met = state[:, :, None].expand(-1, -1, step.chunks, -1, -1)
            return met.reshape(-1, *state.shape[2:]), state
        order = range(step.chunks - 1, -1, -1) if reverse else range(step.chunks)
        if added is not None:
            added = added.view(*state.shape[:2], step.chunks, *state.shape[2:])
        met = state[:, :, None]
        if step.chunks > 1:
            met = torch.empty(
                (*state.shape[:2], step.chunks, *state.shape[2:]),
                dtype=state.dtype,
                device=state.device,
            )
        for i in order:
            if step.chunks > 1:
                met[:, :, i] = state
            if self.decay is not None:
                state = self.decay.across(state, step.size)
            if added is not None:
                state = state + added[:, :, i]
        return met.reshape(-1, *state.shape[2:]), state

    def take_keys(
        self, step: Step, state: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Features and values of a step's keys, if it has any, and `scan` with them."""
        if not step.keys:
            return None, None, *self.scan(state, None, step)
        phi_k = self.fold_keys(self.key_features(self.key_input(step), step), step)
        value = self.values(step)
        added = torch.bmm(self.decayed(phi_k, step, "until_end").transpose(1, 2), value)
        return phi_k, value, *self.scan(state, added, step)

    def forward(self) -> Iterator[tuple[Step, Tensor]]:
        """The output of each step that has queries, `[b, Hq, L, Dv]`."""
        state = self.new_state()
        for step in self.steps:
            phi_k, value, met, state = self.take_keys(step, state)
            if not step.queries:
                continue
            phi_q = self.fold_queries(self.query_features(self.query_input(step), step), step)
            total = torch.bmm(self.decayed(phi_q, step, "since_start"), met)
            if phi_k is not None and value is not None:
                total.baddbmm_(self.weigh(phi_q, phi_k, step), value)
            total = self.unfold_queries(total, step)
            yield step, self._divide(total) if self.mechanism.normalize else total

    def _divide(self, total: Tensor) -> Tensor:
        row_sum = total[..., -1:]
        return total[..., :-1] / row_sum.masked_fill(row_sum == 0, torch.inf)

    def backward_queries(
        self, grad_out: Tensor, out: Tensor, grads: Tensor
    ) -> Iterator[tuple[Step, Tensor]]:
        """The gradient of each step's queries `[b, Hq, L, D]`, forwards along the positions.

        Args:
            grad_out, out: `[b, Hq, n, Dv]`.
            grads: written here: factors `[b, Hq, n, 2]` for `output_gradient`.
        """
        state = self.new_state()
        for step in self.steps:
            phi_k, value, met, state = self.take_keys(step, state)
            if not step.queries:
                continue
            x = self.query_input(step).detach().requires_grad_()
            with torch.enable_grad():
                phi = self.query_features(x, step)
            if self.mechanism.normalize:
                phi_q = self.fold_queries(phi.detach(), step)
                row_sum = torch.bmm(self.decayed(phi_q, step, "since_start"), met[..., -1:])
                if phi_k is not None:
                    row_sum += self.weigh(phi_q, phi_k, step).sum(-1, keepdim=True)
                row_sum = self.unfold_queries(row_sum, step)
                self._factors(row_sum, grad_out, out, grads, step)
            g = self.output_gradient(grad_out, grads, step)
            d_phi = self.decayed(torch.bmm(g, met.transpose(1, 2)), step, "since_start")
            if phi_k is not None and value is not None:
                d_phi.baddbmm_(self.weigh(g, value, step), phi_k)
            yield step, _pull_back(phi, x, self.unfold_queries(d_phi, step))

    def _factors(
        self, row_sum: Tensor, grad_out: Tensor, out: Tensor, grads: Tensor, step: Step
    ) -> None:
        # out = numerator / row_sum: their gradients are g / row_sum and -(g . out) / row_sum.
        rows = self.rows(step)
        inverse = 1.0 / row_sum.masked_fill(row_sum == 0, torch.inf)
        g, o = grad_out[:, :, rows].to(self.dtype), out[:, :, rows].to(self.dtype)
        grads[:, :, rows, :1] = inverse
        grads[:, :, rows, 1:] = (g * o).sum(-1, keepdim=True) * -inverse

    def output_gradient(self, grad_out: Tensor, grads: Tensor, step: Step) -> Tensor:
        """The gradient of a step's undivided outputs and row sums, folded."""
        g = grad_out[:, :, self.rows(step)].to(self.dtype)
        if self.mechanism.normalize:
            factors = grads[:, :, self.rows(step)]
            g = torch.cat([g * factors[..., :1], factors[..., 1:]], dim=-1)
        return self.fold_queries(g, step)

    def backward_keys(
        self, grad_out: Tensor, grads: Tensor
    ) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """The gradients of each step's keys and values, backwards along the positions."""
        state = self.new_state()
        for step in reversed(self.steps):
            phi_q = g = added = None
            if step.queries:
                phi_q = self.query_features(self.query_input(step), step)
                phi_q = self.fold_queries(phi_q, step)
                g = self.output_gradient(grad_out, grads, step)
                added = torch.bmm(self.decayed(phi_q, step, "since_start").transpose(1, 2), g)
            met, state = self.scan(state, added, step, reverse=True)
            if not step.keys:
                continue
            x = self.key_input(step).detach().requires_grad_()
            with torch.enable_grad():
                phi = self.key_features(x, step)
            phi_k, value = self.fold_keys(phi.detach(), step), self.values(step)
            d_phi = torch.bmm(value, met.transpose(1, 2))
            d_value = torch.bmm(phi_k, met)
            d_phi, d_value = (self.decayed(d, step, "until_end") for d in (d_phi, d_value))
            if phi_q is not None and g is not None:
                d_phi.baddbmm_(self.weigh(g, value, step).transpose(1, 2), phi_q)
                d_value.baddbmm_(self.weigh(phi_q, phi_k, step).transpose(1, 2), g)
            d_key = _pull_back(phi, x, self.unfold_keys(d_phi, step))
            d_value = self.unfold_keys(d_value, step)[..., : self.call.value_dim]
            if self.call.key_mask is not None:
                hidden = ~self.call.key_mask[:, None, step.start : step.stop, None]
                d_key, d_value = d_key.masked_fill(hidden, 0.0), d_value.masked_fill(hidden, 0.0)
            yield step, d_key, d_value


def _pull_back(phi: Tensor, x: Tensor, d_phi: Tensor) -> Tensor:
    if not phi.requires_grad:  # a map that does not depend on its input
        return torch.zeros_like(x)
    return torch.autograd.grad(phi, x, d_phi)[0]


def _whole(runs: list[Run], call: AttentionCall) -> tuple[bool, bool]:
    """Whether one run writes every query, and every key: results then need no zeroing."""
    if len(runs) != 1 or runs[0].batch != slice(0, call.batch):
        return False, False
    alone = runs[0].subcall(call)
    queries = alone.n == call.n and not (call.causal and runs[0].offset < 0)
    return queries, trim_future(alone) == call.m


def _result(shape: tuple[int, ...], like: Tensor, whole: bool) -> Tensor:
    make = torch.empty if whole else torch.zeros
    return make(shape, dtype=like.dtype, device=like.device)


def _pieces(
    mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, runs: list[Run]
) -> Iterator[tuple[Run, _Sweeps]]:
    """The runs of a call, few enough rows of the batch at once for their states to stay cached."""
    for run in runs:
        keys = slice(run.keys.start, run.keys.stop)
        features = _count_features(mechanism, k[run.batch], run.subcall(call))
        size = call.q_heads * features * (call.value_dim + 1)
        most = max(1, state_elements(q.device) // size)
        for start in range(run.batch.start, run.batch.stop, most):
            batch = slice(start, min(start + most, run.batch.stop))
            own = slice(batch.start - run.batch.start, batch.stop - run.batch.start)
            holes = None if run.holes is None else run.holes[own]
            piece = run._replace(batch=batch, holes=holes)
            q_run, k_run, v_run = q[batch, :, run.queries], k[batch, :, keys], v[batch, :, keys]
            if holes is not None:
                hidden = ~holes[:, None, :, None]
                k_run, v_run = k_run.masked_fill(hidden, 0.0), v_run.masked_fill(hidden, 0.0)
            yield piece, _Sweeps(mechanism, q_run, k_run, v_run, piece.subcall(call))


class TorchKernel:
    """See the module docstring; registered as `linear:torch`."""

    def supports(self, mechanism: Any, call: AttentionCall) -> list[str]:
        if not call.causal and mechanism.decay(call) is not None:
            return ["a decay is served for causal calls only: pass causal=True"]
        return []

    @torch.no_grad()
    def forward(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, None]:
        runs = cut(call)
        out = _result((*q.shape[:3], call.value_dim), q, _whole(runs, call)[0])
        if out.numel() == 0:
            return out, None
        for run, sweeps in _pieces(mechanism, q, k, v, call, runs):
            own = out[run.batch, :, run.queries]
            for step, result in sweeps.forward():
                own[:, :, sweeps.rows(step)] = result
        return out, None

    @torch.no_grad()
    def backward(
        self,
        mechanism: Any,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        runs = cut(call) if out.numel() else []
        queries, keys = _whole(runs, call)
        dq, dk, dv = _result(q.shape, q, queries), _result(k.shape, k, keys), _result(v.shape, v, keys)
        for run, sweeps in _pieces(mechanism, q, k, v, call, runs):
            g, o, d = (x[run.batch, :, run.queries] for x in (grad_out, out, dq))
            factors = torch.empty((*g.shape[:3], 2), dtype=sweeps.dtype, device=g.device)
            for step, d_query in sweeps.backward_queries(g, o, factors):
                d[:, :, sweeps.rows(step)] = d_query
            d_k, d_v = (x[run.batch, :, run.keys] for x in (dk, dv))
            for step, d_key, d_value in sweeps.backward_keys(g, factors):
                d_k[:, :, step.start : step.stop] = d_key
                d_v[:, :, step.start : step.stop] = d_value
        return dq, dk, dv, None


KERNELS["linear:torch"] = TorchKernel()

__all__ = ["CHUNK", "TorchKernel"]
