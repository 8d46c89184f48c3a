"""What a report is made of: errors by head, names and their places, axes."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest
import torch

from sparseattn.harness import inputs, metrics
from sparseattn.harness.reporting import labels
from sparseattn.harness.reporting.axes import LogAxis
from sparseattn.harness.reporting.charts import short_names

# --- error by head ------------------------------------------------------------------------------


def test_heads_have_the_error_of_their_own_part():
    out, ref = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    found = metrics.by_head(out, ref, [(7, 0), (7, 1), (None, 2)])
    assert [(one["layer"], one["head"]) for one in found] == [(7, 0), (7, 1), (None, 2)]
    for at, one in enumerate(found):
        assert one["rel_l2"] == metrics.relative_l2(out[:, at], ref[:, at])
    alone = torch.zeros_like(ref)
    alone[:, 1] = 1.0
    assert [one["rel_l2"] > 0 for one in metrics.by_head(ref + alone, ref, [(0, 0)] * 3)] == [
        False,
        True,
        False,
    ]


def test_heads_are_called_what_the_recording_says():
    said = json.dumps(["2 head 0", "10 head 3"])
    assert inputs.head_names({"heads": said}, 2) == [(2, 0), (10, 3)]
    counted = [(None, 0), (None, 1)]
    for other in ("", "3", "[]", said[:-2], '["2 head 0"]', '["x head 0", "2 head 1"]', '{"a": 1}'):
        assert inputs.head_names({"heads": other}, 2) == counted, other
    assert inputs.head_names({}, 2) == counted
    recorded = inputs.source("recorded").make(64, 0, True).provenance
    assert inputs.head_names(recorded, 9)[3] == (10, 3)


# --- geometry -----------------------------------------------------------------------------------


def test_names_cover_neither_one_another_nor_a_mark():
    chance = random.Random(1)
    for _ in range(50):
        points = [(chance.uniform(20, 700), chance.uniform(20, 400), "x" * 12) for _ in range(12)]
        found = labels.place(points, 800, 440)
        boxes = [labels._box(label, "x" * 12) for label in found]
        for at, box in enumerate(boxes):
            assert min(box) >= 0 and box[2] <= 800 and box[3] <= 440
            assert all(labels._overlap(box, other) == 0 for other in boxes[:at])
            assert all(
                labels._overlap(box, (x - 3, y - 3, x + 3, y + 3)) == 0 for x, y, _ in points
            )


@pytest.mark.parametrize("heights", [[], [5.0], [5, 5, 5], [0, 100, 1, 99], [300, 299, 298]])
def test_lines_end_apart(heights):
    moved = labels.spread(heights, 300)
    assert [a for _, a in sorted(zip(heights, moved, strict=True))] == sorted(moved)
    ordered = sorted(moved)
    assert all(b - a >= labels.LINE for a, b in pairwise(ordered))
    assert all(0 <= y <= 300 for y in moved)


def test_an_axis_knows_its_pixels():
    axis = LogAxis.over([1e-3, 2.0], 400, up=True)
    for value in (1e-3, 0.05, 2.0):
        assert abs(axis.back(axis.at(value)) / value - 1) < 1e-9
    assert 0 < axis.at(2.0) < axis.at(1e-3) < 400
    assert axis.ticks() == sorted(axis.ticks()) and len(axis.ticks()) <= 400 / 45
    assert LogAxis.over([3.0], 100).low < 3.0 < LogAxis.over([3.0], 100).high


def test_short_names_stay_apart():
    def names(*specs: str, limit: int = 20) -> list[str]:
        return list(short_names([{"mechanism": spec} for spec in specs], limit).values())

    assert names("full", "windowed(window=8)") == ["full", "windowed"]
    assert names("w(a=1)", "w(a=2)") == ["w(a=1)", "w(a=2)"]
    long = names(*(f"windowed(window=256, {x}=1, global=2, last=True)" for x in "abc"))
    assert len(set(long)) == 3 and all(len(name) <= 20 + 3 for name in long)
