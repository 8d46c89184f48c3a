"""The folder of built libraries: what is loaded from it runs as this user, so nobody else may write
there, and what is in it must be whole.

An entry is the library with a seal behind it: a digest of all before it. A library that was cut off
would pass the loader, and end the process where its first missing page is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import BuildError

_MARK = b"sparseattn"
_SEAL = len(_MARK) + hashlib.sha256().digest_size
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_WORK = "building-"  # what a build begins in; one that was killed leaves it behind
_OLD = 3600.0  # seconds after which it is taken away
_PATIENCE = 120.0  # seconds to wait for another process's build, before building beside it
_WAY_OUT = "SPARSEATTN_NATIVE_CACHE names another"


def place() -> Path:
    """The folder that is asked for, whether or not it is there.

    Raises:
        BuildError: no absolute path is given, or no home is known.
    """
    given = os.environ.get("SPARSEATTN_NATIVE_CACHE")
    if given:
        if not os.path.isabs(given):
            raise BuildError(f"SPARSEATTN_NATIVE_CACHE={given!r:.80} is no absolute path")
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # a relative one is to be ignored, says its definition
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise BuildError(f"no home directory to keep built kernels in: {_WAY_OUT}")
    return Path(base) / "sparseattn"


def folder() -> Path:
    """The folder of built libraries, made if need be, with every link on the way resolved.

    Raises:
        BuildError: it cannot be made, or someone else may write to it, or put another in its place.
    """
    path = Path(os.path.realpath(place()))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = path.stat()
    except OSError as error:
        why = error.strerror or str(error)
        raise BuildError(f"no cache directory at {path} ({why}): {_WAY_OUT}") from None
    if held.st_uid != os.geteuid():
        raise BuildError(f"the cache directory {path} belongs to another user: {_WAY_OUT}")
    if held.st_mode & _OTHERS:
        mode = stat.S_IMODE(held.st_mode)
        raise BuildError(
            f"others can write to the cache directory {path} (mode {mode:o}): chmod 700 it"
        )
    for above in path.parents:
        if _replaceable(above.stat()):
            raise BuildError(
                f"others can replace the cache directory {path}, by way of {above}: {_WAY_OUT}"
            )
    return path


def _replaceable(held: os.stat_result) -> bool:
    """Whether others may put another directory in the place of one in this."""
    if held.st_uid not in (0, os.geteuid()):
        return True
    # A group of the user's own is no other; in a sticky directory names are their owners'.
    others = stat.S_IWOTH if held.st_gid == os.getegid() else _OTHERS
    return bool(held.st_mode & others) and not held.st_mode & stat.S_ISVTX


def intact(path: Path) -> bool:
    """Whether an entry is there, this user's own, and as it was when it was sealed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    with open(descriptor, "rb") as file:
        held = os.fstat(descriptor)
        if not stat.S_ISREG(held.st_mode) or held.st_uid != os.geteuid() or held.st_mode & _OTHERS:
            return False
        held_bytes = file.read()
    body, seal = held_bytes[:-_SEAL], held_bytes[-_SEAL:]
    return bool(body) and seal == _MARK + hashlib.sha256(body).digest()


def seal(path: Path) -> None:
    """Put the digest behind a library, and the file safely on disk."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    with open(path, "ab") as file:
        file.write(_MARK + digest)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(path, 0o500)  # whatever the umask


@contextlib.contextmanager
def work(path: Path) -> Iterator[Path]:
    """A folder of one's own beside the cache's entries, taken away at the end."""
    for left in path.glob(f"{_WORK}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > _OLD:
                shutil.rmtree(left)
    try:
        made = Path(tempfile.mkdtemp(prefix=_WORK, dir=path))
    except OSError as error:
        why = error.strerror or str(error)
        raise BuildError(f"the cache directory {path} cannot be written ({why})") from None
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """One's turn to build in a folder, so that many processes that start at once compile once.

    Only a courtesy: where the file system has no locks, or a holder never ends, several build at
    once, and each publishes a whole file.
    """
    import fcntl  # not on every system, and those are refused before

    descriptor = os.open(path, os.O_RDONLY)
    try:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    break
                time.sleep(0.05)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)
