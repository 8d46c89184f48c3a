"""Results as JSON: the fields of a row, the manifest, and a journal that survives being cut off.

A document is `{"manifest": {...}, "rows": [...]}`. While rows are measured they go to a journal,
`PATH.part`: one row a line, with the manifest it was measured under, each synced to disk before the
next is begun. The document itself is written whole, under another name, and renamed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import InvalidInputError

SCHEMA = 1
ROW_FIELDS = (
    "mechanism",
    "nature",
    "impl",
    "input",
    "length",
    "seed",
    "causal",
    "dtype",
    "status",
    "reason",
    "error",
    "heads",
    "retained_mass",
    "oracle_rel_l2",
    "arithmetic",
    "density",
    "time",
    "speedup",
    "baseline_s",
    "peak_bytes",
    "select_s",
    "compile_s",
    "backward",
    "metrics",
    "notes",
    "looks_ahead",
    "pareto",
    "control",
)
STATUSES = ("ok", "failed", "unsupported")
# What makes a row this row and no other, within one manifest.
ROW_KEY = ("mechanism", "input", "length", "seed")
# What may differ between the session that began a journal and the one that goes on with it.
_OF_THE_SESSION = ("command", "started")


def new_row(**given: Any) -> dict[str, Any]:
    """A row with every field, null where not given."""
    unknown = set(given) - set(ROW_FIELDS)
    if unknown:
        raise InvalidInputError(
            f"a row has no field {', '.join(sorted(unknown))}; expected some of "
            f"{', '.join(ROW_FIELDS)}"
        )
    empty = {"metrics": {}, "notes": [], "reason": "", "looks_ahead": False}
    return dict.fromkeys(ROW_FIELDS) | empty | {"pareto": False, "control": False} | given


def row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The identity of a row within one comparison."""
    return tuple(row[name] for name in ROW_KEY)


def plain(value: Any) -> Any:
    """`value` in what JSON has: NaN and infinities are null, tuples lists, all else its digest or
    its `repr`."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    digest = getattr(value, "digest", None)
    return f"<{digest}>" if isinstance(digest, str) else repr(value)


def text(document: Any) -> str:
    """A document as JSON."""
    return json.dumps(plain(document), indent=2, allow_nan=False) + "\n"


def write(path: str | os.PathLike[str], document: Any) -> None:
    """Write a document whole, as `write_text` does."""
    write_text(path, text(document))


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file beside `path` to write to, which is synced and renamed to it once all went well."""
    target = Path(path).absolute()
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's own is for the owner alone
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_text(path: str | os.PathLike[str], written: str) -> None:
    """Write a file whole: beside `path`, in UTF-8, synced and then renamed to it."""
    with replacing(path) as file:
        file.write(written.encode("utf-8"))


class Journal:
    """Rows on disk as they finish.

    Args:
        path: the journal, by convention `PATH.part`.
        manifest: of this session.
        resume: go on from what the file holds; without it the file is begun anew. A file that is
            not there is begun.
        fields: what a row has at least.

    Raises:
        InvalidInputError: the file is no journal, or was begun with another manifest.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: Mapping[str, Any],
        resume: bool = False,
        fields: Collection[str] = ROW_FIELDS,
    ) -> None:
        self.path = Path(path)
        self._fields = frozenset(fields)
        self.rows: list[dict[str, Any]] = []
        self._manifest = plain(manifest)
        keep = 0
        if resume and self.path.exists():
            keep = self._read()
        self._file = open(self.path, "r+b" if keep else "wb")  # noqa: SIM115  (closed by close)
        # A row that was cut off in the middle is measured again.
        self._file.truncate(keep)
        self._file.seek(keep)

    def _read(self) -> int:
        """Take over the complete lines; returns how many bytes they are."""
        kept = 0
        data = self.path.read_bytes()
        for number, line in enumerate(data.splitlines(keepends=True)):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut off")
                record = json.loads(line)
            except ValueError as error:
                if kept + len(line) < len(data):
                    raise InvalidInputError(
                        f"line {number + 1} of the journal {self.path} is no JSON; remove the file "
                        "to begin anew"
                    ) from error
                break
            self._take(record, number + 1)
            kept += len(line)
        return kept

    def _take(self, record: Any, number: int) -> None:
        before = record.pop("manifest", None) if isinstance(record, dict) else None
        if not isinstance(before, dict) or not set(record) >= self._fields:
            raise InvalidInputError(
                f"line {number} of the journal {self.path} is no row of these results with its "
                "manifest; remove the file to begin anew"
            )
        self._check(before)
        self.rows.append(record)

    def _check(self, before: Mapping[str, Any]) -> None:
        """Refuse a row that was measured under other conditions than this session's."""
        manifest = self._manifest
        names = [*before, *(name for name in manifest if name not in before)]
        other = [
            f"{name} (was {_short(before.get(name))}, is {_short(manifest.get(name))})"
            for name in names
            if name not in _OF_THE_SESSION and before.get(name) != manifest.get(name)
        ]
        if other:
            raise InvalidInputError(
                f"the journal {self.path} was begun under other conditions, and rows of both must "
                f"not stand in one table: {'; '.join(other)}. Repeat them, or remove the file to "
                "begin anew",
                other,
            )

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; it is on disk when this returns."""
        line = json.dumps(plain({**row, "manifest": self._manifest}), allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
