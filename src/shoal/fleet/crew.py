"""The workers of one replica: who sits where, and what their lines say."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import structs

from shoal.cluster.placement import ReplicaPlacement, Seat
from shoal.cluster.supervisor import Dismiss, Form, Instruction, Load, Replan, Start, Supervisor
from shoal.config import EngineConfig
from shoal.engine.recovery import Phase
from shoal.errors import InternalError, PeerLost, PeerRefused, ShoalError
from shoal.fleet.cache_keeper import CacheKeeper, FormedCache
from shoal.fleet.inbox import Called, Inbox, Item, Lost, Silence, error_of, loss_of
from shoal.fleet.muster import Muster
from shoal.fleet.transport import transport_of
from shoal.fleet.worker_line import WorkerLine
from shoal.messages import Plan, StepResult
from shoal.parallel import control
from shoal.parallel.control import CacheOpened, Failed, Formed, Loaded, OpenCache, Usage

log = logging.getLogger(__name__)

_LOOK_S = 0.25
_OPEN_S = 60.0

Elsewhere = Callable[[ReplicaPlacement, frozenset[str]], ReplicaPlacement]
"""Where a replica goes, if possible without some nodes. Raises PlacementError."""


class Witness(Protocol):
    """Hears of all that is done to get the workers together: see `engine.recovery.Recovery`."""

    def meanwhile(self) -> None:
        """Called every quarter of a second or more often. Raises to end the work."""
        ...

    def note_loss(self, worker: str, reason: str, noticed_by: str, silence_s: float) -> None: ...

    def note_trouble(self, error: ShoalError) -> None: ...

    def note_decision(self, what: str) -> None: ...

    def enter(self, phase: Phase) -> None: ...


class FirstTrouble:
    """A Witness for whom nothing may go wrong: the first error is raised.

    `check` is called all the time, and raises when the workers are not wanted any more.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check

    def meanwhile(self) -> None:
        self._check()

    def note_loss(self, worker: str, reason: str, noticed_by: str, silence_s: float) -> None:
        del noticed_by, silence_s
        raise PeerLost(f"worker {worker} is lost: {reason}")

    def note_trouble(self, error: ShoalError) -> None:
        raise error

    def note_decision(self, what: str) -> None:
        log.info("%s", what)

    def enter(self, phase: Phase) -> None:
        pass


@dataclass(slots=True)
class Member:
    """A worker in a seat; `loaded` is None until it holds its shard."""

    line: WorkerLine
    loaded: Loaded | None = None
    formed: Formed | None = None


class Crew:
    """`members` are by worker name. One thread uses a crew, but for `is_broken` and `usages`."""

    def __init__(
        self,
        placement: ReplicaPlacement,
        muster: Muster,
        config: EngineConfig,
        *,
        elsewhere: Elsewhere,
    ) -> None:
        self.members: dict[str, Member] = {}
        self.on_trouble: Callable[[], None] = lambda: None
        self._supervisor = Supervisor(placement, numbers=muster.numbers, home=muster.home)
        self._muster = muster
        self._config = config
        self._elsewhere = elsewhere
        self._inbox = Inbox()
        self._keeper = CacheKeeper()
        self.are_caches_kept = False
        """Whether the last formation found them as the one before had left them."""
        self._awaited: set[str] = set()
        """Those that were started and have not called."""
        self._losses: list[tuple[str, Lost]] = []
        """Those that came to light in a step, not told to any witness yet."""

    @property
    def placement(self) -> ReplicaPlacement:
        return self._supervisor.placement

    @property
    def stages(self) -> Sequence[Sequence[Seat]]:
        return self.placement.stages

    @property
    def is_broken(self) -> bool:
        """Somebody is lost, or not everybody has formed."""
        lines = [member.line for member in list(self.members.values())]
        return not self._supervisor.is_formed or any(line.is_lost for line in lines)

    @property
    def num_blocks(self) -> int:
        """What the least of the workers can hold: all use the same block ids."""
        return min(loaded.num_blocks for loaded in self._loaded())

    @property
    def description(self) -> Loaded:
        """What the first to have loaded says; the same from all."""
        return self._loaded()[0]

    def usages(self, epoch: int) -> dict[str, Usage | None]:
        """What each has reported in this epoch."""
        found = {worker: each.line.usage for worker, each in list(self.members.items())}
        return {
            worker: usage if usage is not None and usage.epoch == epoch else None
            for worker, usage in found.items()
        }

    def pids(self) -> dict[str, int]:
        return {worker: member.line.pid for worker, member in list(self.members.items())}

    # ---- getting together -----------------------------------------------------------------

    def man(self, witness: Witness) -> None:
        """Have a worker in every seat that holds its shard, with memory for its cache taken."""
        self._work_until(lambda: self._supervisor.is_manned, witness)
        for member in self.members.values():
            member.line.send(OpenCache(num_blocks=self.num_blocks))
        self._inbox.replies(CacheOpened, self.members.keys(), timeout_s=_OPEN_S)

    def form(
        self, epoch: int, witness: Witness, *, is_superseded: Callable[[], bool] = lambda: False
    ) -> int:
        """Connect all workers, with those replaced that are lost, unless others are to serve.

        Returns the epoch: at least `epoch`. Raises what the witness raises.
        """
        losses, self._losses = self._losses, []
        for worker, lost in losses:
            witness.note_loss(worker, lost.reason, lost.noticed_by, lost.silence_s)
        self._supervisor.begin(time.monotonic(), epoch=epoch)
        self._work_until(lambda: self._supervisor.is_formed or is_superseded(), witness)
        if self._supervisor.is_formed:
            caches = [self._formed_cache(seat) for seat in self.placement.seats]
            self.are_caches_kept = self._keeper.note(caches, self.num_blocks)
        return self._supervisor.epoch

    def dismiss(self) -> None:
        """All of them, those too that have lost their seat and those that are on their way."""
        for worker in list(self.members):
            self._muster.dismiss(self.members.pop(worker).line)
        while self._awaited:
            self._muster.give_up(self._awaited.pop())
        self._keeper.close()

    def _work_until(self, is_done: Callable[[], bool], witness: Witness) -> None:
        while not is_done():
            self._enter_phase(witness)
            for instruction in self._supervisor.next(time.monotonic()):
                self._carry_out(instruction, witness)
            taken = self._inbox.take(self._patience_s())
            if taken is not None:
                self._take_in(*taken, witness)
            witness.meanwhile()

    def _patience_s(self) -> float:
        wake_s = self._supervisor.wake_s()
        return _LOOK_S if wake_s is None else min(_LOOK_S, wake_s - time.monotonic())

    def _enter_phase(self, witness: Witness) -> None:
        if self._supervisor.is_manned:
            witness.enter("form")
        else:
            witness.enter("start" if self._supervisor.num_called_for else "load")

    # ---- what the supervisor wants --------------------------------------------------------

    def _carry_out(self, instruction: Instruction, witness: Witness) -> None:
        match instruction:
            case Start(seat=seat):
                self._start(seat, witness)
            case Load(seat=seat):
                self._load(seat)
            case Form(epoch=epoch):
                self._send_forms(epoch)
            case Dismiss(worker=worker):
                self._drop(worker)
            case Replan(without=without):
                self._replan(without, witness)

    def _start(self, seat: Seat, witness: Witness) -> None:
        self._awaited.add(seat.worker)
        try:
            witness.note_decision(self._muster.fill(seat, self._inbox))
        except Exception as error:  # whatever it is: others may be had, or the same later
            self._supervisor.gone(seat.node, time.monotonic())
            witness.note_trouble(_known(error))

    def _load(self, seat: Seat) -> None:
        member = self.members[seat.worker]
        member.formed = None
        num_blocks = min((each.num_blocks for each in self._loaded()), default=None)
        member.loaded = None
        load = self._muster.load(seat, member.line, num_blocks=num_blocks)
        index = self.placement.seats.index(seat)
        cache = self._keeper.offer(index, seat.shard, num_blocks, pid=member.line.pid)
        self._send(seat.worker, structs.replace(load, cache=cache))

    def _replan(self, without: frozenset[str], witness: Witness) -> None:
        try:
            placement = self._elsewhere(self.placement, without)
        except Exception as error:  # the next look may find other nodes
            self._supervisor.unplaceable(time.monotonic())
            witness.note_trouble(_known(error))
            return
        nodes = " + ".join("/".join(seat.node for seat in stage) for stage in placement.stages)
        witness.note_decision(f"the replica goes to {nodes}")
        self._supervisor.placed(placement, time.monotonic())

    def _send_forms(self, epoch: int) -> None:
        session = secrets.token_hex(8)
        for index, stage in enumerate(self.stages):
            for rank, seat in enumerate(stage):
                self._send(
                    seat.worker, self._form(epoch, index, rank, session=f"{session}-{index}")
                )

    def _send(self, worker: str, message: control.Load | control.Form) -> None:
        with suppress(PeerLost):  # of which the line has told the inbox
            self.members[worker].line.send(message)

    def _drop(self, worker: str) -> None:
        if worker in self.members:
            self._muster.dismiss_aside([self.members.pop(worker).line])
        elif worker in self._awaited:
            self._awaited.remove(worker)
            self._muster.give_up(worker)

    # ---- what happens ---------------------------------------------------------------------

    def _take_in(self, worker: str, item: Item, witness: Witness) -> None:
        """Tell the supervisor; strangers, who were dropped before, are not listened to."""
        now_s = time.monotonic()
        match item:
            case Called():
                self._welcome(worker, witness)
            case Lost():
                self._note_loss(worker, item, witness)
            case Loaded() if worker in self.members:
                self.members[worker].loaded = item
                self._supervisor.loaded(worker)
            case Formed():
                if worker in self.members:
                    self.members[worker].formed = item
                self._supervisor.formed(worker, item.epoch)
            case Failed() if worker in self.members:
                self._note_failure(worker, item, now_s, witness)
            case _:
                pass  # of an epoch that is over

    def _welcome(self, worker: str, witness: Witness) -> None:
        if worker not in self._awaited:
            return  # it has been given up meanwhile
        seat = next((seat for seat in self.placement.seats if seat.worker == worker), None)
        if seat is None:
            self._drop(worker)
            return
        try:
            line = self._muster.welcome(seat)
        except PeerRefused as error:
            self._supervisor.failed(worker, time.monotonic())
            witness.note_trouble(error)
            return
        self._awaited.remove(worker)
        self.members[worker] = Member(line)
        line.report_to(self._inbox, lambda: self.on_trouble())
        self._supervisor.called(worker, time.monotonic(), epoch=line.epoch)

    def _note_loss(self, worker: str, lost: Lost, witness: Witness) -> None:
        if self._bury(worker, lost):
            witness.note_loss(worker, lost.reason, lost.noticed_by, lost.silence_s)

    def _bury(self, worker: str, lost: Lost) -> bool:
        """False if it was dropped before."""
        if worker not in self.members and worker not in self._awaited:
            return False
        silent = lost.noticed_by == "heartbeat"
        self._supervisor.lost(worker, time.monotonic(), silent=silent)
        self._drop(worker)
        return True

    def _note_failure(self, worker: str, failed: Failed, now_s: float, witness: Witness) -> None:
        if failed.step is not None:
            return  # of an epoch that is over
        if self.members[worker].loaded is None:
            self._supervisor.failed(worker, now_s)
        else:
            other = self._worker_at(failed.unreachable)
            self._supervisor.not_formed(worker, failed.epoch, now_s, unreachable=other)
        witness.note_trouble(error_of(worker, failed))

    # ---- steps ----------------------------------------------------------------------------

    def broadcast(self, plan: Plan) -> None:
        """Raises PeerLost."""
        encoded = msgspec.msgpack.encode(plan)
        for member in list(self.members.values()):
            member.line.send_encoded(encoded)

    def next_result(self, epoch: int, timeout_s: float) -> StepResult:
        """Raises PeerLost for a worker that is gone, and what a worker reports as failed."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            taken = self._inbox.take(deadline_s - time.monotonic())
            if taken is None:
                raise Silence(f"no step has finished within {timeout_s:.0f} s")
            worker, item = taken
            if isinstance(item, StepResult) and item.epoch == epoch:
                self._supervisor.worked()
                return item
            if isinstance(item, Failed) and item.epoch == epoch and worker in self.members:
                raise error_of(worker, item)
            if isinstance(item, Lost) and self._bury(worker, item):
                self._losses.append((worker, item))
                raise loss_of(worker, item)

    def _loaded(self) -> list[Loaded]:
        return [each.loaded for each in list(self.members.values()) if each.loaded is not None]

    # ---- who is connected with whom -------------------------------------------------------

    def _form(self, epoch: int, index: int, rank: int, *, session: str) -> control.Form:
        stage = self.stages[index]
        return control.Form(
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

    def _worker_at(self, address: str) -> str | None:
        return next((w for w, each in self.members.items() if each.line.address == address), None)

    def _formed_cache(self, seat: Seat) -> FormedCache:
        member = self.members[seat.worker]
        formed = member.formed
        assert formed is not None, f"{seat.worker} has not formed"
        pid = member.line.pid if seat.node in self._muster.home else None
        return FormedCache.of(seat.shard, formed, pid)

    def _address(self, seat: Seat) -> str:
        return self.members[seat.worker].line.address


def _known(error: Exception) -> ShoalError:
    if isinstance(error, ShoalError):
        return error
    log.exception("an error that nobody has foreseen", exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}")
