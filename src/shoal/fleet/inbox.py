"""What a group of workers reports, in the order it comes."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Collection
from typing import TypeVar

import msgspec

from shoal import errors
from shoal.errors import InternalError, PeerLost, ShoalError
from shoal.parallel.control import CacheOpened, Failed, Formed, FromWorker, Loaded, Measured

Reply = TypeVar("Reply", Loaded, CacheOpened, Formed, Measured)


class Lost(msgspec.Struct, frozen=True):
    """A worker's connection has ended."""

    reason: str


class Silence(PeerLost):
    """Nothing came until the deadline."""


class Inbox:
    """Any thread may `put`, one may take."""

    def __init__(self) -> None:
        self._reports: queue.SimpleQueue[tuple[str, FromWorker | Lost]] = queue.SimpleQueue()

    def put(self, worker: str, message: FromWorker | Lost) -> None:
        self._reports.put((worker, message))

    def next(self, awaited: Collection[str], deadline_s: float) -> tuple[str, FromWorker]:
        """Raises PeerLost for a worker that is lost, Silence at the deadline."""
        try:
            worker, message = self._reports.get(timeout=max(deadline_s - time.monotonic(), 0))
        except queue.Empty:
            raise Silence(f"no answer in time from {', '.join(sorted(awaited))}") from None
        if isinstance(message, Lost):
            raise PeerLost(f"worker {worker} is lost: {message.reason}")
        return worker, message

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


def error_of(worker: str, failed: Failed) -> ShoalError:
    """The worker's error again, of the class it had there."""
    kind = getattr(errors, failed.kind, None)
    message = f"worker {worker}: {failed.message}"
    if isinstance(kind, type) and issubclass(kind, ShoalError):
        return kind(message)
    return InternalError(f"{message} ({failed.kind})")
