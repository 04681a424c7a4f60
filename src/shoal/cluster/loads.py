"""A replica as the router sees it, and who has least to do."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

_SPARE_ENTRIES = 64


@dataclass(slots=True, eq=False)
class Member:
    """A replica of the router's. `load` is what it has open, `turn` when it was last chosen."""

    name: str
    turn: int
    cache_blocks: int
    load: int = 0
    is_available: bool = True


class LeastFirst:
    """Available members by load; among equals, the one that was chosen longest ago.

    A heap that gets a new entry with each change; outdated ones are dropped when they surface, or
    all together once they are the majority.
    """

    def __init__(self) -> None:
        self._members: set[Member] = set()
        self._heap: list[tuple[int, int, Member]] = []

    def add(self, member: Member) -> None:
        self._members.add(member)
        self.update(member)

    def remove(self, member: Member) -> None:
        self._members.discard(member)

    def update(self, member: Member) -> None:
        """After its load or turn has changed."""
        if member not in self._members:
            return
        # No two members ever share a turn, so members themselves are never compared.
        heappush(self._heap, (member.load, member.turn, member))
        if len(self._heap) > 2 * len(self._members) + _SPARE_ENTRIES:
            self._heap = [(m.load, m.turn, m) for m in self._members]
            heapify(self._heap)

    def first(self) -> Member:
        """There must be one."""
        while True:
            load, turn, member = self._heap[0]
            if member.load == load and member.turn == turn and member in self._members:
                return member
            heappop(self._heap)
