"""Nodes and workers without processes: they start, load, form and compute in simulated time.

What they say arrives at the head later, in order per worker. A mute worker (frozen, or cut off)
says nothing until it is back; then everything it had to say arrives late.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from replica_model import ReplicaModel

from shoal.cluster.placement import ReplicaPlacement, Seat
from shoal.messages import Plan
from shoal.parallel.partition import Shard

HEARTBEAT_S = 0.2
DIAL_S = 5.0
BLOCK_SIZE = 4
NEVER_S = float("inf")


class Timeline:
    """Things to do, in the order of their times; at equal times, of their coming."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    @property
    def next_s(self) -> float:
        return self._queue[0][0] if self._queue else NEVER_S

    def at(self, when_s: float, do: Callable[..., None], *args: Any) -> None:
        self._number += 1
        heapq.heappush(self._queue, (when_s, self._number, do, args))

    def after(self, delay_s: float, do: Callable[..., None], *args: Any) -> None:
        self.at(self.now_s + delay_s, do, *args)

    def clear(self) -> None:
        self._queue.clear()

    def run_next(self) -> None:
        self.now_s, _, do, args = heapq.heappop(self._queue)
        do(*args)


@dataclass(slots=True, eq=False)
class Worker:
    name: str
    node: str
    has_called: bool = False
    is_dead: bool = False
    mute_since_s: float | None = None
    mute_number: int = 0
    back_s: float = 0.0
    """Since when it is not mute any more; the first it sends then is a heartbeat."""
    shard: Shard | None = None
    epoch: int = 0
    formed_epoch: int = 0
    fails_to_load: int = 0
    unsaid: list[tuple[str, Any]] = field(default_factory=list)
    arrives_s: float = 0.0
    """When the latest of its messages arrives."""

    @property
    def is_mute(self) -> bool:
        return self.mute_since_s is not None


@dataclass(slots=True, eq=False)
class Formation:
    """Who computes together in an epoch, and what their caches hold."""

    epoch: int
    workers: list[Worker]
    model: ReplicaModel
    busy_until_s: float = 0.0
    stuck: list[Plan] = field(default_factory=list)


class Cluster:
    """`hear` is the head's ear: a worker's name, a word, and its value."""

    def __init__(
        self, dice: random.Random, timeline: Timeline, hear: Callable[[str, str, Any], None]
    ) -> None:
        self.workers: dict[str, Worker] = {}
        self.nodes_up: set[str] = set()
        self.formation: Formation | None = None
        self.num_bad_loads = 0
        self.says_twice = False
        self._dice = dice
        self._timeline = timeline
        self._hear = hear

    # ---- what the head orders -------------------------------------------------------------

    def start(self, seat: Seat, *, spare: bool) -> None:
        worker = Worker(seat.worker, seat.node)
        self.workers[seat.worker] = worker
        self._timeline.after(0.001 if spare else 0.5 + self._dice.random(), self._call, worker)

    def load(self, seat: Seat) -> None:
        worker = self.workers[seat.worker]
        self._timeline.after(0.02 + 0.3 * self._dice.random(), self._load, worker, seat.shard)

    def form(self, epoch: int, placement: ReplicaPlacement) -> None:
        workers = [self.workers[seat.worker] for seat in placement.seats]
        self.formation = Formation(epoch, workers, ReplicaModel(BLOCK_SIZE))
        for worker in workers:
            worker.epoch = max(worker.epoch, epoch)
            deadline_s = self._timeline.now_s + DIAL_S
            delay_s = 0.01 + 0.02 * self._dice.random()
            self._timeline.after(delay_s, self._form, worker, self.formation, deadline_s)

    def compute(self, plan: Plan) -> None:
        formation = self.formation
        assert formation is not None and formation.epoch == plan.epoch, "a plan for nobody"
        now_s = self._timeline.now_s
        formation.busy_until_s = max(now_s, formation.busy_until_s) + 0.01
        self._timeline.at(formation.busy_until_s, self._compute, formation, plan)

    def dismiss(self, name: str) -> None:
        worker = self.workers.get(name)
        if worker is not None and not worker.is_mute:
            worker.is_dead = True

    def last_heartbeat_s(self, name: str) -> float:
        """When the last one was sent that can have arrived."""
        worker, now_s = self.workers[name], self._timeline.now_s
        until_s = now_s if worker.mute_since_s is None else min(now_s, worker.mute_since_s)
        return max(until_s // HEARTBEAT_S * HEARTBEAT_S, worker.back_s)

    # ---- what goes wrong ------------------------------------------------------------------

    def kill(self, worker: Worker) -> None:
        """Its connection is reset: the head is told, unless the worker is cut off as well."""
        if worker.is_dead:
            return
        worker.is_dead = True
        if not worker.is_mute:
            self._send(worker, "lost", None)

    def mute(self, worker: Worker, duration_s: float) -> None:
        if worker.is_dead:
            return
        worker.mute_number += 1
        if not worker.is_mute:
            worker.mute_since_s = self._timeline.now_s
        if duration_s < NEVER_S:
            self._timeline.after(duration_s, self._unmute, worker, worker.mute_number)

    def lose_node(self, node: str, *, silently: bool) -> None:
        self.nodes_up.discard(node)
        for worker in [w for w in self.workers.values() if w.node == node]:
            if silently:
                self.mute(worker, NEVER_S)
            self.kill(worker)

    # ---- what workers do ------------------------------------------------------------------

    def _say(self, worker: Worker, word: str, value: Any = None) -> None:
        if worker.is_mute:
            worker.unsaid.append((word, value))
        elif not worker.is_dead:
            self._send(worker, word, value)

    def _send(self, worker: Worker, word: str, value: Any) -> None:
        delay_s = 0.001 + 0.01 * self._dice.random()
        worker.arrives_s = max(worker.arrives_s, self._timeline.now_s + delay_s)
        self._timeline.at(worker.arrives_s, self._hear, worker.name, word, value)
        if self.says_twice and word in ("result", "formed"):
            again_s = worker.arrives_s + self._dice.random()
            self._timeline.at(again_s, self._hear, worker.name, word, value)

    def _unmute(self, worker: Worker, mute_number: int) -> None:
        if worker.is_dead or worker.mute_number != mute_number:
            return
        worker.mute_since_s, worker.back_s = None, self._timeline.now_s
        for word, value in worker.unsaid:
            self._send(worker, word, value)
        worker.unsaid.clear()
        formation = self.formation
        if formation is not None and worker in formation.workers:
            plans, formation.stuck = formation.stuck, []
            for plan in plans:
                self._compute(formation, plan)

    def _call(self, worker: Worker) -> None:
        worker.has_called = True
        self._say(worker, "called")

    def _load(self, worker: Worker, shard: Shard) -> None:
        if worker.is_dead:
            return
        if self.num_bad_loads:
            self.num_bad_loads -= 1
            self._say(worker, "load failed")
            return
        worker.shard = shard
        self._say(worker, "loaded", shard)

    def _form(self, worker: Worker, formation: Formation, deadline_s: float) -> None:
        if worker.is_dead or worker.epoch != formation.epoch:
            return  # a newer order interrupts it
        waits = any(each.mute_since_s is not None for each in formation.workers)
        if waits and self._timeline.now_s < deadline_s:
            self._timeline.after(0.5, self._form, worker, formation, deadline_s)
        elif waits or any(each.is_dead for each in formation.workers):
            self._say(worker, "not formed", formation.epoch)
        else:
            worker.formed_epoch = formation.epoch
            self._say(worker, "formed", formation.epoch)

    def _compute(self, formation: Formation, plan: Plan) -> None:
        workers = formation.workers
        if any(worker.is_dead or worker.epoch != plan.epoch for worker in workers):
            return
        if any(worker.is_mute for worker in workers):
            formation.stuck.append(plan)
            return
        self._say(workers[-1], "result", formation.model.run(plan))
