"""Gets workers together: starts processes or takes spares, and says what each is to hold."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import msgspec

from shoal.cluster.placement import ReplicaPlacement, Seat
from shoal.config import EngineConfig
from shoal.errors import PeerRefused, PlacementError
from shoal.fleet.inbox import Called, Inbox
from shoal.fleet.launcher import Launcher
from shoal.fleet.reception import Reception
from shoal.fleet.spares import SparePool
from shoal.fleet.worker_line import WorkerLine
from shoal.parallel.control import Load
from shoal.parallel.endpoint import UNNAMED_PEERS
from shoal.weights.cache import Progress, silent

log = logging.getLogger(__name__)

# Workers call the address of their head four times a second: who has not come by then has gone.
_COME_BACK_S = 1.0
_LOOK_S = 0.05


class NodeShare(msgspec.Struct, frozen=True, kw_only=True):
    """What each worker of a node gets: threads, and its part of the `cache_units` of all of them.

    `own_cores`: whether no other worker computes on its cores.
    """

    num_threads: int
    cache_units: int
    own_cores: bool


class Muster:
    """`path_on` says where the model lies on a node; "" where it must come from the head.

    `home` are nodes that cannot be out of reach, because they are this machine. All replicas
    share `spares` and `numbers`, which make names that are used only once.
    """

    def __init__(
        self,
        launcher: Launcher,
        reception: Reception,
        config: EngineConfig,
        *,
        path_on: Callable[[str], str],
        home: Iterable[str] = (),
        first_number: int = 1,
        report: Progress = silent,
    ) -> None:
        self.home = frozenset(home)
        self.numbers = itertools.count(first_number)
        self.spares = SparePool(launcher, reception, config, path_on=path_on, numbers=self.numbers)
        self._launcher = launcher
        self._reception = reception
        self._config = config
        self._shares: dict[str, NodeShare] = {}
        self._spares_taken: dict[str, WorkerLine] = {}
        self._path_on = path_on
        self._report = report

    def take_back(self, num_workers: int, node_of: Callable[[WorkerLine], str]) -> int:
        """Have workers that lost their head stand by, `num_workers` if they come. Returns how many
        did."""
        number, deadline_s = 0, time.monotonic() + _COME_BACK_S
        while number < num_workers and time.monotonic() < deadline_s:
            for line in self._reception.strays():
                number += self._adopted(line, node_of(line))
                deadline_s = time.monotonic() + _COME_BACK_S
            time.sleep(_LOOK_S)
        return number

    def _adopted(self, line: WorkerLine, node: str) -> bool:
        try:
            self.spares.adopt(line, node)
        except PlacementError as error:  # it has ended since it called
            log.info("%s", error)
            line.dismiss()
            return False
        return True

    def settle(self) -> None:
        """Everybody who was wanted is there: others that call are told to end."""
        self._reception.turn_away_strays()

    @property
    def control(self) -> str:
        """Where workers and operators call."""
        return self._reception.address

    def share_out(
        self, placements: Iterable[ReplicaPlacement], num_cores: Mapping[str, int]
    ) -> None:
        """Divide every node's cores and memory among its workers; for those that load from now."""
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

    def fill(self, seat: Seat, inbox: Inbox) -> str:
        """Have a worker for a seat: `inbox` hears when it calls. Returns what was done, in words.

        Raises PlacementError if the node is not there.
        """
        line = self.spares.take(seat)
        if line is not None:
            line.worker = seat.worker
            self._spares_taken[seat.worker] = line
            inbox.put(seat.worker, Called())
            return f"{line.process} takes over on {seat.node} as {seat.worker}"
        self._reception.expect(seat.worker, inbox)
        num_threads = self._shares[seat.node].num_threads
        try:
            self._launcher.start(seat.worker, seat.node, num_threads=num_threads)
        except BaseException:
            self._reception.forget(seat.worker)
            raise
        return f"{seat.worker} starts on {seat.node}"

    def welcome(self, seat: Seat) -> WorkerLine:
        """The line of the worker that has called for a seat. Raises PeerRefused."""
        line = self._spares_taken.pop(seat.worker, None) or self._reception.take(seat.worker)
        strangers = line.peers - {seat.node, *UNNAMED_PEERS}
        if strangers:
            self.dismiss(line)
            # A certificate is of a node: no other may take this one's seat.
            raise PeerRefused(
                f"'{strangers.pop()}' called as worker {seat.worker}, which runs on '{seat.node}'"
            )
        line.report = partial(self._note_fetching, seat.node)
        return line

    def load(self, seat: Seat, line: WorkerLine, *, num_blocks: int | None) -> Load:
        """What to tell a worker in that seat. `num_blocks` are those of its replica, if known."""
        share = self._shares[seat.node]
        return Load(
            config=self._config,
            path=self._path_on(seat.node),
            shard=seat.shard,
            memory_share=_cache_units(seat) / share.cache_units,
            own_cores=share.own_cores,
            num_blocks=num_blocks,
            num_threads=share.num_threads,
            cores=self._launcher.place(line.process, share.num_threads),
        )

    def dismiss(self, line: WorkerLine) -> None:
        line.dismiss()
        self._launcher.stop(line.process)

    def dismiss_aside(self, lines: Iterable[WorkerLine]) -> None:
        """Streams need not wait until they have gone."""
        for line in lines:
            thread = threading.Thread(target=self.dismiss, args=[line], name="shoal-dismiss")
            thread.start()

    def give_up(self, worker: str) -> None:
        """One that was started and has not called."""
        self._reception.forget(worker)
        line = self._spares_taken.pop(worker, None)
        if line is not None:
            self.dismiss(line)
        else:
            self._launcher.stop(worker)

    def _note_fetching(
        self, node: str, what: str, done_bytes: int, total_bytes: int | None
    ) -> None:
        self._report(f"{node}: {what}", done_bytes, total_bytes)


def _cache_units(seat: Seat) -> int:
    """What a block of cache takes in this seat, in any unit: all seats hold as many blocks."""
    return len(seat.shard.layers) * len(seat.shard.slice.kv_heads)
