"""A supervisor with a clock set by hand, whose workers do what they are told."""

from __future__ import annotations

import itertools

from fleet_fakes import DIMS

from shoal.cluster.placement import ReplicaPlacement, divide
from shoal.cluster.supervisor import (
    SETTLE_S,
    Form,
    Instruction,
    Load,
    Start,
    Supervisor,
)
from shoal.config import Split


def placement_of(*nodes: str) -> ReplicaPlacement:
    """One stage on each node."""
    return divide(DIMS, Split(pipeline=len(nodes)), list(nodes)).replicas[0]


class Rig:
    """A supervisor whose workers do what they are told at once, except as a test says."""

    def __init__(self, *nodes: str, home: tuple[str, ...] = (), epoch: int = 0) -> None:
        self.now_s = 1000.0
        self.brain = Supervisor(
            placement_of(*nodes), numbers=itertools.count(1), home=home, epoch=epoch
        )

    def next(self) -> list[Instruction]:
        told = self.brain.next(self.now_s)
        self.brain.check()
        return told

    def serve(self, told: list[Instruction] | None = None) -> list[Instruction]:
        """Have workers call, load and form until there is nothing more to do; all that was told."""
        every: list[Instruction] = []
        told = self.next() if told is None else told
        while told or (self.brain.is_manned and not self.brain.is_formed):
            every += told
            for each in told:
                self.obey(each)
            self.now_s += SETTLE_S
            told = self.next()
        return every

    def obey(self, told: Instruction) -> None:
        match told:
            case Start(seat=seat):
                self.brain.called(seat.worker, self.now_s)
            case Load(seat=seat):
                self.brain.loaded(seat.worker)
            case Form(epoch=epoch):
                for worker in self.workers:
                    self.brain.formed(worker, epoch)

    def formed(self) -> Rig:
        self.serve()
        assert self.brain.is_formed
        return self

    def lose(self, index: int = 0, *, silent: bool = False) -> None:
        self.brain.lost(self.workers[index], self.now_s, silent=silent)

    @property
    def workers(self) -> list[str]:
        return [seat.worker for seat in self.brain.placement.seats]

    @property
    def nodes(self) -> list[str]:
        return [seat.node for seat in self.brain.placement.seats]


def kinds(told: list[Instruction]) -> list[type[Instruction]]:
    return [type(each) for each in told]
