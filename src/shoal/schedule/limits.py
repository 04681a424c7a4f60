"""Which requests can be served at all, and how long those turned away should wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from shoal.errors import ContextTooLong, InvalidRequest, QueueFull
from shoal.request import Request

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a scheduler was given to work with."""

    num_blocks: int
    block_size: int
    max_context: int
    max_step_tokens: int
    max_running: int
    max_waiting: int
    max_in_flight: int
    max_drafted: int = 0
    """Tokens guessed at most for a request in a step."""

    @property
    def cache_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def fits(self, request: Request) -> bool:
        """Whether there is room for prompt and answer, with nothing else running."""
        num_answer = 0 if request.pooling else request.max_tokens
        room = min(self.max_context, self.cache_tokens)
        return len(request.prompt_tokens) + num_answer <= room

    def check(self, request: Request) -> None:
        """Raise InvalidRequest or ContextTooLong for what could never run."""
        num_prompt = len(request.prompt_tokens)
        if num_prompt == 0:
            raise InvalidRequest("the prompt is empty: it needs at least one token", param="prompt")
        num_answer = 0 if request.pooling else request.max_tokens
        room, what = min((self.max_context, "context"), (self.cache_tokens, "KV cache"))
        if num_prompt + num_answer > room:
            raise ContextTooLong(
                f"{num_prompt} prompt tokens and max_tokens={num_answer} make "
                f"{num_prompt + num_answer}, more than the {what} of {room} tokens: "
                f"shorten the prompt or lower max_tokens",
                param="max_tokens" if num_prompt < room else "prompt",
                code="context_length_exceeded",
            )
        if not request.splittable and num_prompt > self.max_step_tokens:
            raise ContextTooLong(
                f"{num_prompt} prompt tokens must run in one step, which holds "
                f"{self.max_step_tokens}: shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )

    def check_queue(self, requests: Sequence[Request], num_waiting: int, pace: Pace) -> None:
        """Raise QueueFull when these do not fit behind those waiting."""
        if len(requests) > self.max_waiting:
            raise InvalidRequest(
                f"{len(requests)} samples can never queue here: at most {self.max_waiting}",
                param="n",
            )
        if num_waiting + len(requests) > self.max_waiting:
            raise QueueFull(
                f"{num_waiting} requests are waiting, at most {self.max_waiting} may: "
                f"try again in {pace.retry_after_s:.0f} s",
                retry_after_s=pace.retry_after_s,
                code="queue_full",
            )


class Pace:
    """How often a place in the queue becomes free, seen over the latest admissions."""

    def __init__(self, num_samples: int = 32) -> None:
        self._admitted_s: deque[float] = deque(maxlen=num_samples)

    def note_admission(self, now_s: float) -> None:
        self._admitted_s.append(now_s)

    @property
    def retry_after_s(self) -> float:
        times = self._admitted_s
        interval_s = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        return min(max(interval_s, MIN_RETRY_S), MAX_RETRY_S)
