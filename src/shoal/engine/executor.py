"""How an engine has its plans carried out, by workers here or elsewhere."""

from __future__ import annotations

from typing import Protocol

import msgspec

from shoal.engine.api import WorkerStats
from shoal.messages import Plan, StepResult
from shoal.worker.worker import Worker


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What an executor offers: blocks of KV cache, and plans under way at a time."""

    num_blocks: int
    max_in_flight: int


class Executor(Protocol):
    """Carries out plans in the order they are submitted, and returns results in that order.

    `max_in_flight` is how many plans may be outstanding: as many as there are stages.
    """

    max_in_flight: int

    def submit(self, plan: Plan) -> None: ...

    def collect(self) -> StepResult:
        """The oldest outstanding plan's result; waits for it.

        Raises PeerLost when a worker is gone, and whatever the step itself raised.
        """
        ...

    def restart(self, epoch: int) -> Capacity:
        """Void all outstanding plans, and be ready for those of `epoch`, with an empty cache.

        After an error, or to go over to workers that have been made ready meanwhile. Raises
        PeerLost when it may go better with another epoch, other ShoalErrors when no workers can be
        had.
        """
        ...

    def workers(self) -> list[WorkerStats]:
        """What each worker has done; nothing for a worker in this process."""
        ...

    def close(self) -> None: ...


class LocalExecutor:
    """One worker in this process: a plan runs when its result is asked for."""

    max_in_flight = 1

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._outstanding: list[Plan] = []

    @property
    def capacity(self) -> Capacity:
        return Capacity(num_blocks=self._worker.num_blocks, max_in_flight=self.max_in_flight)

    def submit(self, plan: Plan) -> None:
        self._outstanding.append(plan)

    def collect(self) -> StepResult:
        return self._worker.execute(self._outstanding.pop(0))

    def restart(self, epoch: int) -> Capacity:  # noqa: ARG002
        self._outstanding.clear()
        return self.capacity

    def workers(self) -> list[WorkerStats]:
        return []

    def close(self) -> None:
        pass
