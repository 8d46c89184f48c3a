"""The least that each kernel must do, and the time that this takes one H100: a model to measure by.

    python benchmarks/gpu_model.py [--json PATH]

Pairs and blocks are counted from the plans that launches have, never from N x M. The floor of a
kernel is the greater of two times: that of its arithmetic on the pairs that are really seen, at the
rate of a large matrix product, and that of moving each input and output once, at the rate of a
copy. What is predicted also counts whole tiles, what passes through memory between kernels, and the
part of the peak that a plain Triton kernel of this kind is known to reach.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import sparseattn as sa
from sparseattn.engines.linear.triton import config as linear_config
from sparseattn.engines.softmax import plan
from sparseattn.engines.softmax.triton import config
from sparseattn.engines.triton_launch import Target
from sparseattn.harness import manifest, store
from sparseattn.runs import cut

H100 = Target("cuda", 90)
# Measured on one H100: a matrix product of 8192, and a copy.
FLOPS, BANDWIDTH = 790e12, 3.0e12
# Of the peak, by FlashAttention in plain Triton: 378 to 395 TFLOP/s forward, head width 128.
REACHED = 0.49
JSON = Path(__file__).parent / "results" / "gpu_model.json"
HEADS = 32
WIDTHS, LENGTHS, WINDOWS = (64, 128), (4096, 16384, 65536, 262144), (256, 1024, 4096)
LINEAR = ((2, 16384, 16, 128), (1, 65536, 32, 128))  # B, N, H, D
DECODE = ((1, 131072), (8, 32768), (32, 32768))  # B, N


class Count(NamedTuple):
    """Of one query head: the pairs that are seen, and those of the tiles that are visited."""

    seen: int
    visited: int


def count(mechanism: Any, call: sa.AttentionCall, queries: int, keys: int) -> Count:
    """The pairs of a call's plan, whose tiles have `queries` rows of a head and `keys` keys."""
    made = plan.make(mechanism, call, cut(call), queries, keys)
    runs, tiles = made.runs.numpy().astype(np.int64), made.tiles.numpy().astype(np.int64)
    run = runs[tiles[:, 0]]
    n, m = run[:, 2], run[:, 4]
    first = tiles[:, 1] * queries
    if made.band:
        low, high = run[:, 5], run[:, 6]
        last = np.minimum(first + queries, n) - 1
        begin = np.maximum(low + first, 0) // keys
        end = -(-np.minimum(high + last + 1, m) // keys)
        visited = int(np.maximum(end - begin, 0).sum()) * queries * keys
        seen = sum(_seen_in_band(*one) for one in runs[:, [2, 4, 5, 6]].tolist())
        return Count(seen, visited)
    entries = tiles[:, 4] - tiles[:, 2]
    owner = np.repeat(np.arange(len(tiles)), entries)
    at = np.concatenate([np.arange(start, stop) for start, stop in tiles[:, [2, 4]]])
    partial = at >= tiles[owner, 3]
    faces = np.bitwise_count if hasattr(np, "bitwise_count") else _bit_count
    masks = made.masks.numpy().view(np.uint32)
    bits = np.zeros(1, dtype=np.int64)
    if masks.ndim == 3:  # the last row of a mask is what any row sees; without partial blocks: none
        bits = faces(masks[:, :-1]).sum((1, 2), dtype=np.int64)
    whole = np.minimum(queries, n[owner] - first[owner]) * np.minimum(
        keys, m[owner] - made.cols.numpy()[at].astype(np.int64) * keys
    )
    seen = np.where(partial, bits[np.where(partial, made.looks.numpy()[at], 0)], whole)
    return Count(int(seen.sum()), len(at) * queries * keys)


def _bit_count(words: Any) -> Any:
    return np.unpackbits(words[..., None].view(np.uint8), axis=-1).sum(-1, dtype=np.int64)


def _seen_in_band(n: int, m: int, low: int, high: int) -> int:
    """The pairs with `low + i <= j <= high + i` of n queries i and m keys j."""
    i = np.arange(n, dtype=np.int64)
    return int(np.maximum(np.minimum(high + i, m - 1) - np.maximum(low + i, 0) + 1, 0).sum())


@dataclass(frozen=True)
class Row:
    """One kernel on one shape.

    Attributes:
        flops, bytes: the least, from seen pairs and from each tensor once. visited_flops,
            moved_bytes: of whole tiles, and with what passes between kernels.
    """

    kernel: str
    call: str
    flops: float
    bytes: float
    visited_flops: float
    moved_bytes: float

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.flops / FLOPS, self.bytes / BANDWIDTH)

    @property
    def predicted(self) -> float:
        """Seconds."""
        return max(self.visited_flops / (FLOPS * REACHED), self.moved_bytes / BANDWIDTH)

    def document(self) -> dict[str, Any]:
        compute = self.flops / FLOPS > self.bytes / BANDWIDTH
        return asdict(self) | {
            "floor_us": self.floor * 1e6,
            "binds": "arithmetic" if compute else "memory",
            "waste": self.visited_flops / self.flops,
            "predicted_us": self.predicted * 1e6,
            "predicted_share": self.floor / self.predicted,
        }


# Matrix products of a pair: with keys' width, with values' width.
_PRODUCTS = {"forward": (1, 1), "grad_queries": (2, 1), "grad_keys": (2, 2)}
# Tensors that are read or written once, as long as the queries of every head, and as the keys.
_TENSORS = {"forward": (2, 2), "grad_queries": (4, 2), "grad_keys": (2, 4)}
_NUMBERS = {"forward": 1, "grad_queries": 2, "grad_keys": 2}  # of float32 a query: lse, delta


def shaped(
    heads: int, kv_heads: int, n: int, width: int, batch: int = 1, causal: bool = True
) -> sa.AttentionCall:
    """A call of bfloat16 tensors that take no memory."""
    one = torch.empty(1, dtype=torch.bfloat16)
    q, k = (one.expand(batch, h, n, width) for h in (heads, kv_heads))
    return sa.AttentionCall.make(q, k, k, causal=causal)


def softmax_rows(
    name: str, mechanism: Any, call: sa.AttentionCall, kernels: tuple[str, ...]
) -> Iterator[Row]:
    """The kernels of a call of bfloat16 on a whole plan."""
    heads = call.batch * call.q_heads
    for kernel in kernels:
        narrow = plan.narrow(mechanism, cut(call)[0], call.causal, config.NARROW)
        tiles = config.tiles(H100, torch.bfloat16, call.head_dim, kernel, narrow)
        pack = call.groups if call.groups in (1, 2, 4, 8, 16) else 1
        pairs = count(mechanism, call, tiles.rows // pack, tiles.keys)
        of_keys, of_values = _PRODUCTS[kernel]
        each = 2 * (of_keys * call.head_dim + of_values * call.value_dim)
        long, short = _TENSORS[kernel]
        tokens = long * heads * call.n + short * call.batch * call.kv_heads * call.m
        size = 2 * tokens * call.head_dim + 4 * _NUMBERS[kernel] * heads * call.n
        flops, visited = (float(heads * each * x) for x in pairs)
        yield Row(kernel, name, flops, float(size), visited, float(size))


def linear_row(batch: int, n: int, heads: int, width: int) -> Row:
    """Forward, causal: pairs within chunks, and a state of float32 carried from each to the next.

    States of spans are summed before, from the same keys and values; a program of the outputs holds
    a block of values, and weighs the pairs of its chunks for itself.
    """
    carry = linear_config.carry(H100, torch.bfloat16, width, 1, width, False, "outputs")
    assert carry is not None
    spans, chunks = -(-n // linear_config.LONG_SPAN), -(-n // carry.rows)
    inside = n * (carry.rows + 1) / 2
    tokens = batch * heads
    product = n * 2 * width * width  # into a state, or from one
    flops = tokens * (inside * 4 * width + 2 * product)
    pairs = chunks * carry.rows**2 * 2 * width * (width // carry.values + 1)
    size = 4 * tokens * n * width * 2
    # States are written as sums of spans, read and written as running sums, and read again.
    states = 4 * tokens * spans * width * width * 4
    call = f"linear {batch}x{n}x{heads}x{width}"
    visited = float(tokens * (pairs + 3 * product))
    return Row("linear forward", call, flops, float(size), visited, float(1.5 * size + states))


def decode_row(batch: int, n: int, kv_heads: int, width: int = 128, heads: int = HEADS) -> Row:
    """One new token over keys and values that are read once."""
    size = batch * (2 * n * kv_heads + 2 * heads) * width * 2
    flops = 4.0 * batch * heads * n * width
    rows = config.decode_tiles(H100, torch.bfloat16, width, 16).rows
    visited = flops * max(1, rows * kv_heads / heads)
    call = f"decode B={batch}, N={n}, kv heads {kv_heads}"
    return Row("decode", call, flops, float(size), visited, float(size))


def scattered(n: int, density: float, size: int = 128) -> sa.BlockLayout:
    """Random blocks of 128 at a density, the diagonal among them."""
    kept = torch.rand(n // size, n // size, generator=torch.Generator().manual_seed(0)) < density
    kept.fill_diagonal_(True)
    indptr = [0, *kept.sum(1).cumsum(0).tolist()]
    return sa.BlockLayout(indptr, kept.nonzero()[:, 1].tolist(), size)


def rows() -> Iterator[Row]:
    """Every shape of the benchmark."""
    kernels = tuple(_PRODUCTS)
    for width in WIDTHS:
        for kv_heads in (HEADS, HEADS // 4):
            for n in LENGTHS:
                for window in WINDOWS:
                    if window < n:
                        name = f"window {window}, N={n}, D={width}, kv heads {kv_heads}"
                        call = shaped(HEADS, kv_heads, n, width)
                        mech = sa.mechanism("windowed", window=window)
                        # Longer ones have the same share of the roof: their backward is left out.
                        yield from softmax_rows(name, mech, call, kernels[: 3 if n == 65536 else 1])
    for n in (4096, 16384, 65536):
        call = shaped(HEADS, HEADS, n, 128)
        yield from softmax_rows(f"dense causal, N={n}, D=128", sa.mechanism("full"), call, kernels)
    for n in (16384, 32768):
        for density in (0.1, 0.25, 0.5):
            mech = sa.mechanism("block_sparse", layout=scattered(n, density))
            call = shaped(HEADS, HEADS, n, 128, causal=False)
            name = f"128-blocks at {density:.0%}, N={n}, D=128"
            yield from softmax_rows(name, mech, call, kernels)
    for shape in LINEAR:
        yield linear_row(*shape)
    for batch, n in DECODE:
        for kv_heads in (HEADS, HEADS // 4):
            yield decode_row(batch, n, kv_heads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path, default=JSON)
    given = parser.parse_args()
    made = [row.document() for row in rows()]
    store.write(
        given.json,
        {
            "manifest": {"commit": manifest.commit()},
            "roof": {"flops_per_s": FLOPS, "bytes_per_s": BANDWIDTH, "reached": REACHED},
            "rows": made,
        },
    )
    print(f"{len(made)} rows in {given.json}")


if __name__ == "__main__":
    main()
