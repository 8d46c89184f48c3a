"""The cost model of the GPU kernels: its counts are those of masks, its times by hand."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from triton_versions import BENCHMARKS

import sparseattn as sa

sys.path.insert(0, str(BENCHMARKS))
import gpu_model

SPECS = {
    "windowed(window=10)": True,
    "windowed(window=(7, 20), sinks=0)": False,
    "full": True,
    "bigbird(block=8, window_blocks=1, global_blocks=1, random_blocks=2)": True,
    "longformer(window=9, global_tokens=3)": False,
    "dilated(window=5, dilation=3)": True,
    "block_sparse": False,
}


def made(spec: str) -> Any:
    if spec == "block_sparse":
        return sa.mechanism("block_sparse", layout=gpu_model.scattered(256, 0.3, size=32))
    return sa.mechanism(spec)


@pytest.mark.parametrize(("queries", "keys"), [(16, 32), (32, 16), (8, 8)])
@pytest.mark.parametrize("n", [65, 100, 256])
@pytest.mark.parametrize("spec", SPECS)
def test_pairs_and_tiles_are_counted_as_in_the_mask(
    spec: str, n: int, queries: int, keys: int
) -> None:
    mech = made(spec)
    call = gpu_model.shaped(2, 1, n, 16, causal=SPECS[spec])
    mask = mech.mask(call)[0, 0]
    rows, columns = -(-n // queries) * queries, -(-n // keys) * keys
    whole = torch.zeros(rows, columns, dtype=torch.bool)
    whole[:n, :n] = mask
    met = whole.view(rows // queries, queries, columns // keys, keys).any(3).any(1)
    visited = int(met.sum()) * queries * keys
    assert gpu_model.count(mech, call, queries, keys) == (int(mask.sum()), visited)


def test_work_of_the_three_kernels_by_hand() -> None:
    call = gpu_model.shaped(4, 2, 256, 64, batch=3)
    found = {
        row.kernel: row
        for row in gpu_model.softmax_rows("x", sa.mechanism("full"), call, (*gpu_model._PRODUCTS,))
    }
    pairs, heads = 256 * 257 // 2, 12
    # q k and p v; q k, g v and dS k; q k, g v, p g and dS q: two operations a number.
    products = {"forward": 2, "grad_queries": 3, "grad_keys": 4}
    assert {name: row.flops for name, row in found.items()} == {
        name: 2 * 64 * count * pairs * heads for name, count in products.items()
    }
    # q, out / k, v; then q, out, grad, dq / k, v; then q, grad / k, v, dk, dv; and lse and delta.
    q, kv, number = 2 * 12 * 256 * 64, 2 * 6 * 256 * 64, 4 * 12 * 256
    assert {name: row.bytes for name, row in found.items()} == {
        "forward": 2 * q + 2 * kv + number,
        "grad_queries": 4 * q + 2 * kv + 2 * number,
        "grad_keys": 2 * q + 4 * kv + 2 * number,
    }
    assert all(row.visited_flops > row.flops for row in found.values())


def test_floor_and_prediction_of_a_row() -> None:
    row = gpu_model.Row("k", "c", flops=790e9, bytes=3e9, visited_flops=1580e9, moved_bytes=3e9)
    assert row.floor == pytest.approx(1e-3)
    assert row.predicted == pytest.approx(2e-3 / gpu_model.REACHED)
    document = gpu_model.Row("k", "c", 790e9, 6e9, 790e9, 6e9).document()
    assert (document["binds"], document["waste"]) == ("memory", 1)
    assert document["floor_us"] == pytest.approx(2000)
    assert document["predicted_share"] == pytest.approx(min(1, 2 * gpu_model.REACHED))


def test_linear_work_by_counting_pairs() -> None:
    n, width = 1000, 128
    row = gpu_model.linear_row(1, n, 1, width)
    chunk, block = 64, 64  # positions of a chunk, values that a program holds
    position = torch.arange(n)
    same = position[:, None] // chunk == position[None] // chunk
    seen = int((same & (position[:, None] >= position[None])).sum())
    product = 2 * n * width * width
    # The last chunk is ragged: the model takes it for a whole one.
    assert 4 * width * seen <= row.flops - 2 * product <= 4 * width * seen * 1.05
    products = 2 * width * (width // block) + 2 * width  # q . k for each block; weights times v
    assert row.visited_flops == 3 * product + -(-n // chunk) * chunk * chunk * products
    assert row.bytes == 4 * n * width * 2
    assert row.moved_bytes == 6 * n * width * 2 + 4 * 4 * width * width


def test_decoding_is_bound_by_memory_that_is_read_once() -> None:
    row = gpu_model.decode_row(8, 32768, 8)
    assert row.bytes == pytest.approx(2 * 8 * 32768 * 8 * 128 * 2, rel=1e-3)
    assert row.document()["binds"] == "memory"


def test_every_shape_is_there_and_no_seen_pair_is_left_out() -> None:
    rows = list(gpu_model.rows())
    assert {row.kernel for row in rows} >= {"forward", "grad_queries", "grad_keys", "decode"}
    assert all(row.visited_flops >= row.flops for row in rows)
    assert all(0 < row.floor <= row.predicted for row in rows)
