"""Every Python snippet of the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(text, id=f"{page.name}-{at}")
    for page in PAGES
    for at, text in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("text", SNIPPETS)
def test_snippet_runs(text: str) -> None:
    # As a script would run it: no future flags of this file, and a module that dataclasses find.
    exec(compile(text, "snippet", "exec", dont_inherit=True), {"__name__": "__main__"})
