"""A re-formation of a replica, told as it goes on, and the incident that remains of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from shoal.engine.api import Incident
from shoal.errors import EngineStopped, ShoalError

Phase = Literal["start", "load", "form", "recompute"]

# Workers may be lacking for days, and somebody tries again every second.
_MOST_TOLD = 100
_RETRY_AFTER_S = 5.0


class Recovery:
    """One re-formation, from the moment it is noticed that it is needed.

    `meanwhile` is called all the time by who waits for workers: it raises when nobody wants them
    any more.
    """

    def __init__(self, incident: Incident, meanwhile: Callable[[Recovery], None]) -> None:
        self._incident = incident
        self._meanwhile = meanwhile
        self._began_s = self._awaited_s = self._phase_began_s = time.monotonic()
        self._has_worked = False
        self._phase: Phase | None = None
        self._phases: dict[str, float] = {}
        self._noticed_by = incident.noticed_by
        self._cause = incident.cause
        self._lost: list[str] = []
        self._decisions: list[str] = []
        self.trouble = incident.cause
        """The last that went wrong, for who asks why it takes so long."""

    def meanwhile(self) -> None:
        self._meanwhile(self)

    @property
    def since_s(self) -> float:
        """How long no step has been finished for lack of workers."""
        return time.monotonic() - self._awaited_s

    def worked(self) -> None:
        """A step has finished."""
        self._has_worked = True

    def lost_again(self) -> None:
        """Workers are awaited anew; if a step has finished meanwhile, from now on."""
        if self._has_worked:
            self._has_worked = False
            self._awaited_s = time.monotonic()

    def note_loss(self, worker: str, reason: str, noticed_by: str, silence_s: float) -> None:
        if not self._lost:
            self._cause, self._noticed_by = reason, noticed_by
        _tell(self._lost, worker)
        if silence_s:
            self._phases["silence"] = max(silence_s, self._phases.get("silence", 0.0))
        self.trouble = f"worker {worker} is lost: {reason}"

    def note_trouble(self, error: ShoalError) -> None:
        self.trouble = error.message

    def note_decision(self, what: str) -> None:
        _tell(self._decisions, what)

    def enter(self, phase: Phase) -> None:
        """From now on time is spent on this; going back to an earlier phase adds to it."""
        if phase == self._phase:
            return
        self._close_phase()
        self._phase = phase

    def incident(
        self, epoch: int, outcome: Literal["under way", "recovered", "given up"]
    ) -> Incident:
        """What there is to tell now."""
        phases = self._phases | {"total": time.monotonic() - self._began_s}
        if self._phase is not None:
            running_s = time.monotonic() - self._phase_began_s
            phases[self._phase] = self._phases.get(self._phase, 0.0) + running_s
        before = self._incident
        return Incident(
            number=before.number,
            replica=before.replica,
            cause=self._cause,
            noticed_by=self._noticed_by,
            began_s=before.began_s,
            epoch=epoch,
            lost=list(self._lost),
            decisions=list(self._decisions),
            phases=phases,
            num_requests=before.num_requests,
            outcome=outcome,
        )

    def _close_phase(self) -> None:
        now_s = time.monotonic()
        if self._phase is not None:
            spent_s = now_s - self._phase_began_s
            self._phases[self._phase] = self._phases.get(self._phase, 0.0) + spent_s
        self._phase_began_s = now_s


def no_workers(reason: str) -> EngineStopped:
    return EngineStopped(reason, retry_after_s=_RETRY_AFTER_S, code="no_workers")


def _tell(story: list[str], what: str) -> None:
    if len(story) < _MOST_TOLD:
        story.append(what)
