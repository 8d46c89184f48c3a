"""`new`: a third-party plugin that installs, passes its tests, and is there to be changed."""

from __future__ import annotations

import importlib.util
import keyword
import re
import string
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidInputError
from . import output, templates
from .output import JsonPath, say

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def check_name(name: str) -> None:
    """Refuse a name that could not be a mechanism's, or that is taken.

    Raises:
        InvalidInputError: it says why.
    """
    # fullmatch, not match: `$` would let a trailing newline through. The name goes into files.
    if not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"{name!r:.80} is no name for a mechanism; expected [a-z][a-z0-9_]{{0,63}}"
        )
    if keyword.iskeyword(name):
        raise InvalidInputError(
            f"{name!r} is a keyword of Python, which no spec can name; choose another"
        )
    from .. import registry

    taken = {record.name for record in registry.list_mechanisms()}
    for plugin in registry.diagnose():
        taken |= {plugin.name, *plugin.mechanisms}
    package = _package(name)
    if name in taken or importlib.util.find_spec(package) is not None:
        raise InvalidInputError(
            f"the name {name!r} is taken by an installed mechanism, plugin or package ({package}); "
            "choose another"
        )


def _package(name: str) -> str:
    return f"sparseattn_{name}"


def _project(name: str) -> str:
    # Distribution names end in a letter or a digit, and hyphens stand for underscores.
    return "sparseattn-" + re.sub("_+", "-", name).strip("-")


def write(name: str, folder: Path) -> Path:
    """Write the project into a new folder inside `folder`; returns the new folder.

    Raises:
        InvalidInputError: the name will not do, or the new folder exists already.
    """
    check_name(name)
    target = folder / _project(name)
    words = {
        "name": name,
        "package": _package(name),
        "project": _project(name),
        # The suffix keeps a name such as `none` or `plugin` clear of names in the file.
        "cls": "".join(part.capitalize() for part in name.split("_")) + "Attention",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not exist_ok: this is what keeps `new` from writing over anything, a race included.
        target.mkdir()
        for path, template in templates.files(_package(name)).items():
            file = target / path
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8", newline="\n") as handle:
                handle.write(string.Template(template).substitute(words))
    except FileExistsError as error:
        raise InvalidInputError(
            f"{error.filename} exists already and is left as it is; choose another name or --path"
        ) from None
    except OSError as error:
        raise InvalidInputError(f"{error.filename or target} cannot be written: {error}") from error
    return target


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the mechanism: [a-z][a-z0-9_]*.")],
    path: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder to make the project in.")
    ] = Path("."),
    json: JsonPath = None,
) -> None:
    """A working third-party plugin, with its tests, ready to install: DIR/sparseattn-NAME.

    Nothing is ever overwritten.
    """
    output.check_json(json)
    target = write(name, path)
    written = sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file())
    record = {"name": name, "status": "ok", "reason": "", "path": str(target), "files": written}
    output.write_json(json, record)
    if json == output.STDOUT:
        return
    say(f"Wrote {target}:")
    for file in written:
        say(f"  {file}")
    say()
    say(f"Next: pip install -e '{target}[test]' && pytest {target}")
