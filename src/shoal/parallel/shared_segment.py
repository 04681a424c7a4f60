"""A piece of memory that processes of one host share, and that no crash leaves behind.

It is a file in memory whose name is gone as soon as everyone has it mapped. Until then its maker
holds a lock on it, so that whoever makes the next one can tell and remove what the dead left.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from shoal.errors import InternalError, OutOfMemory, PeerLost

_PREFIX = "shoal-"
_POLL_S = 0.001


class Segment:
    """`memory` is zeroed when it is new. It stays mapped as long as anyone holds a view of it."""

    def __init__(self, memory: mmap.mmap, path: Path | None = None) -> None:
        self.memory = memory
        self._path = path

    def unlink(self) -> None:
        """Take the name away; only its maker does. Whoever has it mapped keeps it."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None


def create(session: str, num_bytes: int, folder: Path | None = None) -> Segment:
    """Make the segment. OutOfMemory if there is no room, InternalError if it exists."""
    folder = folder or default_folder()
    _remove_abandoned(folder)
    path = folder / _file_name(session)
    descriptor = _create_locked(path)
    try:
        # Not ftruncate: a page that the file system cannot give later would be a SIGBUS.
        os.posix_fallocate(descriptor, 0, num_bytes)
        return Segment(mmap.mmap(descriptor, num_bytes), path)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutOfMemory(
            f"{folder} has no room for {num_bytes} bytes of shared memory ({error.strerror}): "
            "enlarge it (containers: --shm-size) or choose another transport"
        ) from error
    finally:
        os.close(descriptor)  # the mapping keeps the lock: it holds a duplicate


def attach(
    session: str,
    num_bytes: int,
    deadline_s: float,
    folder: Path | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> Segment:
    """Map the segment once it is there.

    PeerLost at `deadline_s` of time.monotonic(), or when `is_over` says to give up.
    """
    path = (folder or default_folder()) / _file_name(session)
    while True:
        memory = _try_attach(path, num_bytes)
        if memory is not None:
            return Segment(memory)
        if time.monotonic() > deadline_s or is_over():
            raise PeerLost(
                f"rank 0 did not open {num_bytes} bytes of shared memory {path.name} in time"
            )
        time.sleep(_POLL_S)


def _create_locked(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise InternalError(f"shared memory {path.name} is in use: name each group") from None
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # taken for abandoned in the moment before the lock


def default_folder() -> Path:
    memory_folder = Path("/dev/shm")
    usable = memory_folder.is_dir() and os.access(memory_folder, os.W_OK | os.X_OK)
    return memory_folder if usable else Path(tempfile.gettempdir())


def _try_attach(path: Path, num_bytes: int) -> mmap.mmap | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise InternalError(f"{path.name} belongs to user {status.st_uid}, not to us")
        if status.st_size < num_bytes:  # made, but not yet allocated
            return None
        if status.st_size > num_bytes:
            raise InternalError(
                f"rank 0 opened {status.st_size} bytes of shared memory, this rank expects "
                f"{num_bytes}: all ranks must be given the same number of ranks and slot size"
            )
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Unlink what was left by makers that died before everyone had attached."""
    for path in folder.glob(_PREFIX + "*"):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # gone meanwhile, or another user's
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:  # its maker lives, or it is another user's, who lets all write to it
            pass
        finally:
            os.close(descriptor)


def _file_name(session: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", session):
        raise InternalError(f"{session!r} cannot name shared memory: letters, digits, . _ - only")
    return _PREFIX + session
