"""What a replica got over: the latest incidents, and the recovery that is under way."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from shoal.engine.api import Incident, RecoveryTally
from shoal.engine.recovery import Recovery
from shoal.engine.story import told
from shoal.engine.tally import IncidentCounter
from shoal.messages import StepResult

log = logging.getLogger(__name__)

_NUM_KEPT = 100


class Chronicle:
    """One thread writes it, any thread reads. Each incident is logged and counted at its end."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._number = 0
        self._epoch = 0
        self._ended: deque[Incident] = deque(maxlen=_NUM_KEPT)
        self._counter = IncidentCounter()
        self.open: Recovery | None = None

    @property
    def tally(self) -> RecoveryTally:
        return self._counter.tally

    def incidents(self) -> list[Incident]:
        """Oldest first; the last may be under way."""
        ended, recovery = self._ended.copy(), self.open
        if recovery is not None:
            ended.append(recovery.incident(self._epoch, "under way"))
        return list(ended)

    def begin(
        self,
        cause: str,
        noticed_by: str,
        *,
        num_requests: int,
        meanwhile: Callable[[Recovery], None],
    ) -> Recovery:
        """One that has not come to a token yet goes on: what it had brought about is lost again."""
        if self.open is not None:
            self.open.lost_again()
            return self.open
        self._number += 1
        incident = Incident(
            number=self._number,
            replica=self._replica,
            cause=cause,
            noticed_by=noticed_by,
            began_s=time.time(),
            epoch=self._epoch,
            num_requests=num_requests,
        )
        self.open = Recovery(incident, meanwhile)
        return self.open

    def formed(self, epoch: int) -> None:
        self._epoch = epoch
        if self.open is not None:
            self.open.enter("recompute")

    def finished(self, result: StepResult) -> None:
        """A step: the recovery is over when a client hears of one."""
        if self.open is not None:
            self.open.worked()
            if any(part.token_ids or part.pooled for part in result.results):
                self.end("recovered")

    def end(self, outcome: Literal["recovered", "given up"]) -> None:
        """The open recovery, if there is one, is over."""
        recovery, self.open = self.open, None
        if recovery is not None:
            incident = recovery.incident(self._epoch, outcome)
            self._ended.append(incident)
            self._counter.add(incident)
            log.warning("%s", told(incident))
