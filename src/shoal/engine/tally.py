"""All incidents of a replica in numbers, for who looks at them only now and then."""

from __future__ import annotations

import bisect
from collections import Counter

from shoal.engine.api import RECOVERY_BOUNDS_S, Incident, RecoveryTally


class IncidentCounter:
    """One thread adds each incident once, when it has ended; any thread reads `tally`."""

    def __init__(self) -> None:
        self._ended: Counter[tuple[str, str]] = Counter()
        self._phase_s: dict[str, float] = {}
        self._num_within = [0] * len(RECOVERY_BOUNDS_S)
        self.tally = RecoveryTally()
        """Replaced as a whole, since others read it meanwhile."""

    def add(self, incident: Incident) -> None:
        assert incident.outcome != "under way", f"incident {incident.number} has not ended"
        self._ended[incident.noticed_by, incident.outcome] += 1
        if incident.outcome == "recovered":
            self._add_times(incident.phases)
        self.tally = RecoveryTally(
            ended=[(by, outcome, number) for (by, outcome), number in sorted(self._ended.items())],
            phase_seconds=dict(self._phase_s),
            num_within=list(self._num_within),
        )

    def _add_times(self, phases: dict[str, float]) -> None:
        for phase, seconds in phases.items():
            self._phase_s[phase] = self._phase_s.get(phase, 0.0) + seconds
        least = bisect.bisect_left(RECOVERY_BOUNDS_S, phases.get("total", 0.0))
        for index in range(least, len(RECOVERY_BOUNDS_S)):
            self._num_within[index] += 1
