"""Which nodes lose their workers again and again: they are given time, then left out."""

from __future__ import annotations

from collections import defaultdict, deque

PATIENT_LOSSES = 2
"""So many losses in a row are made good at once."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 4.0
TOGETHER_S = 0.5
"""Losses on a node that are no further apart count as one: it may have lost all its workers."""
LOSSES_IN_A_ROW = 6
"""Without a finished step in between: then a node is left out."""
LOSSES_IN_WINDOW = 6
WINDOW_S = 60.0
"""A node that loses so many workers in that time makes everybody wait more than it helps."""
REST_S = 60.0
"""How long a node is left out, if the others can do without it."""


class Blame:
    """`home` are nodes that cannot be out of reach, since we are there."""

    def __init__(self, home: frozenset[str]) -> None:
        self._home = home
        self._in_a_row: dict[str, int] = defaultdict(int)
        self._recent: dict[str, deque[float]] = defaultdict(deque)
        self._out_until_s: dict[str, float] = {}

    def lost(self, node: str, now_s: float, *, silent: bool) -> None:
        recent = self._recent[node]
        if not recent or now_s - recent[-1] > TOGETHER_S:
            self._in_a_row[node] += 1
            recent.append(now_s)
        while recent[0] < now_s - WINDOW_S:
            recent.popleft()
        is_away = node not in self._home
        if (
            self._in_a_row[node] >= LOSSES_IN_A_ROW
            or (is_away and silent)
            or (is_away and len(recent) >= LOSSES_IN_WINDOW)
        ):
            self._out_until_s[node] = now_s + REST_S

    def is_home(self, node: str) -> bool:
        return node in self._home

    def gone(self, node: str, now_s: float) -> None:
        self._out_until_s[node] = now_s + REST_S

    def forgive(self) -> None:
        """What was lost has been made good."""
        self._in_a_row.clear()

    def pardon(self) -> None:
        """Leave nobody out: there is nobody else."""
        self._out_until_s.clear()

    def left_out(self, now_s: float) -> frozenset[str]:
        if not self._out_until_s:
            return frozenset()
        return frozenset(node for node, until_s in self._out_until_s.items() if now_s < until_s)

    def pause_s(self, node: str) -> float:
        """Before the next worker is started there; grows with the losses in a row."""
        excess = self._in_a_row[node] - PATIENT_LOSSES
        return 0.0 if excess <= 0 else min(FIRST_PAUSE_S * 2.0 ** (excess - 1), LONGEST_PAUSE_S)
