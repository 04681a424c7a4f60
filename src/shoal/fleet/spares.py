"""Workers that stand by for lost ones, with the shards read that they may have to take over."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set

from shoal.cluster.placement import Seat
from shoal.config import EngineConfig
from shoal.errors import PeerLost, ShoalError
from shoal.fleet.inbox import Inbox, Lost
from shoal.fleet.launcher import Launcher
from shoal.fleet.reception import Reception
from shoal.fleet.worker_line import WorkerLine
from shoal.parallel.control import Prepare, Prepared
from shoal.parallel.partition import Shard

log = logging.getLogger(__name__)

_CALL_S = 60.0
_PREPARE_S = 600.0
# Whoever recovers needs the cores more than the next spare does.
_REST_S = 2.0
_LOOK_S = 0.5
_LONGEST_PAUSE_S = 30.0

Wanted = Callable[[], Sequence[Seat]]
"""All seats of all replicas: what spares may be needed for."""

Nodes = Callable[[], Sequence[str]]
"""Where they can run, best first."""


class _Spare:
    def __init__(self, node: str, line: WorkerLine) -> None:
        self.node = node
        self.line = line
        self.shards = set(line.shards)
        self.refused: set[Shard] = set()
        """Those that it could not read, for lack of memory as a rule: it is not asked again."""


class SparePool:
    """Keeps `config.spares` of them alive in a thread of its own, once started, until closed.

    Those who lost their head may be adopted; they are the first to be taken.
    """

    def __init__(
        self,
        launcher: Launcher,
        reception: Reception,
        config: EngineConfig,
        *,
        path_on: Callable[[str], str],
        numbers: Iterator[int],
    ) -> None:
        self._launcher = launcher
        self._reception = reception
        self._config = config
        self._path_on = path_on
        self._numbers = numbers
        self._spares: list[_Spare] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._taken_s = 0.0
        self._calls = Inbox()
        """Where the spare that is awaited would call."""
        self._thread: threading.Thread | None = None

    def start(self, wanted: Wanted, nodes: Nodes) -> None:
        self._thread = threading.Thread(
            target=self._keep_up, args=(wanted, nodes), name="shoal-spares", daemon=True
        )
        if self._config.spares:
            self._thread.start()

    def adopt(self, line: WorkerLine, node: str) -> None:
        """A worker that was started by an earlier head, on that node."""
        self._launcher.adopt(line.process, node, line.pid)
        with self._lock:
            self._spares.append(_Spare(node, line))

    def take(self, seat: Seat) -> WorkerLine | None:
        """One on the seat's node, best one that has read its shard; None if there is none."""
        with self._lock:
            there = [s for s in self._spares if s.node == seat.node and not s.line.is_lost]
            if not there:
                return None
            spare = max(there, key=lambda each: seat.shard in each.shards)
            self._spares.remove(spare)
            self._taken_s = time.monotonic()
        return spare.line

    def nodes(self) -> list[str]:
        """Those with a spare that has read something."""
        with self._lock:
            return [s.node for s in self._spares if s.shards and not s.line.is_lost]

    def reduce(self, number: int) -> None:
        """Dismiss those beyond so many."""
        with self._lock:
            excess, self._spares = self._spares[number:], self._spares[:number]
        for spare in excess:
            self._dismiss(spare)

    def close(self) -> None:
        self._closed.set()
        self._calls.put("", Lost("spares are not wanted any more"))
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()
        self.reduce(0)

    # ---- the thread that keeps up their number --------------------------------------------

    def _keep_up(self, wanted: Wanted, nodes: Nodes) -> None:
        pause_s = _LOOK_S
        while not self._closed.wait(pause_s):
            if time.monotonic() - self._taken_s < _REST_S:
                continue
            try:
                self._look(wanted(), nodes())
                pause_s = _LOOK_S
            except ShoalError as error:
                if not self._closed.is_set():
                    log.warning("no spare can be had now: %s", error)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _look(self, seats: Sequence[Seat], nodes: Sequence[str]) -> None:
        for spare in self._sort_out(nodes):
            self._dismiss(spare)
        with self._lock:
            number = len(self._spares)
            held = Counter(spare.node for spare in self._spares)
        if number < self._config.spares and nodes:
            node = min(nodes, key=lambda name: (held[name], nodes.index(name)))
            spare = self._recruit(node)
            with self._lock:
                self._spares.append(spare)
        self._prepare({seat.shard for seat in seats})

    def _sort_out(self, nodes: Sequence[str]) -> list[_Spare]:
        """Those that are dead, or on a node that is not to be used any more."""
        with self._lock:
            useless = [s for s in self._spares if s.line.is_lost or s.node not in nodes]
            self._spares = [spare for spare in self._spares if spare not in useless]
        return useless

    def _recruit(self, node: str) -> _Spare:
        worker = f"spare-{next(self._numbers)}"
        inbox = self._calls = Inbox()
        if self._closed.is_set():
            raise PeerLost("spares are not wanted any more")
        self._reception.expect(worker, inbox)
        try:
            self._launcher.start_spare(worker, node)
            deadline_s = time.monotonic() + _CALL_S
            return _Spare(node, self._reception.wait_for(worker, inbox, deadline_s=deadline_s))
        except BaseException:
            self._reception.forget(worker)
            self._launcher.stop(worker)
            raise

    def _prepare(self, shards: Set[Shard]) -> None:
        """One shard at a time, so that a spare can be taken in between."""
        with self._lock:
            lacking = [
                (spare, shard)
                for spare in self._spares
                for shard in sorted(shards - spare.shards - spare.refused, key=_order)
            ]
        for spare, shard in lacking:
            if self._closed.is_set() or not self._prepare_one(spare, shard):
                return

    def _prepare_one(self, spare: _Spare, shard: Shard) -> bool:
        """False if it was taken away meanwhile, or has gone."""
        inbox = Inbox()
        with self._lock:
            if spare not in self._spares:
                return False
            spare.line.report_to(inbox)
        order = Prepare(config=self._config, path=self._path_on(spare.node), shard=shard)
        try:
            spare.line.send(order)
            # A worker that is taken reports elsewhere: then nothing comes here any more.
            deadline_s = time.monotonic() + _PREPARE_S
            while not self._closed.is_set() and time.monotonic() < deadline_s:
                taken = inbox.take(_LOOK_S)
                if taken is not None:
                    return self._note_prepared(spare, shard, taken[1])
                with self._lock:
                    if spare not in self._spares:
                        return False
        except PeerLost as error:
            log.info("%s is lost: %s", spare.line.worker, error)
        return False

    def _note_prepared(self, spare: _Spare, shard: Shard, answer: object) -> bool:
        if isinstance(answer, Prepared) and answer.held:
            spare.shards.add(shard)
            return True
        # It is of use all the same: its process is there.
        spare.refused.add(shard)
        why = answer.reason if isinstance(answer, Prepared) else answer
        log.info("%s has not read a shard ahead: %s", spare.line.worker, why)
        return False

    def _dismiss(self, spare: _Spare) -> None:
        spare.line.dismiss()
        self._launcher.stop(spare.line.process)


def _order(shard: Shard) -> tuple[int, int]:
    return shard.layers.start, shard.rank
