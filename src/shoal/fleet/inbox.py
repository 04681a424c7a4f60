"""What happens to a group of workers, in the order it comes."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Collection
from typing import Literal, TypeVar

import msgspec

from shoal import errors
from shoal.errors import InternalError, PeerLost, ShoalError
from shoal.parallel.control import CacheOpened, Failed, FromWorker, Loaded, Measured, Prepared

Reply = TypeVar("Reply", Loaded, Prepared, CacheOpened, Measured)


class Lost(msgspec.Struct, frozen=True):
    """A worker's connection has ended, or nothing has been heard of it for `silence_s`."""

    reason: str
    noticed_by: Literal["connection", "heartbeat"] = "connection"
    silence_s: float = 0.0


class Called(msgspec.Struct, frozen=True):
    """A worker that was expected is there."""


Item = FromWorker | Lost | Called


class Silence(PeerLost):
    """Nothing came until the deadline."""

    noticed_by = "step deadline"


class NotHeard(PeerLost):
    """Not even a heartbeat."""

    noticed_by = "heartbeat"


class Reported(PeerLost):
    """A worker says that it has lost another."""

    noticed_by = "report"


class Inbox:
    """Any thread may `put`, one may take."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[tuple[str, Item]] = queue.SimpleQueue()

    def put(self, worker: str, item: Item) -> None:
        self._items.put((worker, item))

    def take(self, timeout_s: float) -> tuple[str, Item] | None:
        """None if nothing comes in time."""
        try:
            return self._items.get(timeout=max(timeout_s, 0))
        except queue.Empty:
            return None

    def next(self, awaited: Collection[str], deadline_s: float) -> tuple[str, FromWorker | Called]:
        """Raises PeerLost for a worker that is lost, Silence at the deadline."""
        taken = self.take(deadline_s - time.monotonic())
        if taken is None:
            raise Silence(f"no answer in time from {', '.join(sorted(awaited))}")
        worker, item = taken
        if isinstance(item, Lost):
            raise loss_of(worker, item)
        return worker, item

    def replies(
        self,
        kind: type[Reply],
        workers: Collection[str],
        *,
        timeout_s: float,
        is_meant: Callable[[Reply | Failed], bool] = lambda _reply: True,
    ) -> dict[str, Reply]:
        """One reply from each; those not meant, from before, are dropped.

        Raises as `next` does, and what the first to fail reports.
        """
        deadline_s = time.monotonic() + timeout_s
        replies: dict[str, Reply] = {}
        while missing := set(workers) - replies.keys():
            worker, message = self.next(missing, deadline_s)
            if not isinstance(message, kind | Failed) or not is_meant(message):
                continue
            if isinstance(message, Failed):
                raise error_of(worker, message)
            replies[worker] = message
        return replies


def loss_of(worker: str, lost: Lost) -> PeerLost:
    kind = NotHeard if lost.noticed_by == "heartbeat" else PeerLost
    return kind(f"worker {worker} is lost: {lost.reason}")


def error_of(worker: str, failed: Failed) -> ShoalError:
    """The worker's error again, of the class it had there."""
    kind = getattr(errors, failed.kind, None)
    message = f"worker {worker}: {failed.message}"
    if kind is PeerLost:
        return Reported(message)
    if isinstance(kind, type) and issubclass(kind, ShoalError):
        return kind(message)
    return InternalError(f"{message} ({failed.kind})")
