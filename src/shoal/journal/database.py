"""The journal's file: SQLite in WAL mode, for one process at a time. Called from one thread.

A commit survives the process, however it ends; the last ones may not survive a power cut, which
costs an fsync each (synchronous=NORMAL).
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from shoal.errors import ConfigError
from shoal.journal.api import Accepted, Entry, Kept, State

VERSION = 1
APPLICATION_ID = 0x53686F6C
"""Tells a journal from the databases of others, which must not be touched."""

_TABLES = """
CREATE TABLE responses (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, key TEXT UNIQUE,
    state TEXT NOT NULL, error TEXT, accepted BLOB NOT NULL
);
CREATE TABLE entries (
    response INTEGER NOT NULL REFERENCES responses ON DELETE CASCADE,
    first INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (response, first)
) WITHOUT ROWID;
CREATE TABLE room (id INTEGER PRIMARY KEY, filling BLOB);
"""
_ROOM_BYTES = 256 * 1024
_APPEND = "INSERT INTO entries SELECT number, ?, ? FROM responses WHERE id = ?"
_FIND = "SELECT number, state, error, accepted FROM responses WHERE id = ?1 OR key = ?1"

log = logging.getLogger(__name__)


class Database:
    """Raises ConfigError if another process has it open, OSError or sqlite3.Error if it cannot be
    opened. A file that is corrupt or of another version is moved aside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._connection = _open(path)
        except _Unusable as problem:
            _move_aside(path, str(problem))
            self._connection = _open(path)
        self._inode = path.stat().st_ino
        self._encoder = msgspec.msgpack.Encoder()
        self._entries = msgspec.msgpack.Decoder(list[Entry])

    @property
    def is_in_place(self) -> bool:
        """False when somebody has removed or replaced the file: what is written is lost."""
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False

    def begin(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._connection.execute("COMMIT")

    def close(self) -> None:
        """What is not committed is given up."""
        with suppress(sqlite3.Error):
            self._connection.close()

    def accept(self, accepted: Accepted, record: bytes) -> None:
        """`record` is what `encode_accepted` makes of it."""
        if accepted.key is not None:
            taken = (accepted.key,)
            self._connection.execute("UPDATE responses SET key = NULL WHERE key = ?", taken)
        row = (accepted.response_id, accepted.key, record)
        self._connection.execute(
            "INSERT INTO responses (id, key, state, accepted) VALUES (?, ?, 'open', ?)", row
        )

    def append(self, response_id: str, first: int, entries: Sequence[Entry]) -> None:
        row = (first, self._encoder.encode(entries), response_id)
        self._connection.execute(_APPEND, row)

    def mark(self, response_id: str, state: State, error: str | None) -> None:
        row = (state, error, response_id)
        self._connection.execute("UPDATE responses SET state = ?, error = ? WHERE id = ?", row)

    def forget(self, response_ids: Sequence[str]) -> None:
        rows = [(response_id,) for response_id in response_ids]
        self._connection.executemany("DELETE FROM responses WHERE id = ?", rows)

    def fill_room(self, num_bytes: int = _ROOM_BYTES) -> None:
        """Fails on a disk that is all but full, where the next small write might still succeed."""
        self._connection.execute("INSERT OR REPLACE INTO room VALUES (0, zeroblob(?))", [num_bytes])

    def empty_log(self) -> None:
        """Leave nothing of what was deleted in the write-ahead log. Not in a transaction."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def find(self, name: str) -> Kept | None:
        row = self._connection.execute(_FIND, (name,)).fetchone()
        if row is None:
            return None
        number, state, error, accepted = row
        parts = self._connection.execute(
            "SELECT data FROM entries WHERE response = ? ORDER BY first", (number,)
        )
        try:
            entries = [entry for (data,) in parts for entry in self._entries.decode(data)]
            request = msgspec.msgpack.decode(accepted, type=Accepted)
        except msgspec.MsgspecError as problem:
            log.warning("the journal's record of %s cannot be read: %s", name, problem)
            return None
        return Kept(accepted=request, state=state, error=error, entries=entries)

    def ids(self, *states: State) -> list[str]:
        """Oldest first."""
        marks = ", ".join("?" for _ in states)
        found = self._connection.execute(
            f"SELECT id FROM responses WHERE state IN ({marks}) ORDER BY number", states
        )
        return [response_id for (response_id,) in found]


def encode_accepted(accepted: Accepted) -> bytes:
    """Raises OverflowError for a number that has no room in 64 bits."""
    return msgspec.msgpack.encode(accepted)


class _Unusable(Exception):
    """The file is there, but it is no journal of this version."""


def age_s(path: Path) -> float:
    """Since something was last written; infinite if there is no journal."""
    times = [p.stat().st_mtime for p in (path, _wal(path)) if p.exists()]
    return max(0.0, time.time() - max(times)) if times else float("inf")


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Made by us, since SQLite would let others read; its other files take over the mode.
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    try:
        # Before anything else: then the lock is taken by the first statement and never given back.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        is_new = not connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        [owner] = connection.execute("PRAGMA application_id").fetchone()
        if not is_new and owner != APPLICATION_ID:
            raise ConfigError(f"{path} is another program's database: name another with --journal")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("BEGIN EXCLUSIVE")
        if is_new:
            _make_tables(connection)
        [version] = connection.execute("PRAGMA user_version").fetchone()
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise ConfigError(
                f"another server writes the journal {path}: give this one its own with --journal, "
                "or turn it off with --journal off"
            ) from error
        raise
    except sqlite3.DatabaseError as error:
        raise _Unusable(f"it is broken ({error})") from error
    if version != VERSION:
        raise _Unusable(f"it is of version {version}, this is version {VERSION}")
    _check_whole(connection)


def _make_tables(connection: sqlite3.Connection) -> None:
    for statement in filter(str.strip, _TABLES.split(";")):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def _check_whole(connection: sqlite3.Connection) -> None:
    try:
        [verdict] = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict != "ok":
        raise _Unusable(f"it is broken ({verdict})")


def _move_aside(path: Path, why: str) -> None:
    aside = path.with_name(f"{path.name}.{int(time.time())}.unusable")
    _wal(path).unlink(missing_ok=True)
    path.replace(aside)
    log.warning("the journal cannot be used: %s; it is now %s, and a new one begins", why, aside)


def _wal(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")
