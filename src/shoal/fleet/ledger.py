"""What the workers of a replica have done, seat by seat, however often they were replaced."""

from __future__ import annotations

from collections.abc import Mapping

from shoal.cluster.placement import ReplicaPlacement, Seat
from shoal.engine.api import WorkerStats
from shoal.parallel.control import Usage

_COUNTERS = (
    "steps",
    "busy_seconds",
    "waiting_seconds",
    "bubble_seconds",
    "stage_bytes",
    "stage_messages",
    "rank_bytes",
    "rank_messages",
)

Place = tuple[int, int]
"""(stage, rank)"""


class Ledger:
    """Adds up counters that start anew with every epoch. `active_s` is of the epochs closed."""

    def __init__(self) -> None:
        self._past: dict[Place, dict[str, float]] = {}
        self.active_s = 0.0

    def close_epoch(
        self, placement: ReplicaPlacement, usages: Mapping[str, Usage | None], active_s: float
    ) -> None:
        for stats in self.totals(placement, usages, active_s, {}):
            counters = {name: getattr(stats, name) for name in _COUNTERS}
            self._past[stats.stage, stats.rank] = counters
        self.active_s += active_s

    def totals(
        self,
        placement: ReplicaPlacement,
        usages: Mapping[str, Usage | None],
        active_s: float,
        pids: Mapping[str, int],
    ) -> list[WorkerStats]:
        """`usages` are of this epoch, by worker; `active_s` its time with plans under way."""
        return [
            self._total(
                seat, (stage, rank), usages.get(seat.worker), active_s, pids.get(seat.worker, 0)
            )
            for stage, seats in enumerate(placement.stages)
            for rank, seat in enumerate(seats)
        ]

    def _total(
        self, seat: Seat, place: Place, usage: Usage | None, active_s: float, pid: int
    ) -> WorkerStats:
        past = self._past.get(place, {})
        now = _counters(usage, active_s) if usage is not None else {}
        counters = {name: past.get(name, 0) + now.get(name, 0) for name in _COUNTERS}
        return WorkerStats(
            worker=seat.worker,
            pid=pid,
            node=seat.node,
            stage=place[0],
            rank=place[1],
            layers=(seat.shard.layers.start, seat.shard.layers.stop),
            **counters,  # type: ignore[arg-type]
        )


def _counters(usage: Usage, active_s: float) -> dict[str, float]:
    return {
        "steps": usage.num_steps,
        "busy_seconds": usage.busy_s,
        "waiting_seconds": usage.waiting_s,
        # Usage is up to half a second old, so a busy stage may seem to have had a bubble.
        "bubble_seconds": max(active_s - usage.busy_s, 0.0),
        "stage_bytes": usage.stage_bytes,
        "stage_messages": usage.stage_messages,
        "rank_bytes": usage.rank_bytes,
        "rank_messages": usage.rank_messages,
    }
