"""One response: what has been said so far, who is reading it, and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from shoal.journal.api import Accepted, Entry


class ResponseLog:
    """Written by one producer, read from any position by any number of followers.

    `is_kept` while the journal has all of it. `on_left` is called when the last follower has left
    a response that has not ended.
    """

    def __init__(
        self,
        accepted: Accepted,
        on_left: Callable[[ResponseLog], None],
        entries: Sequence[Entry] = (),
    ) -> None:
        self.accepted = accepted
        self.entries = list(entries)
        self.is_kept = False
        self.has_ended = False
        self.error: Exception | None = None
        self._on_left = on_left
        self._followers: set[Follower] = set()

    def add(self, entry: Entry, *, is_kept: bool) -> None:
        self.is_kept = is_kept
        self.entries.append(entry)
        self._wake_all()

    def end(self, error: Exception | None) -> None:
        if not self.has_ended:
            self.has_ended = True
            self.error = error
            self._wake_all()

    def follow(self) -> Follower:
        """Close it."""
        follower = Follower(self)
        self._followers.add(follower)
        return follower

    def leave(self, follower: Follower) -> None:
        self._followers.discard(follower)
        if not self._followers and not self.has_ended:
            self._on_left(self)

    def _wake_all(self) -> None:
        for follower in self._followers:
            follower.news.set()


class Follower:
    """All entries from the first, then those that come, until the end. Raises what ended it."""

    def __init__(self, response: ResponseLog) -> None:
        self.response = response
        self.news = asyncio.Event()
        self._is_here = True

    async def __aiter__(self) -> AsyncIterator[Entry]:
        response = self.response
        position = 0
        while True:
            while position < len(response.entries):
                yield response.entries[position]
                position += 1
            if response.error is not None:
                raise response.error
            if response.has_ended:
                return
            self.news.clear()
            await self.news.wait()

    async def to_the_end(self) -> list[Entry]:
        return [entry async for entry in self]

    def close(self) -> None:
        """Twice is harmless."""
        if self._is_here:
            self._is_here = False
            self.response.leave(self)
