"""A plan in the making, then an outstanding one: who takes part with which chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal.messages import Chunk
from shoal.schedule.limits import Limits
from shoal.schedule.sequence import Sequence, State


@dataclass(slots=True)
class Flight:
    budget_tokens: int
    parts: list[tuple[Sequence, Chunk]] = field(default_factory=list)

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for _, chunk in self.parts]


def check_flights(flights: Iterable[Flight]) -> None:
    """Assert that each sequence's chunks under way follow on what is computed, in order.

    `flights` are those outstanding, oldest first.
    """
    next_start: dict[int, int] = {}
    num_plans: Counter[int] = Counter()
    parts = [part for flight in flights for part in flight.parts]
    for sequence, chunk in parts:
        start = next_start.get(id(sequence), sequence.num_computed)
        in_order = chunk.start == start or sequence.state is State.ENDED
        assert in_order, f"{sequence.request_id} is computed out of order"
        next_start[id(sequence)] = chunk.start + len(chunk.tokens) - chunk.num_drafted
        num_plans[id(sequence)] += 1
        is_last = next_start[id(sequence)] == sequence.num_planned
        assert is_last or chunk.sampling is None, "the next token is not drawn yet"
    for sequence, _ in parts:
        assert next_start[id(sequence)] == sequence.num_planned
        assert num_plans[id(sequence)] == sequence.num_in_flight


def check_sequences(
    running: list[Sequence], waiting: list[Sequence], flights: list[Flight], limits: Limits
) -> list[Sequence]:
    """Assert what must hold for all open sequences; returns those that have ended in a flight."""
    flying = [sequence for flight in flights for sequence, _ in flight.parts]
    ended = {id(sequence): sequence for sequence in flying if sequence.state is State.ENDED}
    assert all(sequence.state is State.RUNNING for sequence in running)
    assert all(sequence.state is State.WAITING for sequence in waiting)
    assert running == sorted(running), "running is out of order"
    assert len(running) <= limits.max_running
    assert len(flights) <= limits.max_in_flight
    check_flights(flights)
    in_flight = {id(sequence) for sequence in running if sequence.in_flight}
    assert in_flight == {id(sequence) for sequence in flying} - ended.keys()
    for sequence in running + waiting:
        sequence.check(limits.block_size)
    return list(ended.values())
