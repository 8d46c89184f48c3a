"""The files of the distribution that `sparseattn new NAME` writes.

`$name`, `$package`, `$project` and `$cls` are filled in; all four derive from a validated name.
"""

from __future__ import annotations

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "$project"
version = "0.1.0"
description = "The attention mechanism $name, for sparseattn."
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["sparseattn>=0.1", "torch"]

[project.optional-dependencies]
test = ["pytest>=8.2"]

# This is how sparseattn finds the plugin: there is no list of plugins anywhere.
[project.entry-points."sparseattn"]
$name = "$package:Plugin"

[tool.hatch.build.targets.wheel]
packages = ["src/$package"]

[tool.pytest.ini_options]
testpaths = ["tests"]
"""

README = """\
# $project

The attention mechanism `$name`, a plugin for sparseattn: a window of keys near the query, and
every `step`-th block of 64 keys.

```sh
pip install -e ".[test]"
pytest                              # the conformance checks, and tests of its own
sparseattn show $name --length 1024
sparseattn compare full $name "$name(window=64, step=16)"
```

```python
import torch

import sparseattn as sa

q = k = v = torch.randn(1, 8, 1024, 64)
out = sa.attention(q, k, v, "$name", window=64, causal=True)  # [1, 8, 1024, 64]
```

## To make it yours

`src/$package/__init__.py` holds all of it. Positions `i` (query) and `j` (key) count from the first
token of each document; causality, padding and packing are the engine's work.

- `visible(i, j)` is the definition. Change it first; it alone makes a correct, slow mechanism.
- `layout(grid)` states the same pattern in clauses, which makes it fast. The checks compare
  the two.
- Options are the fields of the frozen dataclass. `__post_init__` refuses values that mean nothing.
"""

INIT = '''\
"""The attention mechanism `$name`: a window, and every `step`-th block of 64 keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import sparseattn as sa

_BLOCK = 64


@dataclass(frozen=True)
class $cls(sa.MaskedSoftmax):
    """A window of keys near the query, and every `step`-th block of 64 keys.

    `abs(i - j) < window`, or `(j // 64) % step == 0`.

    Attributes:
        window: keys at a smaller distance are seen; causal sees `window` keys, its own included.
        step: of the blocks of 64 keys, each `step`-th is seen by every query; 1 is full attention.
    """

    name = "$name"
    source = "the template of `sparseattn new`"

    window: int = 128
    step: int = 8

    def __post_init__(self) -> None:
        for option in ("window", "step"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise sa.InvalidInputError(
                    f"{self.name}: option {option} got {value!r:.80}, expected an int from 1 to "
                    f"{2**31 - 1}"
                )

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return ((i - j).abs() < self.window) | ((j // _BLOCK) % self.step == 0)

    def layout(self, grid: sa.Grid) -> sa.Layout:
        near = grid.band(self.window - 1, self.window - 1)
        return near | grid.key_blocks(_BLOCK, step=self.step)


class Plugin:
    """What the entry point names."""

    sparseattn_api = 1

    @sa.hookimpl
    def register_mechanisms(self, register: Any) -> None:
        register($cls)
'''

TESTS = '''\
"""The laws that every mechanism keeps, and what this one alone must do."""

from __future__ import annotations

import pytest
import torch
from $package import $cls

import sparseattn as sa
from sparseattn.testing import parametrize_with_checks


# Small options too, so that short inputs have pairs both in and out of the pattern.
@parametrize_with_checks([$cls(), $cls(window=5, step=3)])
def test_conformance(check):
    check()


def test_it_is_found_by_its_name():
    assert sa.mechanism("$name(window=16)") == $cls(window=16)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 63, 200, 513])
def test_layout_is_the_definition(causal, length):
    mech = $cls(window=5, step=3)
    at = torch.arange(length)
    i, j = at[:, None], at[None, :]
    allowed = mech.visible(i, j) & ((j <= i) | (not causal))
    assert torch.equal(mech.layout(sa.Grid(length, length, causal)).mask(), allowed)


def test_step_one_is_full_attention():
    q, k, v = (torch.randn(2, 4, 300, 32, dtype=torch.float64) for _ in range(3))
    full = sa.attention(q, k, v, "full", causal=True)
    assert torch.allclose(sa.attention(q, k, v, $cls(step=1), causal=True), full)


@pytest.mark.parametrize("option", ["window", "step"])
@pytest.mark.parametrize("value", [0, -1])
def test_meaningless_options_are_refused(option, value):
    with pytest.raises(sa.InvalidInputError, match=option):
        $cls(**{option: value})
'''

GITIGNORE = """\
__pycache__/
*.egg-info/
.pytest_cache/
build/
dist/
"""


def files(package: str) -> dict[str, str]:
    """Path inside the project to template."""
    return {
        "pyproject.toml": PYPROJECT,
        "README.md": README,
        ".gitignore": GITIGNORE,
        f"src/{package}/__init__.py": INIT,
        f"src/{package}/py.typed": "",
        "tests/test_conformance.py": TESTS,
    }
