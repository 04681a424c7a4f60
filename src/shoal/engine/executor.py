"""How an engine has its plans carried out, by workers here or elsewhere."""

from __future__ import annotations

from typing import Protocol

from shoal.messages import Plan, StepResult
from shoal.worker.worker import Worker


class Executor(Protocol):
    """Carries out plans in the order they are submitted, and returns results in that order.

    `max_in_flight` is how many plans may be outstanding: as many as there are stages.
    """

    max_in_flight: int

    def submit(self, plan: Plan) -> None: ...

    def collect(self) -> StepResult:
        """The oldest outstanding plan's result; waits for it."""
        ...


class LocalExecutor:
    """One worker in this process: a plan runs when its result is asked for."""

    max_in_flight = 1

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._outstanding: list[Plan] = []

    def submit(self, plan: Plan) -> None:
        self._outstanding.append(plan)

    def collect(self) -> StepResult:
        return self._worker.execute(self._outstanding.pop(0))
