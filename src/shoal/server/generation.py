"""The engine's streams of one HTTP request, one per prompt, read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from shoal.engine.api import AsyncEngine, Delta, Stream
from shoal.errors import EngineStopped, InternalError
from shoal.messages import TokenLogprobs
from shoal.request import FinishReason, SamplingParams
from shoal.server.metrics import GenerationMeter, Metrics


@dataclass
class Sample:
    """One choice, put together from its deltas."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.finish_reason = delta.finish_reason
        self.stop_match = delta.stop_match


class Generation:
    """`params.n` samples of each prompt; choice `i` is sample `i % n` of prompt `i // n`.

    Submitting raises what `AsyncEngine.submit` raises, and then nothing stays queued. Read
    `deltas()` or `collect()` once; `close()` at the end, which cancels what still runs.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        metrics: Metrics,
        endpoint: str,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        priority: int,
    ) -> None:
        self.prompts = prompts
        self.n = params.n
        self.num_choices = len(prompts) * params.n
        self.num_generated_tokens = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[list[TokenLogprobs] | None] = [None] * len(prompts)
        self._num_open = self.num_choices
        self._failed = False
        self._streams = _submit_all(engine, prompts, params, priority)
        self._meter = GenerationMeter(metrics, endpoint, self.num_choices)
        for prompt in prompts:
            metrics.prompt_length.observe(len(prompt))

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Pairs of a choice and what one step added to it.

        Raises EngineStopped when the engine gives the request up, and what its streams raise.
        """
        try:
            async with aclosing(_merged(self._streams)) as merged:
                async for position, delta in merged:
                    choice = position * self.n + delta.index
                    self._count(position, choice, delta)
                    yield choice, delta
            if self._num_open:
                raise InternalError(f"the engine left {self._num_open} samples without an end")
        except Exception:
            self._failed = True
            raise

    async def collect(self) -> list[Sample]:
        """All choices in order, when the last has ended. Raises as `deltas` does."""
        samples = [Sample() for _ in range(self.num_choices)]
        async with aclosing(self.deltas()) as deltas:
            async for choice, delta in deltas:
                samples[choice].add(delta)
        return samples

    def usage(self, num_generated_tokens: int | None = None) -> dict[str, Any]:
        """OpenAI's usage object: a prompt counts once, however many samples it has."""
        num_prompt = sum(len(prompt) for prompt in self.prompts)
        num_generated = (
            self.num_generated_tokens if num_generated_tokens is None else num_generated_tokens
        )
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }

    def close(self) -> None:
        if self._num_open:
            for stream in self._streams:
                stream.cancel()
            self._meter.give_up("failed" if self._failed else "cancelled")
            self._num_open = 0

    def _count(self, position: int, choice: int, delta: Delta) -> None:
        if delta.finish_reason is FinishReason.CANCELLED:
            raise EngineStopped("the engine gave this request up; send it again")
        self.num_generated_tokens += len(delta.token_ids)
        self.num_cached_tokens += delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs[position] = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self._num_open -= 1
        self._meter.record(choice, delta)


def _submit_all(
    engine: AsyncEngine, prompts: Sequence[list[int]], params: SamplingParams, priority: int
) -> list[Stream]:
    streams: list[Stream] = []
    try:
        for prompt in prompts:
            streams.append(engine.submit(prompt, params, priority=priority))
    except Exception:
        for stream in streams:
            stream.cancel()
        raise
    return streams


async def _merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Each delta with the position of its stream, in the order of arrival."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()
    pumps = [
        asyncio.create_task(_pump(position, stream, queue))
        for position, stream in enumerate(streams)
    ]
    try:
        num_open = len(pumps)
        while num_open:
            arrived = await queue.get()
            if isinstance(arrived, Exception):
                raise arrived
            if arrived is None:
                num_open -= 1
            else:
                yield arrived
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    position: int, stream: Stream, queue: asyncio.Queue[tuple[int, Delta] | Exception | None]
) -> None:
    try:
        async for delta in stream:
            queue.put_nowait((position, delta))
    except Exception as error:
        queue.put_nowait(error)
    else:
        queue.put_nowait(None)
