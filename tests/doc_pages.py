"""Reading a page of the documentation: fences, tables, links, drawings; and running its Python."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparseattn as sa

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> dict[str, Path]:
    """The README and every page, by a short name."""
    return {"README.md": ROOT / "README.md", **{p.name: p for p in sorted(DOCS.glob("*.md"))}}


def fences(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks in a language."""
    return [body for word, body in _FENCE.findall(text) if word == language]


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", text)


def script(text: str) -> str:
    """The page's Python, each line where the page has it, so that a traceback names that line."""
    keep = ["\n"] * (text.count("\n") + 1)
    for found in _FENCE.finditer(text):
        if found[1] == "python":
            first = text.count("\n", 0, found.start(2))
            for at, line in enumerate(found[2].splitlines(keepends=True)):
                keep[first + at] = line
    return "".join(keep)


# Each page is a script of its own: a new `__main__`, its own folder, what it registered forgotten.
RUNNER = """
import contextlib, io, json, os, sys, traceback, types
from sparseattn import registry

printed = {}
for name, (folder, source) in json.load(sys.stdin).items():
    os.chdir(folder)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    out, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(source, name, "exec"), vars(module))
    except BaseException:
        error = traceback.format_exc()
    printed[name] = [out.getvalue(), error]
    registry.reset()
json.dump(printed, sys.stdout)
"""


def run_scripts(texts: dict[str, str], folder: Path) -> dict[str, list[str]]:
    """Run the Python of some pages in a new interpreter: what each printed, and its traceback."""
    given = {}
    for name, text in texts.items():
        (folder / name).mkdir(exist_ok=True)
        given[name] = [str(folder / name), script(text)]
    clean = {k: v for k, v in os.environ.items() if k != "SPARSEATTN_PLUGINS"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        env={**clean, "OMP_NUM_THREADS": "1"},
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def commands(text: str) -> list[list[str]]:
    """The words of each command in the page's `sh` blocks, without comments."""
    lines = "\n".join(fences(text, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def sections(text: str) -> dict[str, str]:
    """Heading to text, for headings of the second level."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text: str) -> list[list[list[str]]]:
    """Each table as rows of cells, the header first."""
    found = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", prose(text), re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        found.append([[cell.strip().replace(r"\|", "|") for cell in row] for row in rows])
        del found[-1][1]  # the line of dashes
    return found


def table(text: str, *header: str) -> list[list[str]]:
    """The rows under the one table that has this header; none where there is no such table."""
    return [row for rows in tables(text) if tuple(rows[0]) == header for row in rows[1:]]


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken_links(text: str, page: Path) -> list[str]:
    """Links to files or headings that are not there."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        if not file.exists():
            found.append(target)
        elif anchor:
            source = text if file == page else file.read_text()
            headings = re.findall(r"^#+ (.+)$", prose(source), re.MULTILINE)
            if anchor not in map(slug, headings):
                found.append(target)
    return found


@dataclass(frozen=True)
class Drawing:
    """A mask as a page draws it: the call on the first line, then a row a query.

    Attributes:
        spec: the mechanism. n, m: queries and keys. call: keywords of `attention`.
        mask: bool `[n, m]` as drawn.
    """

    spec: str
    n: int
    m: int
    call: dict[str, Any]
    mask: torch.Tensor

    @staticmethod
    def parse(text: str) -> Drawing:
        head, *rows = text.strip().splitlines()
        # `windowed(window=2), N=3, M=6, causal=True` is read as the arguments of a call.
        made = ast.parse(f"_({head})", mode="eval").body
        assert isinstance(made, ast.Call)
        words = {word.arg: ast.literal_eval(word.value) for word in made.keywords}
        n, m = words.pop("N"), words.pop("M")
        call = {
            word: torch.tensor([value]) if isinstance(value, list) else value
            for word, value in words.items()
        }
        if "key_mask" in call:
            call["key_mask"] = call["key_mask"].bool()
        mask = torch.tensor([[int(x) for x in row.split()] for row in rows])
        return Drawing(ast.unparse(made.args[0]), n, m, call, mask == 1)

    def problems(self) -> list[str]:
        """Where the drawing is not what the definition, `mask` or the default path uses."""
        if self.mask.shape != (self.n, self.m):
            return [f"it has {list(self.mask.shape)} entries"]
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, 1, self.n, 8, generator=generator)
        k = torch.randn(1, 1, self.m, 8, generator=generator)
        mech = sa.mechanism(self.spec)
        values = torch.eye(self.m)[None, None]  # the output is then the map itself
        shown = {
            "attention_weights": sa.attention_weights(q, k, mech, **self.call) != 0,
            "mask": mech.mask(sa.AttentionCall.make(q, k, values, **self.call)),
            "attention": sa.attention(q, k, values, mech, **self.call) != 0,
        }
        return [
            f"{name} uses\n{mask[0, 0].int()}"
            for name, mask in shown.items()
            if not torch.equal(mask[0, 0], self.mask)
        ]
