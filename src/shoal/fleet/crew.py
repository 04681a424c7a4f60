"""The workers of one replica, loaded, who form anew for each epoch."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from shoal.cluster.placement import ReplicaPlacement, Seat
from shoal.config import EngineConfig, Transport
from shoal.errors import PeerLost
from shoal.fleet.inbox import Inbox, Silence, error_of
from shoal.fleet.worker_line import WorkerLine
from shoal.messages import Plan, StepResult
from shoal.parallel.control import (
    CacheOpened,
    Failed,
    Form,
    Formed,
    Heard,
    Loaded,
    OpenCache,
    Usage,
)

HEARD_S = 5.0
# More than a worker waits for its neighbours, so that those who wait are not taken for silent.
FORM_S = 25.0


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that holds its shard."""

    line: WorkerLine
    loaded: Loaded


class Crew:
    """`members` are by worker name. One thread uses a crew."""

    def __init__(
        self, placement: ReplicaPlacement, members: Mapping[str, Member], config: EngineConfig
    ) -> None:
        self.placement = placement
        self.members = members
        self._config = config
        self._inbox = Inbox()

    @property
    def stages(self) -> Sequence[Sequence[Seat]]:
        return self.placement.stages

    @property
    def num_blocks(self) -> int:
        """What the least of the workers can hold: all use the same block ids."""
        return min(member.loaded.num_blocks for member in self.members.values())

    def usages(self, epoch: int) -> dict[str, Usage | None]:
        """What each has reported in this epoch."""
        found = {worker: member.line.usage for worker, member in self.members.items()}
        return {
            worker: usage if usage is not None and usage.epoch == epoch else None
            for worker, usage in found.items()
        }

    def open_caches(self, workers: Collection[str]) -> None:
        """Have workers take the memory they need, so that forming takes no time."""
        for worker in workers:
            line = self.members[worker].line
            line.inbox = self._inbox
            line.send(OpenCache(num_blocks=self.num_blocks))
        self._inbox.replies(CacheOpened, workers, timeout_s=FORM_S)

    def form(self, epoch: int) -> None:
        """Connect all workers for an epoch. Raises PeerLost, and what a worker reports."""
        for worker, member in self.members.items():
            member.line.inbox = self._inbox
            if member.line.is_lost:
                raise PeerLost(f"worker {worker} is lost")
        session = secrets.token_hex(8)
        for index, stage in enumerate(self.stages):
            for rank, seat in enumerate(stage):
                form = self._form(epoch, index, rank, session=f"{session}-{index}")
                self.members[seat.worker].line.send(form)
        self._await_formed(epoch)

    def _await_formed(self, epoch: int) -> None:
        """Who does not even hear the order is frozen or out of reach, and counts as lost."""
        started_s = time.monotonic()
        silent, unformed = set(self.members), set(self.members)
        while unformed:
            deadline_s = started_s + (HEARD_S if silent else FORM_S)
            try:
                worker, message = self._inbox.next(silent or unformed, deadline_s)
            except Silence:
                for each in silent or unformed:
                    self.members[each].line.is_lost = True
                raise
            if isinstance(message, Failed) and message.epoch == epoch:
                raise error_of(worker, message)
            if isinstance(message, Heard | Formed) and message.epoch == epoch:
                silent.discard(worker)
                if isinstance(message, Formed):
                    unformed.discard(worker)

    def broadcast(self, plan: Plan) -> None:
        """Raises PeerLost."""
        encoded = msgspec.msgpack.encode(plan)
        for member in self.members.values():
            member.line.send_encoded(encoded)

    def next_result(self, epoch: int, timeout_s: float) -> StepResult:
        """Raises PeerLost for a worker that is gone, and what a worker reports as failed."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            worker, message = self._inbox.next(self.members.keys(), deadline_s)
            if isinstance(message, StepResult) and message.epoch == epoch:
                return message
            if isinstance(message, Failed) and message.epoch == epoch:
                raise error_of(worker, message)

    def _form(self, epoch: int, index: int, rank: int, *, session: str) -> Form:
        stage = self.stages[index]
        return Form(
            epoch=epoch,
            num_blocks=self.num_blocks,
            ranks=[self._address(seat) for seat in stage],
            next_stage=self._served_by(index, rank),
            previous_rank=rank % len(self.stages[index - 1]) if index else None,
            transport=transport_of(stage, self._config),
            wire_format=self._config.split.wire_format,
            session=session,
        )

    def _served_by(self, index: int, rank: int) -> list[str]:
        """The addresses of the next stage's workers that this rank sends hidden states to."""
        if index + 1 == len(self.stages):
            return []
        num_ranks = len(self.stages[index])
        following = enumerate(self.stages[index + 1])
        return [self._address(seat) for other, seat in following if other % num_ranks == rank]

    def _address(self, seat: Seat) -> str:
        return self.members[seat.worker].line.address


def transport_of(stage: Sequence[Seat], config: EngineConfig) -> Transport:
    """Shared memory where all ranks are on one node, sockets between nodes."""
    if config.split.transport != "auto":
        return config.split.transport
    return "shared-memory" if len({seat.node for seat in stage}) == 1 else "sockets"
