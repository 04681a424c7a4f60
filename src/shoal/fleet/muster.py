"""Gets workers together: starts those of a placement, replaces those that are lost."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import msgspec
from msgspec import structs

from shoal.cluster.placement import ReplicaPlacement, Seat
from shoal.config import EngineConfig
from shoal.errors import PeerLost, PeerRefused
from shoal.fleet.crew import Crew, Member
from shoal.fleet.inbox import Inbox
from shoal.fleet.launcher import Launcher
from shoal.fleet.reception import Reception
from shoal.fleet.worker_line import WorkerLine
from shoal.parallel.control import Load, Loaded
from shoal.parallel.endpoint import UNNAMED_PEERS
from shoal.weights.cache import Progress, silent

_CALL_S = 60.0
_LOAD_S = 3600.0


class NodeShare(msgspec.Struct, frozen=True, kw_only=True):
    """What each worker of a node gets: threads, and its part of the `cache_units` of all of them.

    `own_cores`: whether no other worker computes on its cores.
    """

    num_threads: int
    cache_units: int
    own_cores: bool


class Muster:
    """`path_on` says where the model lies on a node; "" where it must come from the head."""

    def __init__(
        self,
        launcher: Launcher,
        reception: Reception,
        config: EngineConfig,
        *,
        path_on: Callable[[str], str],
        report: Progress = silent,
    ) -> None:
        self._launcher = launcher
        self._reception = reception
        self._config = config
        self._shares: dict[str, NodeShare] = {}
        self._path_on = path_on
        self._report = report
        self._numbers = itertools.count(1)

    @property
    def control(self) -> str:
        """Where workers and operators call."""
        return self._reception.address

    def share_out(
        self, placements: Iterable[ReplicaPlacement], num_cores: Mapping[str, int]
    ) -> None:
        """Divide every node's cores and memory among its workers; for those started from now on."""
        seats = [seat for placement in placements for seat in placement.seats]
        num_workers = Counter(seat.node for seat in seats)
        cache_units: Counter[str] = Counter()
        for seat in seats:
            cache_units[seat.node] += _cache_units(seat)
        # Replicas that are about to leave a node may lose a worker there until they have.
        self._shares = self._shares | {
            node: NodeShare(
                num_threads=max(1, num_cores[node] // number),
                cache_units=cache_units[node],
                own_cores=number <= num_cores[node],
            )
            for node, number in num_workers.items()
        }

    def gather(self, placement: ReplicaPlacement) -> Crew:
        """New workers for every seat, loaded. Raises as `recruit` does."""
        return self._crew(placement, {})

    def mend(self, crew: Crew) -> Crew:
        """The same crew if nobody is lost, else one with new workers in the seats of the lost.

        Raises as `recruit` does.
        """
        kept = {name: each for name, each in crew.members.items() if not each.line.is_lost}
        if len(kept) == len(crew.members):
            return crew
        for worker in crew.members.keys() - kept.keys():
            self._dismiss(worker, crew.members[worker])
        return self._crew(crew.placement, kept)

    def dismiss(self, crew: Crew) -> None:
        for worker, member in crew.members.items():
            self._dismiss(worker, member)

    def _crew(self, placement: ReplicaPlacement, kept: dict[str, Member]) -> Crew:
        named = _with_new_names(placement, kept.keys(), self._numbers)
        missing = [seat for seat in named.seats if seat.worker not in kept]
        recruits = self._recruit(missing)
        crew = Crew(named, kept | recruits, self._config)
        try:
            crew.open_caches(recruits)
        except BaseException:
            for worker, member in recruits.items():
                self._dismiss(worker, member)
            raise
        return crew

    def _recruit(self, seats: Sequence[Seat]) -> dict[str, Member]:
        """Raises PlacementError, PeerLost, and what kept the first worker from loading."""
        lines: dict[str, WorkerLine] = {}
        inbox = Inbox()
        try:
            for seat in seats:
                num_threads = self._shares[seat.node].num_threads
                self._launcher.start(seat.worker, seat.node, num_threads=num_threads)
            deadline_s = time.monotonic() + _CALL_S
            for seat in seats:
                line = self._reception.wait_for(seat.worker, deadline_s=deadline_s)
                lines[seat.worker] = line
                _check_caller(line, seat)
                line.inbox = inbox
                line.report = partial(self._note_fetching, seat.node)
                line.send(self._load(seat))
                if line.is_lost:
                    raise PeerLost(f"worker {seat.worker} is lost before it has loaded")
            replies = inbox.replies(Loaded, lines.keys(), timeout_s=_LOAD_S)
        except BaseException:
            for line in lines.values():
                line.dismiss()
            for seat in seats:
                self._launcher.stop(seat.worker)
            raise
        return {worker: Member(line, replies[worker]) for worker, line in lines.items()}

    def _note_fetching(
        self, node: str, what: str, done_bytes: int, total_bytes: int | None
    ) -> None:
        self._report(f"{node}: {what}", done_bytes, total_bytes)

    def _load(self, seat: Seat) -> Load:
        share = self._shares[seat.node]
        return Load(
            config=self._config,
            path=self._path_on(seat.node),
            shard=seat.shard,
            memory_share=_cache_units(seat) / share.cache_units,
            own_cores=share.own_cores,
        )

    def _dismiss(self, worker: str, member: Member) -> None:
        member.line.dismiss()
        self._launcher.stop(worker)


def _check_caller(line: WorkerLine, seat: Seat) -> None:
    """A certificate is of a node: no other may take this one's seat. Raises PeerRefused."""
    strangers = line.peers - {seat.node, *UNNAMED_PEERS}
    if strangers:
        raise PeerRefused(
            f"'{strangers.pop()}' called as worker {seat.worker}, which runs on '{seat.node}'"
        )


def _cache_units(seat: Seat) -> int:
    """What a block of cache takes in this seat, in any unit: all seats hold as many blocks."""
    return len(seat.shard.layers) * len(seat.shard.slice.kv_heads)


def _with_new_names(
    placement: ReplicaPlacement, kept: Iterable[str], numbers: Iterable[int]
) -> ReplicaPlacement:
    """Seats that are not kept get workers with names that were never used before."""
    known, fresh = set(kept), iter(numbers)

    def renamed(seat: Seat) -> Seat:
        if seat.worker in known:
            return seat
        return structs.replace(seat, worker=f"{seat.worker.partition('-')[0]}-{next(fresh)}")

    return ReplicaPlacement(
        stages=tuple(tuple(renamed(seat) for seat in stage) for stage in placement.stages)
    )
