"""The kernels for Hopper, as they show without one: what they serve, and compile to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from triton_versions import NONE, TESTS, Version, run_python, versions

SCRIPT = TESTS / "triton_hopper.py"
# The versions of Triton that it is for.
VERSIONS = ("3.6",)


def fitting() -> Version:
    found = [one for one in versions() if one.version.startswith(VERSIONS)]
    if not found:
        pytest.skip(NONE)
    return found[0]


def told(word: str, **variables: str) -> Any:
    given = {"SPARSEATTN_TRITON_SPECIALISED": "1", **variables}
    return json.loads(run_python(fitting().path, SCRIPT, word, timeout=1000, **given))


def test_it_serves_bands_and_whole_blocks_that_descriptors_hold() -> None:
    ours, plain = ["forward_specialised"], ["forward"]
    assert told("served") == {
        "band": ours,
        "full": ours,
        "heads between queries": ours,
        "packed": 4 * ours,  # a launch for each document
        "queries before all keys": ours,
        "blocks": ours,
        "blocks, causal": plain,  # some are seen in part
        "many documents": plain,
        "holes": plain,
        "softcap": plain,
        "scale below 0": plain,
        "two bands": plain,
        "width": plain,
        "dtype": plain,
        "steps": plain,
        "one row for all": plain,
    }


def test_gradients_of_bands() -> None:
    ours = ["deltas", "grad_queries_specialised", "grad_keys_specialised"]
    plain = ["grad_queries", "grad_keys"]
    assert told("gradients", SPARSEATTN_TRITON_SPECIALISED="") == {
        "band": ours,
        "full": ours,
        "narrow heads": ["grad_queries", "grad_keys_specialised"],  # as the race on an H100 had it
        "softcap": plain,
        "lists": plain,
        "dtype": plain,
    }


def test_it_is_left_where_that_is_asked_for() -> None:
    found = told("served", SPARSEATTN_TRITON_SPECIALISED="0")
    assert {kernel for names in found.values() for kernel in names} == {"forward"}


def test_new_lengths_batches_and_windows_compile_nothing() -> None:
    assert told("keys") == 1


@pytest.mark.long
def test_its_cuts_compile_within_memory_and_on_tensor_cores() -> None:
    rows = told("compiled")
    assert [row["problems"] for row in rows] == [[]] * len(rows) and rows
    assert [row["spilled_bytes"] for row in rows] == [0] * len(rows)
    assert min(row["tensor_cores"]["HGMMA"] for row in rows) >= 48
