"""`check`: the conformance checks, one line a law."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import output
from .output import JsonPath, say, table


def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Mechanisms or specs; all without one."),
    ] = None,
    impl: Annotated[
        str | None, typer.Option(metavar="NAME", help="This implementation only.")
    ] = None,
    expensive: Annotated[
        bool, typer.Option("--expensive", help="Also the laws that take minutes.")
    ] = False,
    json: JsonPath = None,
) -> None:
    """The conformance checks of every registered implementation; exits with 1 if any fails."""
    output.check_json(json)
    from ..testing import run_checks

    with output.own_stdout(), output.Progress() as progress:
        records = run_checks(names or None, impl=impl, expensive=expensive, progress=progress)
    rows = [_row(record) for record in records]
    output.write_json(json, rows)
    if json != output.STDOUT:
        table(
            ["mechanism", "implementation", "law", "case", "status", "reason"],
            [
                [r["mechanism"], r["implementation"], r["law"], r["case"], r["status"], r["reason"]]
                for r in rows
            ],
        )
        counts = {status: sum(r["status"] == status for r in rows) for status in _STATUSES}
        say(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    if any(r["status"] == "failed" for r in rows):
        raise typer.Exit(1)


_STATUSES = ("ok", "failed", "skipped")


def _row(record: Any) -> dict[str, Any]:
    return dict(record) if isinstance(record, dict) else dict(vars(record))
