"""How results leave the stepping thread: to an asyncio event loop, or to a waiting thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue

from shoal.engine.api import Delta
from shoal.engine.engine import Engine
from shoal.engine.job import Deliver, Item, Job
from shoal.errors import ShoalError

OnEnd = Callable[[ShoalError | None, bool], None]
"""Called once, when a request has ended: with the error, if that is how, and whether anything had
been delivered before. From any thread, and inside the engine's lock: it must be quick and must not
call the engine."""


def unwatched(_error: ShoalError | None, _answered: bool) -> None:
    """The `OnEnd` of requests whose end is nobody's business but the submitter's."""


def telling(deliver: Deliver, on_end: OnEnd) -> Deliver:
    """`deliver`, and `on_end` after the last item: None or an error."""
    answered = False

    def deliver_and_tell(item: Item) -> None:
        nonlocal answered
        deliver(item)
        if item is None or isinstance(item, ShoalError):
            on_end(item, answered)
        else:
            answered = True

    return deliver_and_tell


class Postman:
    """Brings items into one event loop, waking it once for all that a step produced."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._mail: deque[tuple[asyncio.Queue[Item], Item]] = deque()
        self._is_on_the_way = False

    def post(self, box: asyncio.Queue[Item], item: Item) -> None:
        """From any thread. Mail for a loop that has closed is dropped: nobody is left to read."""
        self._mail.append((box, item))
        if self._is_on_the_way:
            return
        self._is_on_the_way = True
        with suppress(RuntimeError):  # the loop has closed, perhaps just now
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        # Cleared first: what is posted from here on asks for a new round.
        self._is_on_the_way = False
        while self._mail:
            box, item = self._mail.popleft()
            box.put_nowait(item)


class AsyncStream:
    """A request's deltas, for the event loop that submitted it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.box: asyncio.Queue[Item] = asyncio.Queue()
        self.job: Job | None = None

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Ends with the last sample; leaving earlier cancels. Raises what ended the request."""
        try:
            while (item := await self.box.get()) is not None:
                yield _delta(item)
        finally:
            self.cancel()

    async def embedding(self) -> list[float]:
        try:
            return _embedding(await self.box.get())
        finally:
            self.cancel()

    def cancel(self) -> None:
        if self.job is not None:
            self._engine.cancel(self.job)


class SyncStream:
    """A request's deltas, for a thread that waits for them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.box: SimpleQueue[Item] = SimpleQueue()
        self.job: Job | None = None

    def __iter__(self) -> Iterator[Delta]:
        """Ends with the last sample; leaving earlier cancels. Raises what ended the request."""
        try:
            while (item := self.box.get()) is not None:
                yield _delta(item)
        finally:
            self.cancel()

    def embedding(self) -> list[float]:
        return _embedding(self.box.get())

    def cancel(self) -> None:
        if self.job is not None:
            self._engine.cancel(self.job)


def _delta(item: Item) -> Delta:
    item = _unless_error(item)
    assert isinstance(item, Delta)
    return item


def _embedding(item: Item) -> list[float]:
    item = _unless_error(item)
    assert isinstance(item, list)
    return item


def _unless_error(item: Item) -> Item:
    if isinstance(item, ShoalError):
        raise item
    return item
