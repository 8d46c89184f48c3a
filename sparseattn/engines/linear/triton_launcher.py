"""The launches of the linear kernels over some runs: which tables, constants and grids they get."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...call import AttentionCall
from ...digits import wide
from ...runs import Run
from ..triton_launch import halves, launch, target
from .maps import FusedMap

_SCAN_BLOCK, _SCAN_AHEAD = 512, 8


def rows_of(x: Tensor) -> Tensor:
    """x with its last dimension in one piece, as kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# Kernels that carry states: of a call, and of its gradients.
_FORWARD = ("outputs",)
_BACKWARD = ("means", "grad_queries", "grad_keys", "grad_values")


def carries(
    call: AttentionCall, features: int, backward: bool, parts: int = 1, projected: bool = False
) -> dict[str, Any]:
    """How kernels are cut that carry states of so many features; empty where none serve."""
    from .triton import config

    dtype, on = config.products(call.dtype), target(call.device)
    found = {
        kernel: config.carry(on, dtype, features, parts, call.value_dim, projected, kernel)
        for kernel in (_BACKWARD if backward else _FORWARD)
    }
    return {} if None in found.values() else found


def span(carried: dict[str, Any]) -> int:
    """Positions in a span."""
    from .triton import config

    return config.LONG_SPAN if carried else config.SPAN


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
            self.key_mask = rows_of(call.key_mask.view(torch.uint8))
        self.heads = call.kv_heads if gamma is None else call.q_heads
        self.decays = gamma is not None
        self.logs = q if gamma is None else _logs(gamma, q.device)
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

    def _constants(self, *names: str) -> dict[str, Any]:
        """Constants and options of a launch; `names` are those that not every kernel has."""
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
        constants = {
            "CAUSAL": self.call.causal,
            "NORMALIZE": self.normalize,
            "DECAY": self.decays,
            "HOLES": self.holes,
            "EVEN": self.even,
            "FUNCTION": self.maps[0].function,
            "PARTS": self.parts,
            "PROJECT": self.maps[0].projection is not None,
            "E": self.value_block,
        }
        return {name: constants[name] for name in names} | {
            "PRECISION": config.precision(self.target, self.call.dtype),
            "NUMBER": kinds[self.number],
            "INPUT": kinds[made],
            "ROWS": self.tiles.rows,
            "D": self.block if self.maps[0].projection is None else config.padded(self.width),
            "F": self.block,
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages,
        }

    def _all(self) -> dict[str, Any]:
        return self._constants(
            *("NORMALIZE", "DECAY", "HOLES", "EVEN", "FUNCTION", "PARTS", "PROJECT", "E")
        )

    def _carried(self, kernel: str) -> dict[str, Any]:
        """As `_all`, of a kernel that carries a state."""
        from .triton import config

        carry, features = self.carries[kernel], self.features * self.parts
        even = features % carry.features == 0 and self.call.value_dim % carry.values == 0
        if self.maps[0].projection is not None:
            even &= self.width == config.padded(self.width)
        options = self._all() | {
            "EVEN": even,
            "ROWS": carry.rows,
            "D": config.padded(self.width),
            "F": carry.features,
            "E": carry.values,
            "num_warps": carry.warps,
            "num_stages": carry.stages,
        }
        if kernel == "means":
            del options["NORMALIZE"]
        return options

    def _walk(self, kernel: Any, name: str, tensors: Any, states: States, **more: Any) -> None:
        """Launch a kernel that carries states of keys, on spans and on queries beyond them.

        Args:
            tensors: q, k, v and those that follow in its arguments; their strides follow too where
                they have one for each dimension of q.
        """
        call, carry = self.call, self.carries[name]
        blocks = -(-call.value_dim // carry.values)
        if name == "grad_queries":
            blocks = -(-self.features * self.parts // carry.features)
        length = tensors[4]
        whole = self.plan.query_tiles
        walks = len(whole) - self.plan.met_all
        for tiles, walk in ((whole[:walks], True), (whole[walks:], False)):
            launch(
                kernel,
                (len(tiles) * blocks, call.q_heads, self.batch),
                *(*tensors, states.met, self.plan.runs, tiles, self.key_mask, self.logs),
                *(self.projection, self.q_shift, self.k_shift),
                *(stride for x in tensors if x.ndim == 4 for stride in x.stride()[:3]),
                *(*length.stride()[:2], *self.k_shift.stride()[:2], self.key_mask.stride(0)),
                *(self.width, call.value_dim, self.features, call.groups, self.plan.slots),
                *(self.span, *halves(self.maps[0].scale), *halves(self.maps[1].scale)),
                *self._turn(),
                WALK=walk,
                CAUSAL=call.causal,
                **more,
                **self._carried(name),
            )

    def _walk_back(self, kernel: Any, name: str, tensors: Any, states: States, **more: Any) -> None:
        """Launch a kernel that carries states of queries; the last of tensors has the heads of
        keys, and takes the sum over those of queries where each has a state of its own."""
        call, carry = self.call, self.carries[name]
        blocks = -(-call.value_dim // carry.values)
        if name == "grad_keys":
            blocks = -(-self.features * self.parts // carry.features)
        *given, into = tensors
        apart = self.decays and call.groups > 1
        taken = into
        if apart:
            shape = (into.shape[0], call.q_heads, *into.shape[2:])
            taken = torch.zeros(shape, dtype=self.number, device=into.device)
        length = next(x for x in given if x.ndim == 3)
        tensors = (*given, taken)
        launch(
            kernel,
            (len(self.plan.key_tiles) * blocks, self.heads, self.batch),
            *(*tensors, states.met, self.plan.runs, self.plan.key_tiles, self.key_mask, self.logs),
            *(self.projection, self.q_shift, self.k_shift),
            *(stride for x in tensors if x.ndim == 4 for stride in x.stride()[:3]),
            *(*length.stride()[:2], *self.k_shift.stride()[:2], self.key_mask.stride(0)),
            *(self.width, call.value_dim, self.features, call.groups, self.plan.slots),
            *(self.span, *halves(self.maps[0].scale), *halves(self.maps[1].scale)),
            *self._turn(),
            WALK=call.causal,
            **more,
            **self._carried(name),
        )
        if apart:
            into.copy_(taken.unflatten(1, (call.kv_heads, call.groups)).sum(2))

    def _turn(self) -> tuple[float, float]:
        return halves(self.maps[0].turn or 0.0)

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
            **self._constants("EVEN"),
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
            *(self.blocks, self.call.groups, self.plan.slots, *halves(scale), *self._turn()),
            OF_QUERIES=of_queries,
            **self._all(),
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
            self._walk(carried_outputs, "outputs", (q, k, v, out, length), states)
            return
        launch(
            outputs,
            (len(self.plan.query_tiles) * self.value_blocks, call.q_heads, self.batch),
            *(q, k, v, out, length, states.met, self.plan.runs, self.plan.query_tiles),
            *(self.key_mask, self.logs, self.projection, self.q_shift, self.k_shift),
            *(stride for x in (q, k, v, out) for stride in x.stride()[:3]),
            *(*length.stride()[:2], *self.k_shift.stride()[:2], self.key_mask.stride(0)),
            *(self.width, call.value_dim, self.features, self.blocks, call.groups),
            *(self.plan.slots, *halves(self.maps[0].scale), *halves(self.maps[1].scale)),
            *self._turn(),
            **self._all(),
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
        self._walk(carried_means, "means", given, states)
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
            *(self.plan.slots, *halves(self.maps[0].scale), *halves(self.maps[1].scale)),
            *self._turn(),
            CAUSAL=self.call.causal,
            **more,
            **self._all(),
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
            self._walk(carried_grad_queries, "grad_queries", whole, states, MOST=most)
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
            self._walk_back(carried_grad_keys, "grad_keys", whole, states, MOST=most)
            of_values = (self.q, self.k, grad, length, dv)
            self._walk_back(carried_grad_values, "grad_values", of_values, states)
            return
        given = (self.q, self.k, self.v, grad, length, mean, dk, states, length)
        tiles, heads = self.plan.key_tiles, self.call.kv_heads
        self._gradient(grad_keys, tiles, heads, given, MOST=most)
        values = (self.q, self.k, grad, length, dv, states, length)
        self._gradient(grad_values, tiles, heads, values, blocks=self.value_blocks)


def _logs(gamma: Tensor, device: torch.device) -> Tensor:
    """The base-2 logarithms of decays, float64 `[Hq]`."""
    return _held_logs(tuple(gamma.detach().to("cpu", torch.float64).tolist()), device)


@lru_cache(maxsize=64)
def _held_logs(gamma: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(gamma, dtype=torch.float64).log2().to(device)
