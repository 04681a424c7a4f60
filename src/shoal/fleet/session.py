"""Where workers find the head again: a folder that outlives it, for one model on one port."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shoal.errors import ConfigError

log = logging.getLogger(__name__)

_NAMES_PER_HEAD = 10_000
_FILE, _LOCK = "session.json", "lock"


class _Left(msgspec.Struct, kw_only=True):
    """What a head leaves to the next: `address` is where it listened, `num_workers` those it had
    when it last changed them; 0 after an end in order."""

    head: int = 0
    address: str = ""
    num_workers: int = 0


class Session:
    """`folder` is a folder of this user's alone, short enough for the paths of unix sockets.

    `before` is what the last head has left; `first_number` begins the names of our workers, so
    that they are no earlier head's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._left = _read(folder / _FILE)
        self.address_before = self._left.address
        self.num_workers_before = self._left.num_workers
        self._left.head += 1
        self._write()

    @property
    def first_number(self) -> int:
        return (self._left.head - 1) * _NAMES_PER_HEAD + 1

    def note(self, *, address: str | None = None, num_workers: int | None = None) -> None:
        """For the next head, if this one does not end in order."""
        if address is not None:
            self._left.address = address
        if num_workers is not None:
            self._left.num_workers = num_workers
        self._write()

    def close(self) -> None:
        """An end in order: nothing is left to the next head but the lock."""
        (self.folder / _FILE).unlink(missing_ok=True)
        for socket in self.folder.glob("*.sock"):
            socket.unlink(missing_ok=True)

    def _write(self) -> None:
        path = self.folder / _FILE
        new = path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(self._left))
        new.replace(path)


@contextmanager
def open_session(key: str | None) -> Iterator[Session]:
    """The session of that name, or one that nobody can come back to.

    Raises ConfigError when another head has it.
    """
    if key is None:
        with tempfile.TemporaryDirectory(prefix="shoal-") as name:
            yield Session(Path(name))
        return
    folder = session_folder(key)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another 'shoal serve' is running as {key}: stop it, or choose another --port"
            ) from None
        session = Session(folder)
        yield session
        session.close()


def session_folder(key: str) -> Path:
    """Of this user alone, made if need be. Raises ConfigError if it is somebody else's."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = Path(base) / f"shoal-{os.getuid()}-{digest}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()  # of a link, which another user may have put there
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror or error}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{folder} is not yours alone: remove it")
    return folder


def _read(path: Path) -> _Left:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Left)
    except FileNotFoundError:
        return _Left()
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("%s is ignored (%s): workers of the last head are not taken back", path, error)
        return _Left()
