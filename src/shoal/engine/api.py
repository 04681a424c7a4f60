"""What an engine shows to those above it: the values of its interface."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from shoal.messages import TokenLogprobs
from shoal.request import FinishReason, SamplingParams

if TYPE_CHECKING:
    # It brings torch, which `shoal status` must not wait for.
    from shoal.weights.tokenizer import Tokenizer


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What one step added to one sample.

    `text` may lag behind `token_ids`: characters wait until their bytes are complete and until
    they cannot be the start of a stop string. `logprobs` is parallel to `token_ids`. With a
    `finish_reason`, it is the sample's last. `prompt_logprobs` and `num_cached_tokens` come with
    sample 0's first delta; entry i of `prompt_logprobs` scores prompt token i + 1.
    """

    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`max_context` counts prompt and answer tokens together."""

    name: str
    max_context: int
    vocab_size: int
    can_generate: bool
    created_s: int
    description: str


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True):
    """One seat of a split model; counters since the engine's start.

    `busy_seconds` computing, `waiting_seconds` for the previous stage in the middle of a step,
    `bubble_seconds` not computing while its replica had a plan under way. Bytes and messages are
    those sent to the next stage, and to other ranks of its own.
    """

    worker: str
    node: str
    stage: int
    rank: int
    layers: tuple[int, int]
    pid: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    waiting_seconds: float = 0.0
    bubble_seconds: float = 0.0
    stage_bytes: int = 0
    stage_messages: int = 0
    rank_bytes: int = 0
    rank_messages: int = 0


RECOVERY_BOUNDS_S = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class RecoveryTally(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The incidents that have ended, since the start.

    `ended` are (noticed by, outcome, number of them). Of those that recovered, `phase_seconds` adds
    up the phases, and `num_within` counts those whose total is at most each of RECOVERY_BOUNDS_S.
    """

    ended: list[tuple[str, str, int]] = []
    phase_seconds: dict[str, float] = {}
    num_within: list[int] = []


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges of now, then counters since the start.

    `replicas` is by name, and empty where there is but one; the numbers are then their sums.
    `workers` are those of a split model, and `epoch` counts how often they have formed anew;
    `incidents` are the latest reasons, oldest first, and `recoveries` counts all of them.
    """

    num_waiting: int = 0
    num_running: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_cached_blocks: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    schedule_seconds: float = 0.0
    epoch: int = 0
    workers: list[WorkerStats] = []
    incidents: list[Incident] = []
    recoveries: RecoveryTally = RecoveryTally()
    replicas: dict[str, EngineStats] = {}


class Incident(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a replica got over a loss, or was moved on purpose.

    `began_s` is the time of day at which it was noticed, by `noticed_by`: "connection" (closed or
    reset), "heartbeat", "step deadline", "report" (a worker said that it cannot go on) or
    "operator". `decisions` are in the order they were made, such as "w7 starts on rack2". `phases`
    are seconds of: "silence" (from the last sign of life), "start" (processes), "load", "form",
    "recompute" (until the first of the requests that were running has a new token), and "total".
    """

    number: int
    replica: str
    cause: str
    noticed_by: str
    began_s: float
    epoch: int
    lost: list[str] = []
    decisions: list[str] = []
    phases: dict[str, float] = {}
    num_requests: int = 0
    outcome: Literal["under way", "recovered", "given up"] = "under way"


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Three questions, and in `reason` what there is to say.

    `live`: it has not stopped. `ready`: it takes new requests. `progressing`: neither has work
    waited for a finished step for too long, nor has the search for workers lasted as long.
    `since_progress_s` counts while there is work. `replicas` is by name, where there are several.
    """

    live: bool = True
    ready: bool = True
    progressing: bool = True
    reason: str
    since_progress_s: float
    replicas: dict[str, Health] = {}

    @property
    def ok(self) -> bool:
        return self.live and self.ready and self.progressing


class Stream(Protocol):
    """One submitted request. Iterate to its end, or `cancel()`; cancelling twice is harmless."""

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def cancel(self) -> None: ...


class AsyncEngine(Protocol):
    """Called from one asyncio event loop; never blocks it for longer than bookkeeping takes."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def submit(
        self,
        prompt_tokens: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        emitted: Sequence[list[int] | None] = (),
    ) -> Stream:
        """Queue `params.n` samples of a prompt.

        `emitted` is by sample what it emitted in an earlier life, None if it had ended: with the
        same `params.seed`, its stream goes on after it as if nothing had happened. Empty for a
        new request.

        Raises InvalidRequest (empty prompt, token id outside the vocabulary), ContextTooLong,
        UnsupportedByModel (an encoder cannot generate), QueueFull, EngineStopped.
        """
        ...

    async def embed(self, prompt_tokens: list[int], *, priority: int = 0) -> list[float]:
        """The mean of the last hidden states, scaled to length 1. Raises as `submit` does."""
        ...

    def stats(self) -> EngineStats: ...

    def health(self) -> Health: ...
