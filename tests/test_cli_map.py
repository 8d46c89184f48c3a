"""`sparseattn show NAME --map`: the attention map of a recorded head beside the exact one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import sparseattn as sa
from sparseattn.cli import app, attention_map
from sparseattn.harness.inputs import RECORDED

LENGTH = 100
EPS = torch.finfo(torch.float64).eps


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["show", *words])


def softmax_map(head: int, visible: torch.Tensor) -> np.ndarray:
    """The formula on the recorded tensors, with nothing of the package in between."""
    parts = load_file(RECORDED)
    q, k = (parts[name][0, at, :LENGTH].double() for name, at in (("q", head), ("k", head // 3)))
    logits = (q @ k.T / 8).masked_fill(~visible, -torch.inf)
    return torch.softmax(logits, dim=1).numpy()


def near(a: Any, b: Any) -> bool:
    return bool(np.abs(np.asarray(a) - b).max() <= LENGTH * EPS)


def positions() -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.arange(LENGTH)
    return at[:, None], at[None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("layer", "head", "at"), [(None, None, 0), (10, None, 3), (23, 1, 7)])
def test_the_maps_are_those_of_the_recorded_head(causal, layer, head, at):
    mech = sa.mechanism("windowed(window=9, sinks=2)")
    drawn = attention_map.draw(mech, LENGTH, causal, layer, head)
    i, j = positions()
    seen = (j <= i) if causal else torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    exact, own = (softmax_map(at, x) for x in (seen, seen & (((i - j).abs() < 9) | (j < 2))))
    assert near(drawn.exact, exact) and near(drawn.own, own)
    assert near(drawn.shared, np.minimum(exact, own).sum(1))
    assert (drawn.layer, drawn.head) == [(2, 0), (10, 3), (23, 1)][(0, 3, 7).index(at)]


def test_a_cell_is_the_share_of_a_querys_weight():
    result = run("windowed(window=9)", "--map", "--length", str(LENGTH), "--json", "-")
    found = json.loads(result.stdout)
    assert "pattern" not in found
    i, j = positions()
    maps = {
        "exact_cells": softmax_map(0, j <= i),
        "cells": softmax_map(0, (j <= i) & (i - j < 9)),
    }
    for name, whole in maps.items():
        cells = np.array(found["map"][name])
        rows, columns = cells.shape
        assert (rows, columns) == (18, 36)
        for r in range(rows):
            for c in range(columns):
                part = whole[
                    r * LENGTH // rows : (r + 1) * LENGTH // rows,
                    c * LENGTH // columns : (c + 1) * LENGTH // columns,
                ]
                assert abs(cells[r, c] - part.sum(1).mean()) <= 0.5e-4 + LENGTH * EPS
    shared = np.minimum(*maps.values()).sum(1)
    assert abs(found["map"]["shared_mean"] - shared.mean()) <= LENGTH * EPS
    assert abs(found["map"]["shared_least"] - shared.min()) <= LENGTH * EPS


def test_what_is_drawn():
    result = run("windowed(window=9)", "--map", "--layer", "23", "--length", "36")
    lines = result.stdout.splitlines()[-24:]
    assert "layer 23 head 0" in lines[0] and "Right: windowed(window=9, sinks=0)" in lines[1]
    assert all(len(line) == 78 for line in lines[2:22])
    # This head gives its weight to the first key, which a window loses.
    exact, own = lines[20].split("|")[1], lines[20].split("|")[3]
    assert exact[0] in "▓█" and own[0] == " "
    drawn = attention_map.draw(sa.mechanism("windowed(window=9)"), 36, layer=23)
    assert all(line.isascii() for line in drawn.lines("ascii"))


def test_full_has_all_in_common_with_itself():
    drawn = attention_map.draw(sa.mechanism("full"), 3, causal=False)
    assert drawn.exact.shape == (3, 3) and np.array_equal(drawn.exact, drawn.own)
    assert "In common: 100.0% of a query's weight on average, 100.0% at least" in drawn.lines()[-1]


@pytest.mark.parametrize("spec", ["retention", "topk_blocks(block=16, top=1)", "linear"])
def test_rows_are_shares_whatever_the_weights(spec):
    drawn = attention_map.draw(sa.mechanism(spec), LENGTH)
    assert (drawn.own >= 0).all() and near(drawn.own.sum(1), 1.0)


@dataclass(frozen=True)
class Before(sa.MaskedSoftmax):
    """The keys before the query: the first query sees none."""

    name = "before"

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return j < i


def test_a_query_that_sees_no_key_has_an_empty_row():
    drawn = attention_map.draw(Before(), 9)
    assert not drawn.own[0].any() and near(drawn.own[1:].sum(1), 1.0)
    assert "0.0% at least" in drawn.lines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--head", "0"], "--map"),
        (["--layer", "2", "--length", "64"], "--map"),
        (["--map", "--layer", "3"], "layer 23 head 2"),
        (["--map", "--layer", "2", "--head", "3"], "layer 10 head 3"),
        (["--map", "--length", "0"], "at least 1"),
        (["--map", "--length", "5000"], "2048"),
    ],
)
def test_what_was_not_recorded_is_refused(words, said):
    result = run("full", *words)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1


def test_save_writes_both_maps(tmp_path):
    image = pytest.importorskip("PIL.Image")
    target = tmp_path / "x.png"
    result = run("windowed(window=1)", "--map", "--length", "40", "--save", str(target))
    assert result.exit_code == 0, result.output
    with image.open(target) as saved:
        zoom = saved.size[1] // 42  # a frame around each map
        assert saved.size == ((42 + 8 + 42) * zoom, 42 * zoom)
        left = 42 + 8 + 1
        own = [
            [saved.getpixel(((left + j) * zoom, (1 + i) * zoom)) for j in range(40)]
            for i in range(40)
        ]
    # A window of one gives all weight to the query's own key.
    assert own == [[0 if i == j else 255 for j in range(40)] for i in range(40)]
