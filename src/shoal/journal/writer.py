"""A journal on disk, written by a thread of its own in groups, which never stops a stream."""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from shoal.errors import ConfigError
from shoal.journal.api import Accepted, Entry, Kept, State, Then
from shoal.journal.database import Database, age_s, encode_accepted
from shoal.journal.expiry import Expiry

KEEP_S = 600.0
RETRY_S = 5.0
PATIENCE_S = 2.0
"""A commit that takes longer holds the streams up: they go on without it."""
_CHORES_S = 1.0

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Order:
    """`response_id` is what it writes of, None if it only reads; `is_last`: nothing follows."""

    work: Callable[[Database], None]
    then: Then
    response_id: str | None
    since_s: float
    is_last: bool = False
    is_settled: bool = False


class SqliteJournal:
    """Finished and interrupted responses are deleted after `keep_s`. Close it when done.

    What cannot be written makes `trouble`, and its response is not offered any more; writing is
    tried again every `retry_s`. Raises ConfigError if another process writes the same journal.
    """

    is_kept = True

    def __init__(
        self,
        path: Path,
        model: str,
        *,
        keep_s: float = KEEP_S,
        retry_s: float = RETRY_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.model = model
        self._path = path
        self._retry_s = retry_s
        self._patience_s = patience_s
        self._expiry = Expiry(keep_s)
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._unsettled: deque[_Order] = deque()  # the event loop's
        self._lock = threading.Lock()
        self._trouble: str | None = None
        self._is_stuck = False
        self._is_watched = False
        self._holed: set[str] = set()
        """Responses of which something was not written: nothing more of them is."""
        self._spoilt: set[str] = set()
        """What there is of them on disk, to be deleted when that works again."""
        self._open: set[str] = set()
        self._tried_s = self._pruned_s = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        was_idle_s = age_s(path)
        self._database: Database | None = None
        self._try_to_open()
        if self._database is not None:
            self._sort_out(self._database, too_old=was_idle_s > keep_s)
        self._thread = threading.Thread(target=self._run, name="shoal-journal", daemon=True)
        self._thread.start()

    # ---- from the event loop ---------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        return self._trouble

    def accept(self, accepted: Accepted, then: Then) -> None:
        try:
            # Here, since in the thread it would stop the responses of others too.
            record = encode_accepted(accepted)
        except (OverflowError, ValueError) as error:  # JSON has longer numbers than the journal
            log.warning("%s cannot be kept: %s", accepted.response_id, error)
            self._give_up([_Order(lambda _: None, then, accepted.response_id, 0.0)])
            return
        self._order(lambda database: database.accept(accepted, record), then, accepted.response_id)

    def append(self, response_id: str, first: int, entries: Sequence[Entry], then: Then) -> None:
        self._order(
            lambda database: database.append(response_id, first, entries), then, response_id
        )

    def mark(self, response_id: str, state: State, then: Then, *, error: str | None = None) -> None:
        def work(database: Database) -> None:
            database.mark(response_id, state, error)
            self._expiry.note(response_id, state, time.monotonic())

        self._order(work, then, response_id, is_last=state != "open")

    async def find(self, name: str) -> Kept | None:
        return await self._read(lambda database: database.find(name), None)

    async def open_ids(self) -> list[str]:
        return await self._read(lambda database: database.ids("open"), [])

    def close(self) -> None:
        """Write what is still to be written. From any thread, after the event loop's end."""
        self._orders.put(None)
        self._thread.join(timeout=self._patience_s)

    async def _read(self, read: Callable[[Database], T], otherwise: T) -> T:
        found = [otherwise]
        done = asyncio.Event()

        def work(database: Database) -> None:
            found[0] = read(database)

        self._order(work, lambda _: done.set(), None)
        await done.wait()
        return found[0]

    def _order(
        self,
        work: Callable[[Database], None],
        then: Then,
        response_id: str | None,
        *,
        is_last: bool = False,
    ) -> None:
        self._loop = loop = asyncio.get_running_loop()
        order = _Order(work, then, response_id, loop.time(), is_last)
        if self._is_stuck:
            self._give_up([order])
            return
        self._unsettled.append(order)
        self._orders.put(order)
        if not self._is_watched:
            self._is_watched = True
            loop.call_later(self._patience_s, self._check_patience)

    def _settle(self, orders: Sequence[_Order], kept: Sequence[bool]) -> None:
        self._is_stuck = False
        for order, is_kept in zip(orders, kept, strict=True):
            if not order.is_settled:
                assert self._unsettled.popleft() is order
                order.is_settled = True
                order.then(is_kept)

    def _check_patience(self) -> None:
        self._is_watched = bool(self._unsettled)
        if not self._unsettled:
            return
        loop = asyncio.get_running_loop()
        left_s = self._unsettled[0].since_s + self._patience_s - loop.time()
        if left_s > 0:
            loop.call_later(left_s, self._check_patience)
            return
        self._is_stuck = True
        self._despair(f"the disk has not answered for {self._patience_s:g} s")
        orders = list(self._unsettled)
        self._unsettled.clear()
        self._is_watched = False
        self._give_up(orders)

    def _give_up(self, orders: Sequence[_Order]) -> None:
        self._note_holes(orders)
        for order in orders:
            order.is_settled = True
            order.then(False)

    # ---- in the thread ---------------------------------------------------------------------

    def _run(self) -> None:
        is_open = True
        while is_open:
            orders, is_open = self._take()
            if orders:
                kept = self._write(orders)
                self._note_open(orders)
                assert self._loop is not None
                with suppress(RuntimeError):  # it has closed
                    self._loop.call_soon_threadsafe(self._settle, orders, kept)
            self._do_chores()
        if self._database is not None:
            self._database.close()

    def _take(self) -> tuple[list[_Order], bool]:
        """All there are, after the first has come or it is time for chores; False at the end."""
        orders: list[_Order] = []
        with suppress(queue.Empty):
            order = self._orders.get(timeout=_CHORES_S)
            while order is not None:
                orders.append(order)
                order = self._orders.get_nowait()
            return orders, False
        return orders, True

    def _write(self, orders: Sequence[_Order]) -> list[bool]:
        """One commit for all of them: which are kept."""
        with self._lock:
            holed = self._holed.copy()
        database = self._database
        if self._trouble is None and database is not None:
            wanted = [order for order in orders if order.response_id not in holed]
            if self._attempt(partial(_carry_out, database, wanted)):
                self._note_holes([order for order in orders if order.response_id in holed])
                return [order.response_id not in holed for order in orders]
        self._note_holes(orders)
        return [False] * len(orders)

    def _note_open(self, orders: Sequence[_Order]) -> None:
        for order in orders:
            if order.is_last:
                self._open.discard(order.response_id or "")
            elif order.response_id is not None:
                self._open.add(order.response_id)

    def _note_holes(self, orders: Sequence[_Order]) -> None:
        with self._lock:
            for order in orders:
                if order.response_id is not None:
                    self._spoilt.add(order.response_id)
                    self._holed.add(order.response_id)
                    if order.is_last:
                        self._holed.remove(order.response_id)

    def _do_chores(self) -> None:
        now_s = time.monotonic()
        if self._trouble is not None:
            if now_s - self._tried_s >= self._retry_s:
                self._tried_s = now_s
                self._recover()
        elif now_s - self._pruned_s >= self._retry_s:
            self._pruned_s = now_s
            self._prune(self._expiry.pop(now_s))

    def _prune(self, expired: list[str]) -> None:
        database = self._database
        with self._lock:
            expired += self._spoilt
        if database is None or not database.is_in_place:
            self._despair(f"{self._path} is gone")
        elif expired and self._attempt(partial(_delete, database, expired)):
            with self._lock:
                self._spoilt.difference_update(expired)

    def _recover(self) -> None:
        try:
            self._try_to_open()
        except ConfigError as error:  # somebody else has it now
            log.debug("%s", error)
        database = self._database
        if database is None or not self._attempt(partial(_prove_room, database)):
            return
        with self._lock:
            # Those that had nothing to write meanwhile may have lost what they had: it may even
            # be another file now.
            self._holed |= self._open
            self._spoilt |= self._open
        self._trouble = None
        log.warning("the journal %s is written again", self._path)
        self._prune([])

    def _try_to_open(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
        try:
            self._database = Database(self._path)
        except (sqlite3.Error, OSError) as error:
            self._despair(str(error))

    def _sort_out(self, database: Database, *, too_old: bool) -> None:
        """What an earlier server left: kept for a while from now, whatever its clock said."""
        now_s = time.monotonic()
        for response_id in database.ids("finished", "failed", "interrupted"):
            self._expiry.note(response_id, "finished", now_s)
        if too_old:
            self._attempt(partial(_delete, database, database.ids("open")))

    def _attempt(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except (sqlite3.Error, OSError) as error:
            self._despair(str(error))
            return False
        return True

    def _despair(self, why: str) -> None:
        if self._trouble is None:
            since = time.strftime("%H:%M:%S")
            self._trouble = f"not written since {since}: {why}"
            log.error(
                "the journal %s is %s; streams go on, but do not survive this server; it is tried "
                "again every %g s", self._path, self._trouble, self._retry_s,
            )  # fmt: skip


def _carry_out(database: Database, orders: Sequence[_Order]) -> None:
    database.begin()
    for order in orders:
        order.work(database)
    database.commit()


def _delete(database: Database, response_ids: Sequence[str]) -> None:
    database.begin()
    database.forget(response_ids)
    database.commit()
    database.empty_log()


def _prove_room(database: Database) -> None:
    database.fill_room()
    database.fill_room(0)
    database.empty_log()
