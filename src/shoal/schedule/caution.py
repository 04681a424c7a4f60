"""Finds the request that kills its workers: after losses in a row fewer requests run together."""

from __future__ import annotations

from collections.abc import Sequence

_PATIENT_LOSSES = 1
"""So many losses without a finished step are bad luck."""
_SHRINK = 4
_GROW = 2
_STEPS_BEFORE_GROWTH = 8
_LOSSES_ALONE = 3
"""Who was alone in so many lost steps, and in no finished one, is to blame."""


class Caution:
    """How many requests may run together, at most `max_running`.

    Those that are served first go on, alone in the end; so nobody pays for another's request, and
    workers that are killed by something else stop nobody.
    """

    def __init__(self, max_running: int) -> None:
        self._most = self.max_running = max_running
        self._losses_in_a_row = 0
        self._num_finished = 0
        self._alone: tuple[int, int] = (-1, 0)
        """(request id, steps lost with it alone)"""

    @property
    def is_careful(self) -> bool:
        return self._losses_in_a_row > 0 or self.max_running < self._most

    def lost(self, running_ids: Sequence[int]) -> int | None:
        """A step was lost in which these ran; the id of the one that must not run again."""
        self._losses_in_a_row += 1
        self._num_finished = 0
        if self._losses_in_a_row > _PATIENT_LOSSES:
            together = min(self.max_running, max(len(running_ids), 1))
            self.max_running = max(1, together // _SHRINK)
        if len(running_ids) != 1:
            return None
        request_id, times = self._alone
        times = times + 1 if request_id == running_ids[0] else 1
        self._alone = (running_ids[0], times)
        return running_ids[0] if times >= _LOSSES_ALONE else None

    def finished(self) -> None:
        """A step has come to its end."""
        self._losses_in_a_row = 0
        self._alone = (-1, 0)
        self._num_finished += 1
        if self._num_finished >= _STEPS_BEFORE_GROWTH:
            self._num_finished = 0
            self.max_running = min(self.max_running * _GROW, self._most)
