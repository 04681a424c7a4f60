"""Puts a load on a target: prompts from the fixed text, answers of exact lengths, each timed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import msgspec

from shoal.errors import ConfigError, InvalidRequest, ShoalError
from shoal.evaluate.latency import Trace

Prompt = list[int]


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`rate_per_s` sends at random (Poisson) times; None keeps `concurrency` requests open."""

    num_requests: int = 32
    concurrency: int = 8
    rate_per_s: float | None = None
    prompt_tokens: int = 128
    max_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_requests", "concurrency", "prompt_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.rate_per_s is not None and not 0 < self.rate_per_s < float("inf"):
            raise ConfigError(f"the rate must be positive, got {self.rate_per_s}")


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an answer; the counts, where they are set, are those of the whole request.

    `token_ids` are told by who answers over HTTP.
    """

    has_tokens: bool
    token_ids: list[int] = []
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_output_tokens: int | None = None


class Target(Protocol):
    """Something that answers prompts; it must end no answer before `max_tokens`."""

    async def tokenize(self, text: str) -> list[int]: ...

    def answer(self, prompt: Prompt, max_tokens: int) -> AsyncIterator[Piece]:
        """Raises ShoalError."""
        ...


def cut_prompts(tokens: Sequence[int], spec: LoadSpec) -> list[Prompt]:
    """Stretches of the text from random places, going round at its end.

    They share no prefix but by chance, so a prefix cache does not help.
    """
    if not tokens:
        raise InvalidRequest("the text to cut prompts from has no tokens")
    draw = random.Random(spec.seed)
    starts = [draw.randrange(len(tokens)) for _ in range(spec.num_requests)]
    return [
        [tokens[(start + offset) % len(tokens)] for offset in range(spec.prompt_tokens)]
        for start in starts
    ]


def arrival_times(spec: LoadSpec) -> list[float]:
    """Seconds from the start at which each request is sent."""
    if spec.rate_per_s is None:
        return [0.0] * spec.num_requests
    draw = random.Random(spec.seed)
    times, now_s = [], 0.0
    for _ in range(spec.num_requests):
        times.append(now_s)
        now_s += draw.expovariate(spec.rate_per_s)
    return times


async def run_load(
    target: Target,
    prompts: Sequence[Prompt],
    spec: LoadSpec,
    *,
    on_done: Callable[[Trace], None] = lambda _: None,
) -> list[Trace]:
    """One trace per prompt, in their order; what a request raises as ShoalError is its error."""
    is_closed_loop = spec.rate_per_s is None
    seats = asyncio.Semaphore(spec.concurrency if is_closed_loop else len(prompts))

    async def send(prompt: Prompt, delay_s: float) -> Trace:
        await asyncio.sleep(delay_s)
        async with seats:
            trace = await trace_one(target, prompt, spec.max_tokens)
        on_done(trace)
        return trace

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(send(prompt, delay_s))
            for prompt, delay_s in zip(prompts, arrival_times(spec), strict=True)
        ]
    return [task.result() for task in tasks]


async def trace_one(target: Target, prompt: Prompt, max_tokens: int) -> Trace:
    """Send one prompt and note when each piece of its answer comes."""
    sent_s = time.perf_counter()
    arrivals_s: list[float] = []
    num_prompt, num_cached, num_output = len(prompt), 0, 0
    error = None
    try:
        async for piece in target.answer(prompt, max_tokens):
            if piece.has_tokens:
                arrivals_s.append(time.perf_counter())
            num_prompt = piece.num_prompt_tokens or num_prompt
            num_cached = piece.num_cached_tokens or num_cached
            num_output = piece.num_output_tokens or num_output
    except ShoalError as raised:
        error = raised.message
    return Trace(
        sent_s=sent_s,
        ended_s=time.perf_counter(),
        arrivals_s=arrivals_s,
        num_prompt_tokens=num_prompt,
        num_cached_tokens=num_cached,
        num_output_tokens=num_output,
        error=error or _wrong_counts(prompt, max_tokens, num_prompt, num_output),
    )


def _wrong_counts(prompt: Prompt, max_tokens: int, num_prompt: int, num_output: int) -> str | None:
    if num_prompt != len(prompt):
        return f"sent {len(prompt)} prompt tokens, {num_prompt} were counted"
    if num_output != max_tokens:
        return f"asked for {max_tokens} tokens, {num_output} came"
    return None
