"""Has an engine's plans carried out by the workers of a crew."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from shoal.engine.api import WorkerStats
from shoal.engine.executor import Capacity
from shoal.errors import PeerLost
from shoal.fleet.crew import Crew
from shoal.fleet.ledger import Ledger
from shoal.messages import Plan, StepResult

log = logging.getLogger(__name__)

_FORM_ATTEMPTS = 3


class RemoteExecutor:
    """An Executor. `next_crew` is asked at every restart: it returns the crew it is given with lost workers
    replaced, or another one that has been made ready.
    """

    def __init__(
        self,
        crew: Crew,
        *,
        next_crew: Callable[[Crew], Crew],
        dismiss: Callable[[Crew], None],
        step_timeout_s: float,
    ) -> None:
        self.crew = crew
        self.max_in_flight = len(crew.stages)
        self._next_crew = next_crew
        self._dismiss = dismiss
        self._step_timeout_s = step_timeout_s
        self._epoch = 0
        self._num_outstanding = 0
        self._active_since_s = 0.0
        self._past_active_s = 0.0
        self._ledger = Ledger()

    def workers(self) -> list[WorkerStats]:
        crew = self.crew
        return self._ledger.totals(crew.placement, crew.usages(), self._active_s())

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

    def restart(self, epoch: int) -> Capacity:
        """Raises PeerLost when workers keep getting lost, or what kept new ones from loading."""
        self._ledger.close_epoch(self.crew.placement, self.crew.usages(), self._active_s())
        self._epoch = epoch
        self._num_outstanding = 0
        self._past_active_s = 0.0
        for attempt in range(1, _FORM_ATTEMPTS + 1):
            try:
                self.crew = self._next_crew(self.crew)
                self.crew.form(epoch)
                break
            except PeerLost as error:
                if attempt == _FORM_ATTEMPTS:
                    raise
                log.warning("%s; trying again", error)
        self.max_in_flight = len(self.crew.stages)
        return Capacity(num_blocks=self.crew.num_blocks, max_in_flight=self.max_in_flight)

    def _active_s(self) -> float:
        """Time of this epoch with a plan under way."""
        running_s = time.monotonic() - self._active_since_s if self._num_outstanding else 0.0
        return self._past_active_s + running_s

    def close(self) -> None:
        self._dismiss(self.crew)
