"""`check`: the conformance checks, one line a law."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from ..errors import SparseAttnError
from . import output
from .output import JsonPath, say, table


def _count(name: str, impl: str | None, expensive: bool) -> int:
    """How many checks `run_checks` will make of a name.

    Raises:
        SparseAttnError: the name or spec is unknown, or no options can be guessed for it.
    """
    from .. import registry
    from ..choice import candidates
    from ..testing import checks_for, examples
    from ..testing.runner import LAWS_OF_DEFAULTS

    tried = [registry.mechanism(name)] if "(" in name else examples(name)
    total = 0
    for at, mech in enumerate(tried):
        if impl is None or impl in {one.name for one in candidates(mech)}:
            laws = LAWS_OF_DEFAULTS if at else None
            total += len(checks_for(mech, impl, laws, expensive))
    return total


def _row(result: Any) -> dict[str, Any]:
    name = f"{result.mechanism}-{result.implementation}-{result.law}"
    return {"name": name, **dataclasses.asdict(result)}


def _skipped(name: str, reason: str) -> dict[str, Any]:
    empty = {"law": "", "mechanism": name, "implementation": "", "case": "", "seconds": 0.0}
    return {"name": name, **empty, "status": "skipped", "reason": reason}


def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Names or specs; every mechanism without one."),
    ] = None,
    impl: Annotated[
        str | None, typer.Option(metavar="NAME", help="This implementation only.")
    ] = None,
    expensive: Annotated[
        bool, typer.Option("--expensive", help="Also the laws and implementations that compile.")
    ] = False,
    json: JsonPath = None,
) -> None:
    """The conformance checks of every registered implementation; exits with 1 if any fails."""
    output.check_json(json)
    from .. import registry
    from ..testing import run_checks

    with output.own_stdout(), output.Progress() as progress:
        counts: dict[str, int] = {}
        rows = []
        for name in names or [record.name for record in registry.list_mechanisms()]:
            try:
                counts[name] = _count(name, impl, expensive)
            except SparseAttnError as error:
                if names:  # asked for by name: bad usage, found before any work
                    raise
                rows.append(_skipped(name, str(error)))
        total, done = sum(counts.values()), 0

        def tick(result: Any) -> None:
            nonlocal done
            done += 1
            progress(done, max(done, total), f"{result.mechanism} {result.law}")

        results = run_checks(list(counts), impl=impl, expensive=expensive, progress=tick)
        rows = [_row(result) for result in results] + rows
    output.write_json(json, rows)
    if json != output.STDOUT:
        _print(rows)
    if any(row["status"] == "failed" for row in rows):
        raise typer.Exit(1)


def _print(rows: list[dict[str, Any]]) -> None:
    columns = ["mechanism", "implementation", "law", "status", "case", "reason"]
    table(columns, [[row[column] for column in columns] for row in rows])
    found: dict[str, int] = {}
    for row in rows:
        found[row["status"]] = found.get(row["status"], 0) + 1
    say(", ".join(f"{count} {status}" for status, count in found.items()) or "nothing to check")
