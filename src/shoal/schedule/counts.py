"""What a scheduler has done and holds, for metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from shoal.messages import Chunk, Event
from shoal.schedule.blocks import BlockPool


class SchedulerCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges of now, then counters since the start. Names as in `EngineStats`."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_used_blocks: int
    num_cached_blocks: int
    prompt_tokens: int
    prefix_hit_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int


@dataclass(slots=True)
class Tally:
    """The counters behind `SchedulerCounts`. A request's prompt counts once, when it first runs."""

    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: Counter[str] = field(default_factory=Counter)

    def add(self, chunk: Chunk, events: Sequence[Event]) -> None:
        """What a chunk has led to."""
        num_drawn = sum(event.token_id is not None for event in events)
        self.generated_tokens += num_drawn
        if chunk.num_drafted:
            self.drafted_tokens += chunk.num_drafted
            self.accepted_tokens += num_drawn - 1

    def counts(self, num_waiting: int, num_running: int, pool: BlockPool) -> SchedulerCounts:
        return SchedulerCounts(
            num_waiting=num_waiting,
            num_running=num_running,
            num_blocks=pool.num_blocks,
            num_used_blocks=pool.num_used,
            num_cached_blocks=pool.num_cached,
            prompt_tokens=self.prompt_tokens,
            prefix_hit_tokens=self.prefix_hit_tokens,
            generated_tokens=self.generated_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            preemptions=self.preemptions.total(),
        )
