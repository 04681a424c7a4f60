"""Crews over workers that are not real, and a witness that writes all down."""

from __future__ import annotations

import time
from collections.abc import Callable

from fleet_fakes import CONFIG, DIMS, PLACEMENT, FakeWorkers

from shoal.cluster.placement import ReplicaPlacement, divide
from shoal.config import Split
from shoal.engine.recovery import Phase
from shoal.errors import PlacementError, ShoalError
from shoal.fleet.crew import Crew, Elsewhere, FirstTrouble
from shoal.fleet.muster import Muster

_PATIENCE_S = 10.0


class Notes:
    """A Witness that writes all down, and lets no test wait for ever."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.losses: list[tuple[str, str, float]] = []
        self.reasons: list[str] = []
        self.troubles: list[str] = []
        self.decisions: list[str] = []
        self.phases: list[Phase] = []
        self._meanwhile = meanwhile
        self._deadline_s = time.monotonic() + _PATIENCE_S

    def meanwhile(self) -> None:
        assert time.monotonic() < self._deadline_s, f"for ever: {self.troubles[-1:]}"
        self._meanwhile()

    def note_loss(self, worker: str, reason: str, noticed_by: str, silence_s: float) -> None:
        self.losses.append((worker, noticed_by, silence_s))
        self.reasons.append(reason)

    def note_trouble(self, error: ShoalError) -> None:
        self.troubles.append(error.message)

    def note_decision(self, what: str) -> None:
        self.decisions.append(what)

    def enter(self, phase: Phase) -> None:
        if self.phases[-1:] != [phase]:
            self.phases.append(phase)

    @property
    def lost(self) -> list[str]:
        return [worker for worker, _, _ in self.losses]


def muster_over(
    workers: FakeWorkers, placement: ReplicaPlacement = PLACEMENT, *, home: tuple[str, ...] = ()
) -> Muster:
    """Six cores on every node of the placement."""
    muster = Muster(workers, workers, CONFIG, path_on=lambda node: f"/{node}/model", home=home)
    muster.share_out([placement], {seat.node: 6 for seat in placement.seats})
    return muster


def nowhere(placement: ReplicaPlacement, without: frozenset[str]) -> ReplicaPlacement:
    nodes = sorted({seat.node for seat in placement.seats})
    raise PlacementError(f"{nodes} are all there is, and {sorted(without)} are not to be used")


def crew_over(
    muster: Muster, placement: ReplicaPlacement = PLACEMENT, *, elsewhere: Elsewhere = nowhere
) -> Crew:
    """Nobody is in it yet."""
    return Crew(placement, muster, CONFIG, elsewhere=elsewhere)


def formed(
    workers: FakeWorkers,
    placement: ReplicaPlacement = PLACEMENT,
    *,
    elsewhere: Elsewhere | None = None,
) -> Crew:
    muster = muster_over(workers, placement, home=("here",))
    crew = crew_over(muster, placement, **({"elsewhere": elsewhere} if elsewhere else {}))
    crew.man(FirstTrouble())
    crew.form(1, FirstTrouble())
    for line in workers.lines.values():
        line.told.clear()
    return crew


def names(crew: Crew) -> list[str]:
    return [seat.worker for seat in crew.placement.seats]


def on(*nodes: str) -> ReplicaPlacement:
    return divide(DIMS, Split(pipeline=len(nodes)), nodes).replicas[0]
