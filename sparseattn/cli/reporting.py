"""`report`: one HTML page from stored results."""

from __future__ import annotations

from typing import Annotated

import typer

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
    output.check_json(json, [page, *files])
    from ..harness.reporting.page import report as write

    records = write(files, page)
    output.write_json(json, records)
    if json != output.STDOUT:
        for record in records:
            say(f"{output.printable(record['name'])}: {record['kind']}, {record['rows']} rows")
        say(f"wrote {output.printable(page)}")
