"""Has an engine's plans carried out by the workers of a crew."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from shoal.engine.api import WorkerStats
from shoal.engine.executor import Capacity
from shoal.fleet.crew import Crew, Witness
from shoal.fleet.ledger import Ledger
from shoal.messages import Plan, StepResult


class RemoteExecutor:
    """An Executor. At a restart lost workers are replaced, or another crew takes over."""

    def __init__(self, crew: Crew, *, step_timeout_s: float) -> None:
        self.crew = crew
        self.max_in_flight = len(crew.stages)
        self._step_timeout_s = step_timeout_s
        self._wake: Callable[[], None] = lambda: None
        self._successor: tuple[Crew, threading.Event] | None = None
        self._succession = threading.Lock()
        self._taken_over = threading.Event()
        self._epoch = 0
        self._num_outstanding = 0
        self._active_since_s = 0.0
        self._past_active_s = 0.0
        self._ledger = Ledger()

    @property
    def wants_restart(self) -> bool:
        return self._has_successor() or self.crew.is_broken

    def watch(self, wake: Callable[[], None]) -> None:
        self._wake = self.crew.on_trouble = wake

    def submit(self, plan: Plan) -> None:
        if self._num_outstanding == 0:
            self._active_since_s = time.monotonic()
        self._num_outstanding += 1
        self.crew.broadcast(plan)

    def collect(self) -> StepResult:
        result = self.crew.next_result(self._epoch, self._step_timeout_s)
        self._num_outstanding -= 1
        if self._num_outstanding == 0:
            self._past_active_s += time.monotonic() - self._active_since_s
        return result

    def succeed_with(self, crew: Crew) -> threading.Event:
        """Have a crew that is loaded take over at the next restart; the event says when it has."""
        done = threading.Event()
        with self._succession:
            before, self._successor = self._successor, (crew, done)
        if before is not None:  # its turn never came
            _dismiss_aside(before[0])
        self._wake()
        return done

    def restart(self, epoch: int, recovery: Witness) -> Capacity:
        """As Executor says; raises only what `recovery.meanwhile` raises."""
        usages = self.crew.usages(self._epoch)
        self._ledger.close_epoch(self.crew.placement, usages, self._active_s())
        self._epoch = 0  # of none, until one is formed: what was done counts once
        self._num_outstanding = 0
        self._past_active_s = 0.0
        self._epoch = self._form(epoch, recovery)
        self._taken_over.set()
        if self.crew.are_caches_kept:
            recovery.note_decision("every KV cache is kept")
        self.max_in_flight = len(self.crew.stages)
        return Capacity(
            num_blocks=self.crew.num_blocks,
            max_in_flight=self.max_in_flight,
            epoch=self._epoch,
            is_cache_kept=self.crew.are_caches_kept,
        )

    def _form(self, epoch: int, recovery: Witness) -> int:
        """By those who stand ready, even if they come while others are still awaited."""
        while True:
            self._take_over(recovery)
            begun = self.crew.form(epoch, recovery, is_superseded=self._has_successor)
            epoch = max(epoch, begun)
            if not self._has_successor():
                return epoch

    def _has_successor(self) -> bool:
        return self._successor is not None

    def _take_over(self, recovery: Witness) -> None:
        with self._succession:
            successor, self._successor = self._successor, None
        if successor is not None:
            _dismiss_aside(self.crew)
            self.crew, self._taken_over = successor
            self.crew.on_trouble = self._wake
            recovery.note_decision("the workers that stand ready take over")

    def workers(self) -> list[WorkerStats]:
        crew = self.crew
        usages = crew.usages(self._epoch)
        return self._ledger.totals(crew.placement, usages, self._active_s(), crew.pids())

    def active_s(self) -> float:
        """Time since the start with a plan under way."""
        return self._ledger.active_s + self._active_s()

    def close(self) -> None:
        self.crew.dismiss()
        if self._successor is not None:
            self._successor[0].dismiss()

    def _active_s(self) -> float:
        """Of this epoch."""
        running_s = time.monotonic() - self._active_since_s if self._num_outstanding else 0.0
        return self._past_active_s + running_s


def _dismiss_aside(crew: Crew) -> None:
    """Streams need not wait until the old workers have gone."""
    threading.Thread(target=crew.dismiss, name="shoal-dismiss").start()
