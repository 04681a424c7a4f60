"""Where downloaded models are kept, and how two processes share the place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from shoal.errors import SourceError

Progress = Callable[[str, int, int | None], None]
"""What is going on, how many bytes are done, and how many there are (None: not known)."""


def cache_root() -> Path:
    """`shoal` in $SHOAL_CACHE, else in $XDG_CACHE_HOME, else in ~/.cache."""
    base = os.environ.get("SHOAL_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "shoal"


def silent(what: str, done_bytes: int, total_bytes: int | None) -> None:
    """A `Progress` for those who do not look."""


@contextmanager
def locked(path: Path, report: Progress = silent) -> Iterator[None]:
    """Hold the lock file `path`, waiting for whoever holds it; it frees itself if they die."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report("waiting for another process", 0, None)
            lock.acquire()
    except OSError as error:
        raise SourceError(
            f"the cache cannot be written at {path.parent}: {error}; "
            "set SHOAL_CACHE to a folder that can"
        ) from error
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
