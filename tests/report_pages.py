"""Stored results for the tests of `report`, its page taken apart, and a browser to see it in."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_VOID = {"meta", "link", "img", "br", "hr", "input", "base", "embed", "source", "area"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""


class Page(HTMLParser):
    """Every element of a page with its own text, and nothing left open."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1].tag == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1].text += data

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]

    @property
    def words(self) -> str:
        """What a reader reads."""
        unread = ("script", "style", "title")
        return " ".join(" ".join(e.text for e in self.elements if e.tag not in unread).split())

    @property
    def charts(self) -> dict[str, Any]:
        (element,) = [e for e in self.all("script") if e.attributes.get("id") == "charts"]
        return json.loads(element.text)


@dataclass
class Seen:
    """A page as a browser left it: its document, and what it complained of."""

    dom: str
    complaints: list[str] = field(default_factory=list)


def browse(path: Path, profile: Path, dark: bool = False, width: int = 1400) -> Seen:
    """Open a file in headless Chromium, wait for what it draws, and dump its document."""
    assert BROWSER is not None
    words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    words += " --disable-background-networking --disable-component-update --disable-dev-shm-usage"
    words += f" --enable-logging=stderr --virtual-time-budget=20000 --window-size={width},2000"
    words += f" --blink-settings=preferredColorScheme={0 if dark else 1}"
    done = subprocess.run(
        [BROWSER, *words.split(), f"--user-data-dir={profile}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Seen(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def evaluated() -> dict[str, Any]:
    """What `evaluate` writes; the numbers are of SmolLM2-135M on 256 tokens."""
    fields = ("mechanism", "nature", "perplexity", "kl", "top1_agreement", "s_per_token")
    fields += ("speedup", "control")
    measured = [
        ("original", "exact", 17.93, 0.0, 1.0, 0.00417, 0.95, True),
        ("full", "exact", 17.93, 0.0, 1.0, 0.00494, 0.9, True),
        ("windowed(window=64, sinks=0)", "masked_softmax", 147.1, 2.1, 0.453, 0.00505, 1.07, False),
        ("windowed(window=60, sinks=4)", "masked_softmax", 32.66, 0.4, 0.762, 0.00361, 1.31, False),
        ("linear", "different_function", 3352.0, 5.2, 0.07, 0.00256, 1.2, False),
        ("performer", "softmax_estimate", None, None, None, None, None, False),
        ("mean_of_values", "different_function", 3338.0, 5.17, 0.059, 0.00361, 1.03, True),
    ]
    rows = []
    for values in measured:
        row = dict(zip(fields, values, strict=True)) | {"status": "ok", "reason": "", "notes": []}
        row |= {"tokens": 256, "peak_bytes": 7e7, "looks_ahead": False, "fallbacks": 0}
        if row["perplexity"] is None:
            row |= {"status": "failed", "reason": "ArithmeticError: its logits are not finite"}
        rows.append(row)
    manifest = {"model": "smollm2", "cpu": "a CPU", "command": "sparseattn evaluate smollm2"}
    return {"manifest": manifest, "rows": rows}
