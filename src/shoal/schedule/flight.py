"""A plan in the making, then an outstanding one: who takes part with which chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal.messages import Chunk
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
