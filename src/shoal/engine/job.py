"""What the engine keeps of a submitted request until its last sample has ended."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from shoal.engine.api import Delta
from shoal.engine.detokenizer import Detokenizer
from shoal.errors import ShoalError
from shoal.messages import Event
from shoal.request import FinishReason, Request

Item = Delta | list[float] | ShoalError | None
"""What reaches the submitter: deltas or an embedding, then None; or an error and nothing more."""

Deliver = Callable[[Item], None]


class JobHolder(Protocol):
    def cancel(self, job: Job) -> None: ...


@dataclass(slots=True, eq=False)
class Job:
    """A submitted request: where its results go, who has it, which of its samples are open."""

    deliver: Deliver
    holder: JobHolder
    open_ids: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Sample:
    """One of a job's sequences."""

    job: Job
    index: int
    request: Request
    detokenizer: Detokenizer
    num_tokens: int = 0

    def resume(self) -> Delta | None:
        """Read again what was emitted in an earlier life; the end, if that had come already."""
        for token_id in self.request.emitted_tokens:
            self.num_tokens += 1
            if self._ends_with(token_id):
                return self._ending(FinishReason.STOP, token_id)
            self._push(token_id)
            if self.detokenizer.stop_match is not None:
                return self._ending(FinishReason.STOP, None)
        if self.num_tokens and self.num_tokens >= self.request.max_tokens:
            return self._ending(FinishReason.LENGTH, None)
        return None

    def delta(self, event: Event) -> Delta:
        """The client's view of an event. Its `finish_reason` may be a stop string's, which the
        scheduler does not know of yet."""
        assert event.token_id is not None
        self.num_tokens += 1
        is_stop_token = (
            event.finish_reason is FinishReason.STOP and event.token_id in self.request.stop_ids
        )
        text = "" if is_stop_token else self._push(event.token_id)
        if event.finish_reason is not None:
            text += self.detokenizer.flush()
        stop_match = self._stop_match(event.token_id if is_stop_token else None)
        return Delta(
            index=self.index,
            text=text,
            token_ids=[event.token_id],
            logprobs=None if event.logprobs is None else [event.logprobs],
            finish_reason=event.finish_reason if stop_match is None else FinishReason.STOP,
            stop_match=stop_match,
            prompt_logprobs=event.prompt_logprobs,
            num_cached_tokens=event.num_cached_tokens if self._is_first else 0,
        )

    @property
    def _is_first(self) -> bool:
        """Whether the token just counted is the first of the job's first sample."""
        return self.index == 0 and self.num_tokens == 1

    def _ends_with(self, token_id: int) -> bool:
        return (
            token_id in self.request.stop_ids and self.num_tokens > self.request.params.min_tokens
        )

    def _ending(self, reason: FinishReason, stop_token: int | None) -> Delta:
        return Delta(
            index=self.index,
            text=self.detokenizer.flush(),
            finish_reason=reason,
            stop_match=self._stop_match(stop_token),
        )

    def _push(self, token_id: int) -> str:
        may_stop = self.num_tokens > self.request.params.min_tokens
        return self.detokenizer.push(token_id, may_stop=may_stop)

    def _stop_match(self, stop_token: int | None) -> str | int | None:
        if self.detokenizer.stop_match is not None:
            return self.detokenizer.stop_match
        return stop_token if stop_token in self.request.params.stop_token_ids else None


def unit_mean(pooled: bytes) -> list[float]:
    """The mean of the states whose float32 sum is given, scaled to length 1."""
    sums = array("f", pooled)
    norm = sum(value * value for value in sums) ** 0.5 or 1.0
    return [value / norm for value in sums]
