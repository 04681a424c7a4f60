"""The engine's streams of one HTTP request, one per prompt, read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from shoal.engine.api import AsyncEngine, Delta, Stream
from shoal.errors import EngineStopped, InternalError
from shoal.journal.api import Accepted, Entry
from shoal.request import FinishReason
from shoal.server.metrics import GenerationMeter, Metrics

Emitted = Sequence[list[int] | None]


class Generation:
    """`n` samples of each prompt; choice `i` is sample `i % n` of prompt `i // n`.

    `emitted` is by choice what an earlier life of it emitted, None if it has ended; empty for a
    new one. Submitting raises what `AsyncEngine.submit` raises, and then nothing stays queued.
    Read `deltas()` once; `close()` at the end, which cancels what still runs.
    """

    def __init__(
        self, engine: AsyncEngine, metrics: Metrics, accepted: Accepted, emitted: Emitted = ()
    ) -> None:
        self._num_samples = accepted.num_samples
        num_ended = sum(tokens is None for tokens in emitted)
        self._num_open = accepted.num_choices - num_ended
        self._failed = False
        self._streams = _submit_all(engine, accepted, emitted)
        self._meter = GenerationMeter(
            metrics, accepted.endpoint, accepted.num_choices, num_ended=num_ended
        )
        for prompt in accepted.prompts if not emitted else ():
            metrics.prompt_length.observe(len(prompt))

    async def deltas(self) -> AsyncGenerator[Entry, None]:
        """Pairs of a choice and what one step added to it.

        Raises EngineStopped when the engine gives the request up, and what its streams raise.
        """
        try:
            async with aclosing(_merged(self._streams)) as merged:
                async for position, delta in merged:
                    choice = position * self._num_samples + delta.index
                    self._count(choice, delta)
                    yield choice, delta
            if self._num_open:
                raise InternalError(f"the engine left {self._num_open} samples without an end")
        except Exception:
            self._failed = True
            raise

    def close(self) -> None:
        if self._num_open:
            for stream in self._streams:
                stream.cancel()
            self._meter.give_up("failed" if self._failed else "cancelled")
            self._num_open = 0

    def _count(self, choice: int, delta: Delta) -> None:
        if delta.finish_reason is FinishReason.CANCELLED:
            raise EngineStopped("the engine gave this request up; send it again")
        if delta.finish_reason is not None:
            self._num_open -= 1
        self._meter.record(choice, delta)


def _submit_all(engine: AsyncEngine, accepted: Accepted, emitted: Emitted) -> list[Stream]:
    streams: list[Stream] = []
    n = accepted.num_samples
    try:
        for i, (prompt, params) in enumerate(zip(accepted.prompts, accepted.params, strict=True)):
            before = emitted[i * n : (i + 1) * n]
            stream = engine.submit(prompt, params, priority=accepted.priority, emitted=before)
            streams.append(stream)
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
