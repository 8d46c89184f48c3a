"""What every command writes with: tables, JSON, and progress on standard error.

Nothing here imports torch, and rich only when there is a terminal to draw on.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InvalidInputError
from ..harness import store
from ..harness.units import printable

STDOUT = "-"
JsonPath = Annotated[
    str | None,
    typer.Option("--json", metavar="PATH", help="Write JSON to PATH; - for standard output."),
]
_BAR_AFTER = 2.0  # seconds before a progress bar shows
_LINE_EVERY = 5.0  # seconds between progress lines where there is no terminal


def check_json(path: str | None, others: Iterable[str] = ()) -> None:
    """Refuse a place that cannot be written to before any work is done for it.

    Args:
        others: the files that the command reads, or writes beside.

    Raises:
        InvalidInputError: it is a folder, lies in none, or is one of the others.
    """
    if path is None or path == STDOUT:
        return
    target = Path(path)
    if not path or target.is_dir():
        raise InvalidInputError(f"--json got {path!r}, which is a folder; give the path of a file")
    if not target.absolute().parent.is_dir():
        raise InvalidInputError(f"--json got {path!r}, but there is no folder {target.parent}")
    if target.resolve() in {Path(other).resolve() for other in others}:
        raise InvalidInputError(
            f"--json got {path!r}, which the command also reads or writes as another file; give "
            "JSON a path of its own"
        )


def journal_of(path: str | None, resume: bool, others: Iterable[str] = ()) -> Path | None:
    """The journal beside `--json PATH`, or None where there is no such file.

    Raises:
        InvalidInputError: it cannot be written (see `check_json`), or there is none to go on from.
    """
    check_json(path, others)
    if path is not None and path != STDOUT:
        return Path(f"{path}.part")
    if resume:
        raise InvalidInputError("--resume needs --json PATH: it goes on from the journal PATH.part")
    return None


def write_json(path: str | None, value: Any) -> None:
    """Write `value` whole: to standard output for `-`, else to a file by rename."""
    if path is None:
        return
    if path == STDOUT:
        sys.stdout.write(store.text(value))
    else:
        store.write(path, value)


def is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # a closed or replaced stream
        return False


def say(text: str = "", *, err: bool = False) -> None:
    """A line, as it is."""
    print(text, file=sys.stderr if err else sys.stdout)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A table on standard output: drawn on a terminal, aligned columns of plain text elsewhere."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if is_terminal(sys.stdout):
        _draw(headers, cells, title)
        return
    if title:
        say(title)
    lines = [list(headers), *cells]
    widths = [max(len(line[at]) for line in lines) for at in range(len(headers))]
    for line in lines:
        say("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def _draw(headers: Sequence[str], cells: list[list[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title or None, title_justify="left")
    for header in headers:
        grid.add_column(header, overflow="fold")
    for row in cells:
        # Text, not str: brackets in a spec are no markup.
        grid.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    Console(file=sys.stdout, force_terminal=True, highlight=False).print(grid)


_STYLES = {
    "ok": "green",
    "loaded": "green",
    "passed": "green",
    "failed": "red",
    "broken": "red",
    "blocked": "yellow",
    "unsupported": "yellow",
}


class Progress:
    """How far a long command is, on standard error: a bar with the time left after two seconds.

    Without a terminal it is a plain line every few seconds. Use it as a context and call
    `progress(done, total, label)`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._bar: Any = None
        self._fields: dict[str, Any] = {"completed": 0, "total": None, "label": "", "left": ""}

    def __enter__(self) -> Progress:
        self._stream = sys.stderr
        self._start = self._last_line = time.monotonic()
        self._timer: threading.Timer | None = None
        if is_terminal(self._stream):
            # A timer, because the first step alone may take minutes.
            self._timer = threading.Timer(_BAR_AFTER, self._open)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
                sys.stderr = self._stream

    def __call__(self, done: int, total: int, label: str = "") -> None:
        now = time.monotonic()
        left = f"about {(now - self._start) / done * (total - done):.0f} s left" if done else ""
        label = printable(label)
        with self._lock:
            self._fields = {"completed": done, "total": total, "label": label, "left": left}
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], **self._fields)
        quiet = self._timer is not None or now - self._start < _BAR_AFTER
        if not quiet and now - self._last_line >= _LINE_EVERY:
            self._last_line = now
            print(f"{done}/{total} {label}{left and f', {left}'}", file=self._stream)

    def _open(self) -> None:
        from rich import progress
        from rich.console import Console

        with self._lock:
            if self._timer is None:  # it ended meanwhile
                return
            bar = progress.Progress(
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.fields[left]}", markup=False),
                progress.TextColumn("{task.fields[label]}", markup=False),
                console=Console(file=self._stream, force_terminal=True),
                transient=True,
                refresh_per_second=2,  # it shares the machine with what is being timed
            )
            bar.add_task("", **self._fields)
            bar.start()
            self._bar = bar


def own_stdout() -> contextlib.redirect_stdout[Any]:
    """While it is open, what plugins print goes to standard error: standard output is ours."""
    return contextlib.redirect_stdout(sys.stderr)
