"""Sweeps over one run: its outputs, and the gradients of its queries, keys and values.

A column of ones beside v makes the sum of W's row one more output, so that numerator and
denominator come from the same products.

Time is O(N), memory O(rows of a step x features), forward and backward: the backward makes features
anew, and sweeps twice. Forwards along the positions it has the state of the keys seen,
`S = sum_j phi(k_j) [v_j, 1]^T`, which gives the queries' gradients; backwards it has that of the
queries that see a key, `R = sum_i phi(q_i) g_i^T`, which gives the keys' and values'. Feature maps
are differentiated by autograd, on the rows of one step alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import wide
from .plan import CHUNK, MOST_CHUNKS, Decay, Step, finely, plan, state_elements
from .state import State

_FEATURES: dict[tuple[Any, int], int] = {}  # of a mechanism and head width: only for step sizes


def count_features(mechanism: Any, k: Tensor, call: AttentionCall) -> int:
    """F of a mechanism at this head width; k `[b, Hkv, m, D]` with m > 0."""
    key = mechanism, call.head_dim
    found = _FEATURES.get(key)
    if found is None:
        position = torch.zeros(1, 1, 1, dtype=torch.int64, device=k.device)
        row = torch.zeros_like(k[:, :, :1], dtype=wide(k.dtype))
        found = _FEATURES[key] = mechanism.feature_map(row, position, call).shape[-1]
    return found


def _row_major(x: Tensor) -> Tensor:
    """x, copied where its rows are strided: products then give the same bits for any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _guard(row_sum: Tensor) -> Tensor:
    """Row sums to divide by: inf for exactly 0, so that its row is 0, and its gradients."""
    return row_sum.masked_fill(row_sum == 0, torch.inf)


def _sum_of_products(x: Tensor, y: Tensor, part: int) -> Tensor:
    """`x^T y` of x `[h, L, F]` and y `[h, L, E]`, as the sum over parts of L where it is long.

    One sum over a long step rounds each row to the size of all before it: up to three times the
    error of the dense definition.
    """
    parts, rest = divmod(x.shape[1], part)
    if parts < 2 or rest:
        return torch.bmm(x.transpose(1, 2), y)
    x, y = (t.reshape(t.shape[0] * parts, part, t.shape[2]) for t in (x, y))
    return torch.bmm(x.transpose(1, 2), y).unflatten(0, (-1, parts)).sum(1)


class Sweeps:
    """One run, without anything invisible: its inputs, and what both directions share.

    State and features are folded so that every product is a batched matrix product. A head of the
    state is a key-value head, whose query heads are rows of one matrix; with a decay, which differs
    between query heads, it is a query head, and chunks of keys are repeated for it.
    """

    def __init__(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> None:
        self.mechanism, self.call = mechanism, call
        self.q, self.k, self.v = q, k, v
        self.dtype = wide(call.dtype)
        self.fine = finely(call)
        gamma = mechanism.decay(call)
        self.decay = None if gamma is None else Decay(gamma, self.dtype, q.device)
        self.heads = call.kv_heads if gamma is None else call.q_heads
        self.groups = call.q_heads // self.heads
        self.width = call.value_dim + int(mechanism.normalize)
        self.features = count_features(mechanism, k, call)
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
        return x.reshape(self.call.batch * self.heads * step.chunks, step.key_size, x.shape[-1])

    def unfold_keys(self, x: Tensor, step: Step) -> Tensor:
        b, kv = self.call.batch, self.call.kv_heads
        x = x.reshape(b, kv, self.heads // kv, step.chunks * step.key_size, x.shape[-1])
        return x.sum(2) if x.shape[2] > 1 else x[:, :, 0]

    def positions(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.q.device)[None, None]

    def query_input(self, step: Step) -> Tensor:
        return _row_major(self.q[:, :, self.rows(step)].to(self.dtype))

    def key_input(self, step: Step) -> Tensor:
        return _row_major(self.k[:, :, step.key_rows].to(self.dtype))

    def query_features(self, x: Tensor, step: Step) -> Tensor:
        return self.mechanism.query_map(x, self.positions(step.start, step.stop), self.call).to(
            self.dtype
        )

    def key_features(self, x: Tensor, step: Step) -> Tensor:
        at = self.positions(step.key_rows.start, step.key_rows.stop)
        phi = self.mechanism.feature_map(x, at, self.call).to(self.dtype)
        if self.call.key_mask is not None:
            hidden = ~self.call.key_mask[:, None, step.key_rows, None]
            phi = phi.masked_fill(hidden, 0.0)
        return phi

    def values(self, step: Step) -> Tensor:
        """v of the step and its column of ones, folded; overwritten by the next call."""
        v = self.v[:, :, step.key_rows]
        held = self._values.get(v.shape[2])
        if held is None:
            shape = (*v.shape[:3], self.width)
            held = self._values[v.shape[2]] = torch.ones(shape, dtype=self.dtype, device=v.device)
        held[..., : v.shape[3]] = v
        return self.fold_keys(held, step)

    # Products.

    def hide(self, pairs: Tensor, step: Step) -> Tensor:
        """Exactly 0 for the pairs within chunks that are not causal, in place."""
        if not step.facing:
            pairs.view(-1, step.size, step.size).tril_()
        return pairs

    def mask(self, pairs: Tensor, step: Step) -> Tensor:
        """The pairs within chunks, in place: times their decay if causal, else exactly 0."""
        if self.decay is not None:
            by_head = pairs.view(self.call.batch, self.heads, -1, step.size, step.size)
            by_head.mul_(self.decay.within(step.size))
        return self.hide(pairs, step)  # after the product: it writes 0 whatever stood there

    def weigh(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        """`x . y` for the pairs within chunks, masked."""
        return self.mask(torch.bmm(x, y.transpose(1, 2)), step)

    def decayed(self, x: Tensor, step: Step, powers: str) -> Tensor:
        """Rows times `since_start` or `until_end` of their chunk."""
        if self.decay is None:
            return x
        by = getattr(self.decay, powers)(step.size).to(x.dtype)
        shape = (self.call.batch, self.heads, step.chunks, step.size, x.shape[-1])
        return (x.reshape(shape) * by).view(x.shape)

    def across(self, step: Step) -> Tensor | None:
        """What each chunk leaves of the state before it: `[b, heads, chunks, 1, 1]`."""
        if self.decay is None:
            return None
        return self.decay.across(step.size)[:, :, None].expand(-1, -1, step.chunks, -1, -1)

    def new_state(self) -> State:
        shape = (self.call.batch, self.heads, self.features, self.width)
        return State(shape, self.dtype, self.q.device)

    def scan(self, state: State, added: Tensor | None, step: Step, reverse: bool = False) -> Tensor:
        """The state that each chunk of a step meets, `[b * heads * chunks, F, E]`; it moves on.

        Args:
            state: met by the first chunk (the last one in `reverse`).
            added: what the chunks add, `[b * heads * chunks, F, E]`, or None for nothing.
        """
        shape = (self.call.batch, self.heads, step.chunks, self.features, self.width)
        met = torch.empty(shape, dtype=self.fine, device=self.q.device)
        added = None if added is None else added.view(shape)
        across = self.across(step)
        for i in range(step.chunks - 1, -1, -1) if reverse else range(step.chunks):
            state.read(met[:, :, i])
            state.advance(
                None if added is None else added[:, :, i],
                step.key_size,
                None if across is None else across[:, :, i],
            )
        return met.view(-1, *shape[3:])

    def take_keys(self, step: Step, state: State) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Features and values of a step's keys, if it has any, and `scan` with them."""
        if not step.keys:
            return None, None, self.scan(state, None, step)
        phi_k = self.fold_keys(self.key_features(self.key_input(step), step), step)
        value = self.values(step)
        added = _sum_of_products(self.decayed(phi_k, step, "until_end"), value, CHUNK)
        met = self.scan(state, added, step)
        if step.queries:
            phi_k, value = phi_k.to(self.fine), value.to(self.fine)
        return phi_k, value, met

    def forward(self, out: Tensor) -> None:
        """Write the outputs of all steps' queries, `[b, Hq, n, Dv]`."""
        state = self.new_state()
        for step in self.steps:
            phi_k, value, met = self.take_keys(step, state)
            if not step.queries:
                continue
            phi_q = self.query_features(self.query_input(step), step).to(self.fine)
            phi_q = self.fold_queries(phi_q, step)
            total = torch.bmm(self.decayed(phi_q, step, "since_start"), met)
            if phi_k is not None and value is not None:
                scores = self.weigh(phi_q, phi_k, step)
                total.baddbmm_(scores, value)
            total = self.unfold_queries(total, step)
            own = out[:, :, self.rows(step)]
            if self.mechanism.normalize:
                self.note(step, total[..., -1])
                torch.div(total[..., :-1], _guard(total[..., -1:]), out=own)
            else:
                own.copy_(total)

    def note(self, step: Step, sums: Tensor) -> None:
        """Hear of the row sums `[b, Hq, L]` of a step's queries, before they divide."""

    def backward(self, grad_out: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Write the gradients of all rows that a step serves, from that of the outputs."""
        rows = self.write_queries(grad_out, dq)
        self.write_keys(grad_out, rows, dk, dv)

    def write_queries(self, grad_out: Tensor, dq: Tensor) -> Tensor:
        """Write the gradients of the queries; returns the `rows` of `backward_queries`."""
        rows = grad_out.new_ones((*grad_out.shape[:3], 2), dtype=self.fine)
        for step, d_query in self.backward_queries(grad_out, rows):
            dq[:, :, self.rows(step)] = d_query
        return rows

    def write_keys(self, grad_out: Tensor, rows: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Write the gradients of the keys and values."""
        for step, d_key, d_value in self.backward_keys(grad_out, rows):
            dk[:, :, step.key_rows] = d_key
            dv[:, :, step.key_rows] = d_value

    def backward_queries(self, grad_out: Tensor, rows: Tensor) -> Iterator[tuple[Step, Tensor]]:
        """The gradient of each step's queries `[b, Hq, L, D]`, forwards along the positions.

        Args:
            grad_out: `[b, Hq, n, Dv]`.
            rows: written here for `backward_keys`: `[b, Hq, n, 2]`, the row sums of the undivided
                weights, and `sum_j W_ij (g_i . v_j)`.
        """
        state = self.new_state()
        for step in self.steps:
            phi_k, value, met = self.take_keys(step, state)
            if not step.queries:
                continue
            x = self.query_input(step).detach().requires_grad_()
            with torch.enable_grad():
                phi = self.query_features(x, step)
            phi_q = self.fold_queries(phi.detach().to(self.fine), step)
            g = self.fold_queries(grad_out[:, :, self.rows(step)].to(self.fine), step)
            met_value, met_sum = met[..., : self.call.value_dim], met[..., self.call.value_dim :]
            d_phi = torch.bmm(g, met_value.transpose(1, 2))
            d_weights = total = mean = None
            if value is not None:
                d_weights = torch.bmm(g, value[..., : self.call.value_dim].transpose(1, 2))
            if self.mechanism.normalize:
                total, mean = self._row_sums(phi_q, phi_k, d_phi, d_weights, met_sum, step)
                rows[:, :, self.rows(step), :1] = self.unfold_queries(total, step)
                rows[:, :, self.rows(step), 1:] = self.unfold_queries(mean, step)
                d_phi.addcmul_(mean, met_sum.transpose(1, 2), value=-1.0).div_(total)
            d_phi = self.decayed(d_phi, step, "since_start")
            if phi_k is not None and d_weights is not None:
                d_phi.baddbmm_(self._undivide(d_weights, total, mean, step), phi_k)
            yield step, _pull_back(phi, x, self.unfold_queries(d_phi, step))

    def _row_sums(
        self,
        phi_q: Tensor,
        phi_k: Tensor | None,
        across: Tensor,
        d_weights: Tensor | None,
        met_sum: Tensor,
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        """What `rows` holds for a step, folded; a row sum of 0 is inf: its row has no gradient.

        `sum_j W_ij (g_i . v_j)` is `g_i . out_i`, but summed as here it cancels against each
        `g_i . v_j` to the last bit where a query sees one key.

        Args:
            across: `S g`, the gradient of phi_q through the state before division.
            d_weights: `g_i . v_j` within chunks.
        """
        reaching = self.decayed(phi_q, step, "since_start")
        total = torch.bmm(reaching, met_sum)
        if phi_k is None or d_weights is None:
            total = _guard(total)
            return total, (reaching * across).sum(-1, keepdim=True).div_(total)
        scores = self.weigh(phi_q, phi_k, step)
        total = _guard(total + scores.sum(-1, keepdim=True))
        mean = (reaching * across).sum(-1, keepdim=True).div_(total)
        scores.div_(total).mul_(d_weights)
        return total, mean.add_(self.hide(scores, step).sum(-1, keepdim=True))

    def _undivide(
        self, d_weights: Tensor, total: Tensor | None, mean: Tensor | None, step: Step
    ) -> Tensor:
        """From the gradient of the weights within chunks to that of their undivided products."""
        if total is not None and mean is not None:
            d_weights.sub_(mean).div_(total)
        return self.mask(d_weights, step)

    def backward_keys(
        self, grad_out: Tensor, rows: Tensor
    ) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """The gradients of each step's keys and values, backwards along the positions.

        Args:
            grad_out, rows: as in `backward_queries`, which has written `rows`.
        """
        state = self.new_state()
        for step in reversed(self.steps):
            phi_q = g = total = mean = added = None
            if step.queries:
                phi_q = self.query_features(self.query_input(step), step)
                phi_q = self.fold_queries(phi_q, step)
                g = self.fold_queries(grad_out[:, :, self.rows(step)].to(self.fine), step)
                divided = g
                if self.mechanism.normalize:
                    total, mean = self.fold_queries(rows[:, :, self.rows(step)], step).split(1, 2)
                    divided = torch.cat([g, -mean], dim=-1).div_(total)
                reaching = self.decayed(phi_q, step, "since_start")
                added = _sum_of_products(reaching, divided.to(self.dtype), CHUNK * self.groups)
                phi_q = phi_q.to(self.fine)
            met = self.scan(state, added, step, reverse=True)
            if not step.keys:
                continue
            x = self.key_input(step).detach().requires_grad_()
            with torch.enable_grad():
                phi = self.key_features(x, step)
            phi_k, value = self.fold_keys(phi.detach(), step), self.values(step)
            phi_k, value = phi_k.to(self.fine), value.to(self.fine)
            d_phi = torch.bmm(value, met.transpose(1, 2))
            value = value[..., : self.call.value_dim]
            d_value = torch.bmm(phi_k, met[..., : self.call.value_dim])
            d_phi, d_value = (self.decayed(d, step, "until_end") for d in (d_phi, d_value))
            if phi_q is not None and g is not None:
                d_scores = torch.bmm(g, value.transpose(1, 2))
                d_scores = self._undivide(d_scores, total, mean, step)
                d_phi.baddbmm_(d_scores.transpose(1, 2), phi_q)
                weights = self.weigh(phi_q, phi_k, step)
                weights = weights if total is None else weights.div_(total)
                d_value.baddbmm_(weights.transpose(1, 2), g)
            d_key = _pull_back(phi, x, self.unfold_keys(d_phi, step))
            d_value = self.unfold_keys(d_value, step)
            if self.call.key_mask is not None:
                hidden = ~self.call.key_mask[:, None, step.key_rows, None]
                d_key, d_value = d_key.masked_fill(hidden, 0.0), d_value.masked_fill(hidden, 0.0)
            yield step, d_key, d_value


def _pull_back(phi: Tensor, x: Tensor, d_phi: Tensor) -> Tensor:
    if not phi.requires_grad:  # a map that does not depend on its input
        return torch.zeros_like(x)
    return torch.autograd.grad(phi, x, d_phi.to(phi.dtype))[0]
