"""Drives a scheduler by hand: short requests, plans checked as they come, a model with one word."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any

from drawn import drawn

from shoal.messages import Chunk, ChunkResult, Event, Plan, StepResult, TokenLogprobs
from shoal.request import Request, SamplingParams
from shoal.schedule.scheduler import Scheduler

WORD = 7  # the token that the imaginary model always draws


def make_scheduler(**overrides: Any) -> Scheduler:
    options: dict[str, Any] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_context": 128,
        "max_step_tokens": 32,
        "max_running": 8,
        "max_waiting": 16,
    }
    return Scheduler(**(options | overrides))


def make_request(request_id: int, num_prompt: int = 4, **overrides: Any) -> Request:
    params = SamplingParams(**overrides.pop("params", {}))
    options: dict[str, Any] = {
        "prompt_tokens": [100 * request_id + i for i in range(num_prompt)],
        "max_tokens": 8,
        "seed": request_id,
        "arrival_s": float(request_id),
    }
    return Request(request_id=request_id, params=params, **(options | overrides))


def plan(scheduler: Scheduler) -> Plan:
    made = scheduler.plan(0.0)
    scheduler.check()
    assert made is not None
    return made


def answer(chunk: Chunk) -> ChunkResult:
    return ChunkResult(
        request_id=chunk.request_id,
        token_ids=drawn(chunk, lambda _: WORD),
        prompt_logprobs=[TokenLogprobs(-float(t), [], []) for t in chunk.score_targets],
        pooled=array("f", [float(len(chunk.tokens))]).tobytes() if chunk.pooling else b"",
    )


def complete(
    scheduler: Scheduler, done: Plan, answer: Callable[[Chunk], ChunkResult] = answer
) -> list[Event]:
    results = [answer(chunk) for chunk in done.chunks]
    events = scheduler.complete(StepResult(epoch=done.epoch, step=done.step, results=results))
    scheduler.check()
    return events


def step(scheduler: Scheduler) -> tuple[dict[int, int], list[Event]]:
    """One plan and its result: the number of tokens planned per request, and the events."""
    made = plan(scheduler)
    return sizes(made), complete(scheduler, made)


def sizes(made: Plan) -> dict[int, int]:
    return {chunk.request_id: len(chunk.tokens) for chunk in made.chunks}


def drain(scheduler: Scheduler) -> list[Event]:
    events = []
    while scheduler.has_work:
        events += step(scheduler)[1]
    return events


def tokens_of(events: Iterable[Event], request_id: int) -> list[int | None]:
    return [event.token_id for event in events if event.request_id == request_id]
