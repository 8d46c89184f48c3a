"""Pairs weighed one by one, for a mechanism whose weight is a function of `q . k`.

A polynomial of degree 2 has about `D * D / 2` features. Until a run has thousands of rows, weighing
its pairs costs less than its state does, and loses less: features of a product that nearly cancels
are each as large as `(|q| |k|)^2`.

A mechanism opts in with `dot_weight(dot, call)`, elementwise from `q . k` to the undivided weight.
Memory is O(rows) here too: queries are served in blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import wide, widest
from ...runs import trim_future

# Queries and keys of a block: its dot products, of all heads, should stay cached.
_CPU_BLOCK = 128, 512
_DEVICE_BLOCK = 1024, 4096


def is_cheaper(mechanism: Any, call: AttentionCall, features: int) -> bool:
    """Whether to weigh the pairs of a run one by one rather than through its state."""
    if getattr(mechanism, "dot_weight", None) is None:
        return False
    n, m = call.n, trim_future(call)
    hidden = min(n, m) ** 2 / 2 if call.causal else 0
    pairs = (n * m - hidden) * (call.head_dim + call.value_dim)
    # Twice: products with such a state are in float64.
    return pairs <= 2 * (n + m) * features * call.value_dim


class Direct:
    """One run, without anything invisible; the interface of `Sweeps`."""

    def __init__(
        self, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> None:
        self.mechanism, self.call, self.q = mechanism, call, q
        self.dtype = wide(call.dtype)
        self.m = k.shape[2]
        self.k, self.v = (x.to(self.dtype).flatten(0, 1) for x in (k, v))
        self.hidden = None
        if call.key_mask is not None:
            hidden = ~call.key_mask[:, None, None, : self.m]
            self.hidden = hidden.expand(-1, call.kv_heads, -1, -1).flatten(0, 1)

    def blocks(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """`(start, stop, keys)`: queries, and the ranges of the keys that any of them sees."""
        offset, n = int(self.call.offset), self.call.n
        rows, width = _CPU_BLOCK if self.q.device.type == "cpu" else _DEVICE_BLOCK
        found = []
        for start in range(max(0, -offset) if self.call.causal else 0, n, rows):
            stop = min(start + rows, n)
            reach = min(self.m, offset + stop) if self.call.causal else self.m
            keys = [(at, min(at + width, reach)) for at in range(0, reach, width)]
            found.append((start, stop, keys))
        return found

    def fold(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Rows of `[b, Hq, n, x]`, grouped heads as rows: `[b * Hkv, groups * rows, x]`."""
        x = x[:, :, start:stop].to(self.dtype)
        return x.reshape(-1, self.call.groups * (stop - start), x.shape[-1])

    def unfold(self, x: Tensor, rows: int) -> Tensor:
        return x.reshape(self.call.batch, self.call.q_heads, rows, x.shape[-1])

    def hide(self, pairs: Tensor, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
        """Exactly 0 for the pairs of a block that are not visible, in place."""
        if self.hidden is not None:
            pairs.masked_fill_(self.hidden[..., slice(*keys)], 0.0)
        rows = queries[1] - queries[0]
        last = queries[0] + int(self.call.offset)  # the last key that the first query sees
        first = max(keys[0], last + 1)
        if self.call.causal and first < keys[1]:
            later = torch.arange(first, keys[1]) > last + torch.arange(rows)[:, None]
            by_head = pairs.view(pairs.shape[0], -1, rows, pairs.shape[-1])
            by_head[..., first - keys[0] :].masked_fill_(later.to(pairs.device), 0.0)
        return pairs

    def forward(self, out: Tensor) -> None:
        """Write the outputs of all queries that see a key, `[b, Hq, n, Dv]`."""
        for start, stop, ranges in self.blocks():
            q = self.fold(self.q, start, stop)
            result = q.new_zeros((*q.shape[:2], self.v.shape[-1]))
            total = q.new_zeros((*q.shape[:2], 1))
            for keys in ranges:
                k, v = self.k[:, slice(*keys)], self.v[:, slice(*keys)]
                weights = self.mechanism.dot_weight(torch.bmm(q, k.transpose(1, 2)), self.call)
                self.hide(weights, (start, stop), keys)
                total.add_(weights.sum(-1, keepdim=True))
                result.baddbmm_(weights, v)
            if self.mechanism.normalize:
                result.div_(_guard(total))
            out[:, :, start:stop] = self.unfold(result, stop - start)

    def backward(self, grad_out: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Write the gradients of all rows, from that of the outputs."""
        exact = widest(self.q.device)  # sums over blocks, each as long as the run
        d_k, d_v = (torch.zeros_like(x, dtype=exact) for x in (self.k, self.v))
        for start, stop, ranges in self.blocks():
            q, g = self.fold(self.q, start, stop), self.fold(grad_out, start, stop)
            total, mean = self._row_sums(q, g, (start, stop), ranges)
            d_q = torch.zeros_like(q)
            for keys in ranges:
                own = slice(*keys)
                k, v = self.k[:, own], self.v[:, own]
                dot = torch.bmm(q, k.transpose(1, 2)).requires_grad_()
                with torch.enable_grad():
                    made = self.mechanism.dot_weight(dot, self.call)
                weights = self.hide(made.detach().div(total), (start, stop), keys)
                d_v[:, own] += torch.bmm(weights.transpose(1, 2), g)
                d_weights = torch.bmm(g, v.transpose(1, 2)).sub_(mean).div_(total)
                self.hide(d_weights, (start, stop), keys)
                (d_dot,) = torch.autograd.grad(made, dot, d_weights)
                d_q.baddbmm_(d_dot, k)
                d_k[:, own] += torch.bmm(d_dot.transpose(1, 2), q)
            dq[:, :, start:stop] = self.unfold(d_q, stop - start)
        dk[:, :, : self.m] = d_k.view(*dk.shape[:2], *d_k.shape[1:])
        dv[:, :, : self.m] = d_v.view(*dv.shape[:2], *d_v.shape[1:])

    def _row_sums(
        self, q: Tensor, g: Tensor, queries: tuple[int, int], ranges: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """The row sums of the undivided weights, and `sum_j W_ij (g_i . v_j)`, of a block's rows.

        The second as a sum over j, as the gradient has it: where a query sees one key, the two
        cancel to the last bit.
        """
        total, mean = q.new_zeros((*q.shape[:2], 1)), q.new_zeros((*q.shape[:2], 1))
        if not self.mechanism.normalize:
            return torch.ones_like(total), mean
        for keys in ranges:
            k, v = self.k[:, slice(*keys)], self.v[:, slice(*keys)]
            weights = self.mechanism.dot_weight(torch.bmm(q, k.transpose(1, 2)), self.call)
            self.hide(weights, queries, keys)
            total.add_(weights.sum(-1, keepdim=True))
            mean.add_(weights.mul_(torch.bmm(g, v.transpose(1, 2))).sum(-1, keepdim=True))
        total = _guard(total)
        return total, mean.div_(total)


def _guard(row_sum: Tensor) -> Tensor:
    """To divide by: inf for exactly 0, so that its row is 0, and its gradients."""
    return row_sum.masked_fill(row_sum == 0, torch.inf)
