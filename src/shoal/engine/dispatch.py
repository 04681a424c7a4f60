"""Which replica has which request, and which replicas get new ones; safe from any thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from shoal.cluster.circuit import Circuit
from shoal.cluster.router import Router, Ticket
from shoal.engine.job import Job
from shoal.errors import CallerError, ShoalError

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Place:
    """An open request's, at one replica after another. `job` is None until it has been taken."""

    ticket: Ticket
    prompt_tokens: list[int]
    job: Job | None = None
    num_moves: int = 0

    @property
    def replica(self) -> str:
        return self.ticket.replica


class Dispatch:
    """A replica gets new requests while nobody withholds them and its circuit allows it.

    `router` must be new; it is used here only. `clock` gives seconds that never go back.
    """

    def __init__(self, router: Router, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._router = router
        self._clock = clock
        # For bookkeeping only. Engines report ends inside their own lock, so no engine is called
        # while this one is held.
        self._lock = threading.Lock()
        self._circuits: dict[str, Circuit] = {}
        self._withheld: set[str] = set()
        self._troubled: set[str] = set()
        self._doubtful: set[str] = set()
        self._places: dict[int, Place] = {}

    def join(self, replica: str, *, cache_blocks: int) -> None:
        with self._lock:
            self._router.join(replica, cache_blocks=cache_blocks)
            self._circuits[replica] = Circuit()

    def start(
        self, prompt_tokens: list[int], *, weight: int, besides: Collection[str]
    ) -> Place | None:
        """A place at a replica that gets new requests; None if there is no such replica.

        If that is because all wait for workers, the request may wait there too.
        """
        with self._lock:
            self._refresh()
            ticket = self._router.start(prompt_tokens, weight=weight, besides=besides)
            if ticket is None:
                patient = self._patient - set(besides)
                if not patient:
                    return None
                ticket = self._router.start_among(patient, prompt_tokens, weight=weight)
            self._start_at(ticket.replica)
            place = Place(ticket, prompt_tokens)
            self._places[id(place)] = place
            return place

    def end(self, place: Place, error: ShoalError | None, answered: bool) -> None:
        """`answered`: whether there was a token, or an embedding."""
        with self._lock:
            self._leave(place)
            circuit, now_s = self._circuits[place.replica], self._clock()
            before = circuit.state
            if error is not None and not isinstance(error, CallerError):
                circuit.failed(now_s)
            elif answered:
                circuit.succeeded(now_s)
            else:
                circuit.withdrawn(now_s)
            self._settle(place.replica)
        if circuit.state == "open" != before:
            log.error("%s gets no new requests for a while: %s", place.replica, error)

    def pass_over(self, place: Place) -> None:
        """Refused for a reason that says nothing about the replica: it is full."""
        self.end(place, None, answered=False)

    def refused(self, place: Place, error: ShoalError) -> None:
        """The replica refuses everybody."""
        with self._lock:
            self._leave(place)
            self._circuits[place.replica].trip(self._clock())
            self._settle(place.replica)
        log.error("%s gets no new requests for a while: %s", place.replica, error)

    def move(self, place: Place, besides: Collection[str]) -> Ticket | None:
        """A place for it at the least loaded of the other replicas, if any gets requests."""
        with self._lock:
            self._refresh()
            weight = place.ticket.weight
            return self._router.start(place.prompt_tokens, weight=weight, besides=besides)

    def moved(self, place: Place, to: Ticket) -> None:
        with self._lock:
            self._router.finish(place.ticket)
            self._start_at(to.replica)
            place.ticket = to
            place.num_moves += 1

    def not_moved(self, to: Ticket) -> None:
        with self._lock:
            self._router.finish(to)

    def withhold(self, replica: str, is_withheld: bool) -> None:
        with self._lock:
            (self._withheld.add if is_withheld else self._withheld.discard)(replica)
            self._settle(replica)

    def in_trouble(self, replica: str) -> None:
        """It waits for workers: nothing new for it until it is well."""
        with self._lock:
            if replica not in self._troubled:
                self._troubled.add(replica)
                self._circuits[replica].trip(self._clock())
                self._settle(replica)

    def well(self, replicas: Iterable[str]) -> None:
        """They have workers again."""
        with self._lock:
            for replica in self._troubled.intersection(replicas):
                self._troubled.remove(replica)
                self._circuits[replica].reset()
                self._settle(replica)

    @property
    def troubled(self) -> list[str]:
        return sorted(self._troubled)

    @property
    def takers(self) -> list[str]:
        """Those that get new requests, or else those that let them wait for workers."""
        with self._lock:
            self._refresh()
            return self._router.available or sorted(self._patient)

    @property
    def loads(self) -> dict[str, int]:
        with self._lock:
            return self._router.loads

    def at(self, replica: str) -> list[Place]:
        """The requests that a replica has, oldest first."""
        with self._lock:
            return [place for place in self._places.values() if place.replica == replica]

    @property
    def _patient(self) -> set[str]:
        return self._troubled - self._withheld

    def _start_at(self, replica: str) -> None:
        self._circuits[replica].started(self._clock())
        self._settle(replica)

    def _refresh(self) -> None:
        for replica in list(self._doubtful):
            self._settle(replica)

    def _settle(self, replica: str) -> None:
        """Who is above all doubt is not looked at again: there may be hundreds."""
        circuit, troubled = self._circuits[replica], replica in self._troubled
        allows = circuit.allows(self._clock()) and not troubled
        self._router.set_available(replica, allows and replica not in self._withheld)
        is_doubtful = troubled or circuit.state != "closed"
        (self._doubtful.add if is_doubtful else self._doubtful.discard)(replica)

    def _leave(self, place: Place) -> None:
        self._router.finish(place.ticket)
        del self._places[id(place)]
