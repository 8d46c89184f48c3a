"""The command line: `sparseattn --help`.

Importing this imports neither torch nor a plugin, so that `--help` answers at once; each command
imports what it needs when it runs.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import SparseAttnError
from . import checks, comparing, diagnosis, mechanisms, models, reporting, scaffold
from .output import printable

HELP = """Every attention mechanism under one name, one contract and one honest measurement.

Exit codes: 0 all well; 1 a check or a row failed, or a plugin is broken; 2 bad usage."""


class Commands(TyperGroup):
    """Commands whose typed errors are one line on standard error, and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except SparseAttnError as error:
                typer.echo(f"error: {printable(error)}", err=True)
                raise typer.Exit(2) from None


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    print(f"warning: {printable(message)}", file=sys.stderr)


app = typer.Typer(
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    # Completion and rich's help and tracebacks cost start-up time on every call.
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("list")(mechanisms.list_mechanisms)
app.command("show")(mechanisms.show)
app.command("compare")(comparing.compare)
app.command("check")(checks.check)
app.command("bench")(comparing.bench)
app.command("evaluate")(models.evaluate)
app.command("record")(models.record)
app.command("report")(reporting.report)
app.command("doctor")(diagnosis.doctor)
app.command("new")(scaffold.new)


@app.callback()
def _root() -> None:
    pass


_root.__doc__ = HELP


def main() -> None:
    """The entry point of `sparseattn`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that cannot show a plugin's words must not end the command.
            stream.reconfigure(errors="backslashreplace")
    app()
