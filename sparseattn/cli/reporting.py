"""`report`: one HTML page from stored results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidInputError
from . import output
from .output import JsonPath, say

Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE...", help="What compare, bench or evaluate wrote with --json, or a journal."
    ),
]
Output = Annotated[str, typer.Option("--output", metavar="PATH", help="The page.")]


def report(files: Files, page: Output = "report.html", json: JsonPath = None) -> None:
    """One self-contained HTML page from stored results: charts, tables and conditions.

    It measures nothing and loads nothing. Rows that failed when they were measured are shown with
    their reasons, and do not change the exit code.
    """
    output.check_json(json)
    if json is not None and json != output.STDOUT:
        target = Path(json).resolve()
        if target == Path(page).resolve():
            raise InvalidInputError(
                f"--json and --output both got {page!r:.200}; give each its own"
            )
        if target in {Path(file).resolve() for file in files}:
            raise InvalidInputError(f"--json got {json!r:.200}, which is one of the results")
    from ..harness.reporting.page import report as write

    records = write(files, page)
    output.write_json(json, records)
    if json != output.STDOUT:
        for record in records:
            say(f"{output.printable(record['name'])}: {record['kind']}, {record['rows']} rows")
        say(f"wrote {output.printable(page)}")
