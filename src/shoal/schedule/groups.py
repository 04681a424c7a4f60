"""Samples of one prompt: those behind the first are held until they can share its blocks."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.schedule.sequence import Sequence


class GroupGate:
    """One leader per group, and the followers held behind it.

    A leader is never held itself, and `release` is called once its prompt is computed or it has
    ended, whichever comes first; so no follower is held for ever.
    """

    def __init__(self) -> None:
        self._leaders: dict[int, Sequence] = {}
        self._followers: dict[int, dict[int, Sequence]] = {}

    def __len__(self) -> int:
        """How many are held."""
        return sum(map(len, self._followers.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for followers in self._followers.values():
            yield from followers.values()

    def admits(self, sequence: Sequence) -> bool:
        """True if it may queue (it then leads its group, if it has one); else it is held."""
        group = sequence.request.group
        if group is None:
            return True
        leader = self._leaders.setdefault(group, sequence)
        if leader is sequence:
            return True
        self._followers.setdefault(group, {})[sequence.request_id] = sequence
        return False

    def release(self, leader: Sequence) -> list[Sequence]:
        """Dissolve the group that this sequence leads, if any; those held behind it."""
        group = leader.request.group
        if group is None or self._leaders.get(group) is not leader:
            return []
        del self._leaders[group]
        return list(self._followers.pop(group, {}).values())

    def discard(self, sequence: Sequence) -> bool:
        """Let a held follower go; False if it is not held."""
        group = sequence.request.group
        followers = self._followers.get(group, {}) if group is not None else {}
        return followers.pop(sequence.request_id, None) is not None
