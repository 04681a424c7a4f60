"""Who is alive, by heartbeats: a worker that has been silent for too long is dead, and only once.

Silence counts while it is watched. What the observer slept through, or a step of its clock, is no
worker's silence.
"""

from __future__ import annotations

from dataclasses import dataclass

_LATE_TICKS = 2
"""A look that comes so many ticks after the one before has missed something."""
_ROUNDING_S = 1e-6
"""So close to a deadline is at it: the pause until then could be lost in rounding."""


@dataclass(slots=True)
class _Sign:
    """A worker's last sign of life and when it is dead without another, in watched seconds."""

    heard_s: float
    deadline_s: float
    spared: bool = False


class Membership:
    """Look at every `wake_s`, and before each look hand over the signs that were there at the last.

    While looks are at most `tick_s` apart, a worker counts as dead between `dead_after_s` and
    `dead_after_s + tick_s` after its last sign. A late look spares those that would die by it for
    one tick, so that signs which came meanwhile can be read, and itself counts as one tick of
    silence at most. An observer that is always late still finds the dead, later. Times are of any
    one clock, in seconds. Not thread-safe.
    """

    def __init__(self, dead_after_s: float, tick_s: float) -> None:
        self._dead_after_s = dead_after_s
        self._tick_s = tick_s
        self._signs: dict[str, _Sign] = {}
        self._watched_s = 0.0
        self._last_look_s = 0.0
        self._earliest_s = 0.0  # no deadline lies before it

    def __contains__(self, worker: str) -> bool:
        return worker in self._signs

    def join(self, worker: str, now_s: float) -> None:
        """Watch a worker from now on."""
        if not self._signs:
            self._last_look_s = now_s
            self._earliest_s = self._watched_s + self._dead_after_s
        heard_s = self._watched_until(now_s)
        self._signs[worker] = _Sign(heard_s, heard_s + self._dead_after_s)

    def heard(self, worker: str, now_s: float) -> None:
        """A sign of life; of one that is not watched, or dead already, it changes nothing.

        Hand over each sign once: one that is older than the last look counts as of that look.
        """
        sign = self._signs.get(worker)
        if sign is None:
            return
        sign.heard_s = max(sign.heard_s, self._watched_until(now_s))
        sign.deadline_s = max(sign.deadline_s, sign.heard_s + self._dead_after_s)
        sign.spared = False

    def leave(self, worker: str) -> None:
        """Watch it no more, if it was watched."""
        self._signs.pop(worker, None)

    def silent(self, now_s: float) -> list[tuple[str, float]]:
        """Look: who has died since the last look, and its silence in seconds. They are left out."""
        is_late = now_s - self._last_look_s > _LATE_TICKS * self._tick_s
        self._watched_s = self._watched_until(now_s)
        self._last_look_s = now_s
        if is_late:
            self._spare()
        dead = [
            (worker, self._watched_s - sign.heard_s)
            for worker, sign in self._signs.items()
            if sign.deadline_s <= self._watched_s + _ROUNDING_S
        ]
        for worker, _ in dead:
            del self._signs[worker]
        self._earliest_s = min((s.deadline_s for s in self._signs.values()), default=0.0)
        return dead

    def wake_s(self, now_s: float) -> float | None:
        """When to look next; None while nobody is watched."""
        if not self._signs:
            return None
        pause_s = min(self._tick_s, max(0.0, self._earliest_s - self._watched_s))
        return min(self._last_look_s, now_s) + pause_s

    def _watched_until(self, now_s: float) -> float:
        elapsed_s = now_s - self._last_look_s
        if elapsed_s > _LATE_TICKS * self._tick_s:
            elapsed_s = self._tick_s
        return self._watched_s + max(0.0, elapsed_s)

    def _spare(self) -> None:
        """Once only until they are heard: else an observer that is always late finds nobody."""
        for sign in self._signs.values():
            if not sign.spared and sign.deadline_s < self._watched_s + self._tick_s:
                sign.deadline_s = self._watched_s + self._tick_s
                sign.spared = True
