"""How an engine has its plans carried out, by workers here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from shoal.engine.api import WorkerStats
from shoal.engine.recovery import Recovery
from shoal.messages import Plan, StepResult
from shoal.worker.worker import Worker


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What an executor offers from `epoch` on: blocks of KV cache, plans under way at a time."""

    num_blocks: int
    max_in_flight: int
    epoch: int = 0
    is_cache_kept: bool = False
    """Whether blocks hold what they held before the restart."""


class Executor(Protocol):
    """Carries out plans in the order they are submitted, and returns results in that order.

    `max_in_flight` is how many plans may be outstanding: as many as there are stages.
    """

    max_in_flight: int

    @property
    def wants_restart(self) -> bool:
        """A worker is lost, or others are ready to take over."""
        ...

    def watch(self, wake: Callable[[], None]) -> None:
        """`wake` is to be called, from any thread, when `wants_restart` may have become true."""
        ...

    def submit(self, plan: Plan) -> None: ...

    def collect(self) -> StepResult:
        """The oldest outstanding plan's result; waits for it.

        Raises PeerLost when a worker is gone, and whatever the step itself raised.
        """
        ...

    def restart(self, epoch: int, recovery: Recovery) -> Capacity:
        """Void all outstanding plans, and be ready for new ones, with an empty cache.

        After an error, or to go over to workers that have been made ready meanwhile. The epoch
        that has begun is at least `epoch`. As long as no workers can be had it goes on looking for
        some, until `recovery.meanwhile` raises.
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

    @property
    def wants_restart(self) -> bool:
        return False

    def watch(self, wake: Callable[[], None]) -> None:
        pass

    def submit(self, plan: Plan) -> None:
        self._outstanding.append(plan)

    def collect(self) -> StepResult:
        return self._worker.execute(self._outstanding.pop(0))

    def restart(self, epoch: int, recovery: Recovery) -> Capacity:  # noqa: ARG002
        self._outstanding.clear()
        return msgspec.structs.replace(self.capacity, epoch=epoch)

    def workers(self) -> list[WorkerStats]:
        return []

    def close(self) -> None:
        pass
