"""The launches of the linear kernels over some runs: which tables, constants and grids they get."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import wide
from ...runs import Run
from ..rows import rows_of
from ..triton_launch import halves, launch, target
from .maps import FusedMap
from .triton_carried import carries, span, walk, walk_back

_SCAN_BLOCK, _SCAN_AHEAD = 512, 8
_OF_SHIFTS = ("EVEN", "PRECISION", "NUMBER", "INPUT", "ROWS", "D", "F", "num_warps", "num_stages")


class States(NamedTuple):
    """`[slots, heads, features * (values + 1)]`, and the last, float64 `[batch, heads, ...]`."""

    met: Tensor
    end: Tensor


class Launcher:
    """What the launches over some runs share.

    Args:
        q, k: `[B, Hq, N, D]`, `[B, Hkv, M, D]`: rows that `maps` take, of queries and of keys.
        gamma: of the decay, `[Hq]`, or None.
        backward: whether gradients are to be launched too.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: AttentionCall,
        runs: list[Run],
        maps: tuple[FusedMap, FusedMap],
        normalize: bool,
        gamma: Tensor | None,
        backward: bool = False,
    ) -> None:
        from .triton import config, plan

        self.q, self.k, self.v = (rows_of(x) for x in (q, k, v))
        self.call, self.runs, self.maps, self.normalize = call, runs, maps, normalize
        self.target = target(q.device)
        own, other = maps
        self.features = q.shape[-1] if own.projection is None else own.projection.shape[0]
        self.parts = 1 if own.turn is None else 2
        projected = own.projection is not None
        self.carries = carries(call, self.features * self.parts, backward, self.parts, projected)
        self.span = span(self.carries)
        dtype = config.products(call.dtype)
        self.tiles = config.tiles(self.target, dtype, bool(self.carries))
        rows = self.span if self.carries else self.tiles.rows
        self.plan = plan.make(call, runs, self.span, rows)
        self.batch = 1
        if len(runs) == 1:
            self.batch = runs[0].batch.stop - runs[0].batch.start
        self.holes = any(run.holes is not None for run in runs)
        self.key_mask = q  # a pointer to something
        if self.holes:
            assert call.key_mask is not None
            mask = call.key_mask.view(torch.uint8)
            if wide(call.dtype) == torch.float64:
                mask = mask.int()  # Triton 3.6 makes no products of float64 beside loads of bytes
            self.key_mask = rows_of(mask)
        self.heads = call.kv_heads if gamma is None else call.q_heads
        self.decays = gamma is not None
        self.logs = q if gamma is None else logs_of(gamma, q.device)
        self.projection = q if own.projection is None else own.projection.contiguous()
        self.width = q.shape[-1]
        self.number = wide(call.dtype)
        self.block = min(self.tiles.features, config.padded(self.features))
        self.blocks = -(-self.features // self.block)
        self.value_block = min(self.tiles.values, config.padded(call.value_dim))
        self.value_blocks = -(-call.value_dim // self.value_block)
        self.even = call.value_dim % self.value_block == 0 and self.features % self.block == 0
        self.even &= self.projection is q or self.width == config.padded(self.width)
        self.even &= self.number == torch.float32  # Triton 3.6 fails on wide loads of float64
        self.size = self.features * self.parts * (call.value_dim + 1)
        self.q_shift = self._shifts(self.q, own)
        self.k_shift = self._shifts(self.k, other)

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Constants and options of a launch."""
        import triton.language as tl

        from .triton import config

        kinds = {
            torch.float64: tl.float64,
            torch.float32: tl.float32,
            torch.bfloat16: tl.bfloat16,
        }
        made = config.products(self.call.dtype)
        if self.target.backend == "interpreter" and made == torch.bfloat16:
            made = torch.float32  # its products of bfloat16 are garbage
        return {
            "NORMALIZE": self.normalize,
            "DECAY": self.decays,
            "HOLES": self.holes,
            "EVEN": self.even,
            "FUNCTION": self.maps[0].function,
            "PARTS": self.parts,
            "PROJECT": self.maps[0].projection is not None,
            "E": self.value_block,
            "PRECISION": config.precision(self.target, self.call.dtype),
            "NUMBER": kinds[self.number],
            "INPUT": kinds[made],
            "ROWS": self.tiles.rows,
            "D": self.block if self.maps[0].projection is None else config.padded(self.width),
            "F": self.block,
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages,
        }

    @cached_property
    def numbers(self) -> tuple[float, ...]:
        """Scales of queries and of keys and the turn, each as two halves."""
        own, other = self.maps
        return (*halves(own.scale), *halves(other.scale), *halves(own.turn or 0.0))

    def _shifts(self, x: Tensor, own: FusedMap) -> Tensor:
        """What exponents are lowered by, `[B, H, n]`."""
        from .triton.forward import shifts

        if own.projection is None:
            return self.q  # a pointer to something
        made = torch.empty(x.shape[:3], dtype=self.number, device=x.device)
        launch(
            shifts,
            (-(-x.shape[2] // self.tiles.rows), x.shape[1], x.shape[0]),
            *(x, made, self.projection, *x.stride()[:3], *made.stride()[:2]),
            *(x.shape[2], self.width, self.features, self.blocks),
            *(*halves(own.scale), *halves(own.drop)),
            MOST=own.lowered == "most",
            **{name: self.constants[name] for name in _OF_SHIFTS},
        )
        return made

    def _sums(
        self,
        x: Tensor,
        value: Tensor,
        length: Tensor,
        mean: Tensor,
        shift: Tensor,
        spans: Tensor,
        scale: float,
        begin: Tensor | None,
        of_queries: bool,
    ) -> States:
        """The states of spans, after `begin`."""
        from .triton.states import scan, sums

        shape = (self.plan.slots * self.batch, self.heads, self.size)
        met = torch.empty(shape, dtype=self.number, device=x.device)
        ends = (len(self.plan.runs) * self.batch, *shape[1:])
        end = torch.empty(ends, dtype=torch.float64, device=x.device)
        strides = (length if self.maps[0].projection is None or of_queries else shift).stride()[:2]
        launch(
            sums,
            (len(spans) * self.blocks * self.parts * self.value_blocks, self.heads, self.batch),
            *(x, value, length, mean, met, self.plan.runs, spans, self.key_mask, self.logs),
            *(self.projection, shift, *x.stride()[:3], *value.stride()[:3], *strides),
            *(self.key_mask.stride(0), self.width, self.call.value_dim, self.features),
            *(self.blocks, self.call.groups, self.plan.slots, *halves(scale), *self.numbers[4:]),
            OF_QUERIES=of_queries,
            **self.constants,
        )
        blocks = -(-self.size // _SCAN_BLOCK)
        launch(
            scan,
            (len(self.plan.runs) * blocks, self.heads, self.batch),
            *(met, end if begin is None else begin, end, self.plan.runs, self.logs),
            *(self.size, self.plan.slots, self.span),
            REVERSE=of_queries,
            DECAY=self.decays,
            BEGINS=begin is not None,
            BLOCK=_SCAN_BLOCK,
            AHEAD=_SCAN_AHEAD,
        )
        return States(met, end)

    def key_states(self, begin: Tensor | None = None) -> States:
        """What each span's queries meet: the sums over the keys before it."""
        some = self.k_shift
        return self._sums(
            *(self.k, self.v, some, some, self.k_shift, self.plan.key_spans),
            *(self.maps[1].scale, begin, False),
        )

    def outputs(self, out: Tensor, length: Tensor, states: States) -> None:
        """Write out `[B, Hq, N, Dv]`, and the row sums `[B, Hq, N]` if they divide."""
        from .triton.carried import carried_outputs
        from .triton.forward import outputs

        call, q, k, v = self.call, self.q, self.k, self.v
        if self.carries:
            walk(self, carried_outputs, "outputs", (q, k, v, out, length), states.met)
            return
        launch(
            outputs,
            (len(self.plan.query_tiles) * self.value_blocks, call.q_heads, self.batch),
            *(q, k, v, out, length, states.met, self.plan.runs, self.plan.query_tiles),
            *(self.key_mask, self.logs, self.projection, self.q_shift, self.k_shift),
            *(stride for x in (q, k, v, out) for stride in x.stride()[:3]),
            *(*length.stride()[:2], *self.k_shift.stride()[:2], self.key_mask.stride(0)),
            *(self.width, call.value_dim, self.features, self.blocks, call.groups),
            *(self.plan.slots, *self.numbers),
            **self.constants,
            CAUSAL=call.causal,
        )

    def means(self, grad: Tensor, length: Tensor, mean: Tensor, states: States) -> None:
        """Write the row sums, inf for 0: a row without weights has no gradient; and `g . out`."""
        from .triton.carried_queries import carried_means

        if not self.carries:
            # In the digits that sums are in: what is left of g . v - g . out may be little.
            out = torch.zeros(grad.shape, dtype=self.number, device=grad.device)
            self.outputs(out, length, states)
            length.masked_fill_(length == 0, torch.inf)
            mean.copy_((out * grad).sum(-1))
            return
        blocks = -(-self.call.value_dim // self.carries["means"].values)
        partial = torch.zeros((blocks, *mean.shape), dtype=mean.dtype, device=mean.device)
        given = (self.q, self.k, self.v, grad, length, partial)
        walk(self, carried_means, "means", given, states.met)
        mean.copy_(partial.sum(0).div_(length))

    def query_states(
        self, grad: Tensor, length: Tensor, mean: Tensor, begin: Tensor | None = None
    ) -> States:
        """What each span's keys meet: the sums over the queries after it."""
        return self._sums(
            *(self.q, grad, length, mean, self.q_shift, self.plan.query_spans),
            *(self.maps[0].scale, begin, True),
        )

    def _gradient(self, kernel: Any, tiles: Tensor, heads: int, tensors: Any, **more: Any) -> None:
        """Launch a kernel of `grad_queries.py` on its tensors, the last of which it writes."""
        *given, states, length = tensors
        grid = len(tiles) * more.pop("blocks", 1), heads, self.batch
        read = [x for x in given if x.ndim == 4]
        launch(
            kernel,
            grid,
            *(*given, states.met, self.plan.runs, tiles, self.key_mask, self.logs),
            *(self.projection, self.q_shift, self.k_shift),
            *(stride for x in read for stride in x.stride()[:3]),
            *(*length.stride()[:2], *self.k_shift.stride()[:2], self.key_mask.stride(0)),
            *(self.width, self.call.value_dim, self.features, self.blocks, self.call.groups),
            *(self.plan.slots, *self.numbers),
            CAUSAL=self.call.causal,
            **more,
            **self.constants,
        )

    def grad_queries(
        self, grad: Tensor, length: Tensor, mean: Tensor, dq: Tensor, states: States
    ) -> None:
        """Write dq; length and mean are as in `grad_queries.py`, and states of the keys."""
        from .triton.carried_queries import carried_grad_queries
        from .triton.grad_queries import grad_queries

        most = self.maps[0].lowered == "most"
        if self.carries:
            whole = (self.q, self.k, self.v, grad, length, mean, dq)
            walk(self, carried_grad_queries, "grad_queries", whole, states.met, MOST=most)
            return
        given = (self.q, self.k, self.v, grad, length, mean, dq, states, length)
        tiles = self.plan.query_tiles
        self._gradient(grad_queries, tiles, self.call.q_heads, given, MOST=most)

    def grad_keys(
        self, grad: Tensor, length: Tensor, mean: Tensor, dk: Tensor, dv: Tensor, states: States
    ) -> None:
        """Write dk and dv; states of the queries."""
        from .triton.carried_keys import carried_grad_keys, carried_grad_values
        from .triton.grad_keys import grad_keys
        from .triton.grad_values import grad_values

        most = self.maps[1].lowered == "most"
        if self.carries:
            whole = (self.q, self.k, self.v, grad, length, mean, dk)
            walk_back(self, carried_grad_keys, "grad_keys", whole, states.met, MOST=most)
            of_values = (self.q, self.k, grad, length, dv)
            walk_back(self, carried_grad_values, "grad_values", of_values, states.met)
            return
        given = (self.q, self.k, self.v, grad, length, mean, dk, states, length)
        tiles, heads = self.plan.key_tiles, self.call.kv_heads
        self._gradient(grad_keys, tiles, heads, given, MOST=most)
        values = (self.q, self.k, grad, length, dv, states, length)
        self._gradient(grad_values, tiles, heads, values, blocks=self.value_blocks)


def logs_of(gamma: Tensor, device: torch.device) -> Tensor:
    """The base-2 logarithms of decays, float64 `[Hq]`."""
    return _held_logs(tuple(gamma.detach().to("cpu", torch.float64).tolist()), device)


@lru_cache(maxsize=64)
def _held_logs(gamma: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(gamma, dtype=torch.float64).log2().to(device)
