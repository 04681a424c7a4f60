"""The sequences that wait, best rank first."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from shoal.schedule.sequence import Sequence


class WaitingQueue:
    """A heap whose removed entries stay as ghosts until they surface or become the majority."""

    def __init__(self) -> None:
        self._heap: list[Sequence] = []
        self._members: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return iter(self._members.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return self._members.get(sequence.request_id) is sequence

    def push(self, sequence: Sequence) -> None:
        self._members[sequence.request_id] = sequence
        heappush(self._heap, sequence)

    def peek(self) -> Sequence | None:
        """The best-ranked, or None."""
        while self._heap:
            sequence = self._heap[0]
            if sequence in self:
                return sequence
            heappop(self._heap)
        return None

    def pop(self) -> Sequence:
        """Take out what `peek` shows."""
        sequence = self.peek()
        assert sequence is not None, "pop from an empty queue"
        heappop(self._heap)
        del self._members[sequence.request_id]
        return sequence

    def remove(self, sequence: Sequence) -> None:
        del self._members[sequence.request_id]
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = list(self)
            heapify(self._heap)
