"""Has an engine's plans carried out by the workers of a crew."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from shoal.cluster.placement import ReplicaPlacement
from shoal.engine.api import WorkerStats
from shoal.engine.executor import Capacity
from shoal.errors import PlacementError
from shoal.fleet.crew import Crew
from shoal.fleet.ledger import Ledger
from shoal.fleet.muster import Muster
from shoal.messages import Plan, StepResult

log = logging.getLogger(__name__)

Elsewhere = Callable[[ReplicaPlacement], ReplicaPlacement]
"""Where a replica goes whose nodes are not all there any more. Raises PlacementError."""


class RemoteExecutor:
    """An Executor. At a restart lost workers are replaced, or another crew takes over."""

    def __init__(
        self, crew: Crew, muster: Muster, *, elsewhere: Elsewhere, step_timeout_s: float
    ) -> None:
        self.crew = crew
        self.max_in_flight = len(crew.stages)
        self._muster = muster
        self._elsewhere = elsewhere
        self._step_timeout_s = step_timeout_s
        self._successor: tuple[Crew, threading.Event] | None = None
        self._succession = threading.Lock()
        self._taken_over = threading.Event()
        self._epoch = 0
        self._num_outstanding = 0
        self._active_since_s = 0.0
        self._past_active_s = 0.0
        self._ledger = Ledger()

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
            self._dismiss_aside(before[0])
        return done

    def restart(self, epoch: int) -> Capacity:
        """Raises PeerLost when another worker is lost meanwhile, and what kept one from loading.

        After a PeerLost try again, with a new epoch.
        """
        usages = self.crew.usages(self._epoch)
        self._ledger.close_epoch(self.crew.placement, usages, self._active_s())
        self._epoch = epoch
        self._num_outstanding = 0
        self._past_active_s = 0.0
        with self._succession:
            successor, self._successor = self._successor, None
        if successor is not None:
            self._dismiss_aside(self.crew)
            self.crew, self._taken_over = successor
        self.crew = self._mended(self.crew)
        self.crew.form(epoch)
        self._taken_over.set()
        self.max_in_flight = len(self.crew.stages)
        return Capacity(num_blocks=self.crew.num_blocks, max_in_flight=self.max_in_flight)

    def workers(self) -> list[WorkerStats]:
        crew = self.crew
        return self._ledger.totals(crew.placement, crew.usages(self._epoch), self._active_s())

    def active_s(self) -> float:
        """Time since the start with a plan under way."""
        return self._ledger.active_s + self._active_s()

    def close(self) -> None:
        self._muster.dismiss(self.crew)
        if self._successor is not None:
            self._muster.dismiss(self._successor[0])

    def _mended(self, crew: Crew) -> Crew:
        try:
            return self._muster.mend(crew)
        except PlacementError as error:
            log.warning("%s: the replica moves", error)
        moved = self._muster.gather(self._elsewhere(crew.placement))
        self._dismiss_aside(crew)
        return moved

    def _dismiss_aside(self, crew: Crew) -> None:
        """Streams need not wait until the old workers have gone."""
        dismiss = threading.Thread(target=self._muster.dismiss, args=[crew], name="shoal-dismiss")
        dismiss.start()

    def _active_s(self) -> float:
        """Of this epoch."""
        running_s = time.monotonic() - self._active_since_s if self._num_outstanding else 0.0
        return self._past_active_s + running_s
