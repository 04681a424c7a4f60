"""How fast a fleet is now: the difference of two looks at its counters."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.engine.api import WorkerStats
    from shoal.fleet.status import FleetStatus

# Workers tell their counters twice a second: over less than this, shares would jump about.
WINDOW_S = 2.0

Seat = tuple[str, int, int]
"""(replica, stage, rank)"""


@dataclass(frozen=True)
class WorkerRates:
    """Shares of the time in [0, 1]; what is left of it, there was no work."""

    busy: float
    bubble: float
    sent_bytes_per_s: float


@dataclass(frozen=True)
class Rates:
    """Tokens per second by replica. A seat that has just been taken has no rates yet."""

    tokens_per_s: dict[str, float] = field(default_factory=dict)
    workers: dict[Seat, WorkerRates] = field(default_factory=dict)


class RateWindow:
    """Looks at a fleet again and again; the rates are those of the last few seconds."""

    def __init__(self, window_s: float = WINDOW_S, now: Callable[[], float] = time.monotonic):
        self._window_s = window_s
        self._now = now
        self._looks: deque[tuple[float, FleetStatus]] = deque()

    def add(self, status: FleetStatus) -> Rates:
        """The rates up to this status; none with the first."""
        now_s = self._now()
        self._looks.append((now_s, status))
        while len(self._looks) > 2 and self._looks[1][0] <= now_s - self._window_s:
            self._looks.popleft()
        before_s, before = self._looks[0]
        return _rates(before, status, now_s - before_s) if now_s > before_s else Rates()


def is_idle(status: FleetStatus) -> bool:
    return not any(each.stats.num_running or each.stats.num_waiting for each in status.replicas)


def _rates(before: FleetStatus, after: FleetStatus, seconds: float) -> Rates:
    tokens = {each.name: each.stats.generated_tokens for each in before.replicas}
    seats = _seats(before)
    return Rates(
        tokens_per_s={
            each.name: max(each.stats.generated_tokens - tokens[each.name], 0) / seconds
            for each in after.replicas
            if each.name in tokens
        },
        workers={
            seat: _worker_rates(seats[seat], worker, seconds)
            for seat, worker in _seats(after).items()
            if seat in seats
        },
    )


def _seats(status: FleetStatus) -> dict[Seat, WorkerStats]:
    return {
        (replica.name, worker.stage, worker.rank): worker
        for replica in status.replicas
        for worker in replica.stats.workers
    }


def _worker_rates(before: WorkerStats, after: WorkerStats, seconds: float) -> WorkerRates:
    sent = after.stage_bytes + after.rank_bytes - before.stage_bytes - before.rank_bytes
    return WorkerRates(
        busy=_share(after.busy_seconds - before.busy_seconds, seconds),
        bubble=_share(after.bubble_seconds - before.bubble_seconds, seconds),
        sent_bytes_per_s=max(sent, 0) / seconds,
    )


def _share(part_s: float, whole_s: float) -> float:
    return min(max(part_s / whole_s, 0.0), 1.0)
