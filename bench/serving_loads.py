"""What `bench.serve` asks a server for, and when.

All workloads are conversations that begin at random (Poisson) times; a plain request is one of a
single turn. The next turn is sent as soon as the answer before it has ended: its prompt is the one
before, with the answer's own tokens and the next question behind them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import msgspec

from bench.works import Work, prompts_of
from shoal.evaluate.latency import Trace
from shoal.evaluate.load import LoadSpec, Piece, Prompt, Target, arrival_times, trace_one


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens: `shared_tokens` open every conversation, each turn asks and answers so many."""

    name: str
    question_tokens: int
    answer_tokens: int
    shared_tokens: int = 0
    num_turns: int = 1
    rates: tuple[float, ...]


WORKLOADS = {
    each.name: each
    for each in (
        Workload(
            name="plain", question_tokens=128, answer_tokens=64, rates=(0.5, 1.0, 2.0, 3.0, 4.0)
        ),
        Workload(
            name="chat",
            question_tokens=32,
            answer_tokens=32,
            shared_tokens=512,
            num_turns=4,
            rates=(1.0, 2.0, 4.0, 6.0, 8.0),
        ),
        Workload(name="long", question_tokens=2048, answer_tokens=32, rates=(0.1, 0.2, 0.3)),
    )
}

Conversation = list[Prompt]
"""Its questions, in order; the first one with what all conversations share before it."""


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """A load that has been answered. `late_s` is how much later than planned each began."""

    traces: list[Trace]
    late_s: list[float]


def num_conversations(workload: Workload, rate_per_s: float, seconds: float) -> int:
    """So many that requests come at that rate for so long; one at the least."""
    return max(1, round(rate_per_s * seconds / workload.num_turns))


def conversations_of(workload: Workload, number: int, text: Sequence[int]) -> list[Conversation]:
    """Questions are windows of `text`, going round at its end. No two begin alike, so only what is
    shared can be in a prefix cache.
    """
    turns = workload.num_turns
    work = Work(
        name=workload.name,
        figure="decode",
        num_streams=number * turns,
        prompt_tokens=workload.question_tokens,
        new_tokens=workload.answer_tokens,
    )
    longest = max(workload.question_tokens, workload.shared_tokens)
    long_text = list(text) * (longest // len(text) + 2)
    shared = long_text[: workload.shared_tokens]
    questions = prompts_of(work, 0, long_text)
    each = [questions[first : first + turns] for first in range(0, number * turns, turns)]
    return [[shared + first, *rest] for first, *rest in each]


async def send_all(
    target: Target,
    conversations: Sequence[Conversation],
    *,
    rate_per_s: float,
    answer_tokens: int,
    seed: int,
) -> Sent:
    """`rate_per_s` is of requests. Turns wait for the answers before them, so it is less in the end
    where the server cannot keep up.
    """
    spec = LoadSpec(
        num_requests=len(conversations),
        rate_per_s=rate_per_s / len(conversations[0]),
        seed=seed,
    )
    begun_s = time.perf_counter()

    async def begin(conversation: Conversation, delay_s: float) -> tuple[float, list[Trace]]:
        await asyncio.sleep(delay_s)
        late_s = time.perf_counter() - begun_s - delay_s
        return late_s, await converse(target, conversation, answer_tokens)

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(begin(conversation, delay_s))
            for conversation, delay_s in zip(conversations, arrival_times(spec), strict=True)
        ]
    done = [task.result() for task in tasks]
    return Sent(
        traces=[trace for _, traces in done for trace in traces],
        late_s=[late_s for late_s, _ in done],
    )


async def converse(target: Target, conversation: Conversation, answer_tokens: int) -> list[Trace]:
    """Turn by turn; one that fails is the last."""
    traces: list[Trace] = []
    history: Prompt = []
    for question in conversation:
        listener = _Listener(target)
        history = history + question
        traces.append(await trace_one(listener, history, answer_tokens))
        if traces[-1].error is not None:
            break
        history = history + listener.token_ids
    return traces


class _Listener:
    """A `Target` that keeps the tokens of its answers."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.token_ids: list[int] = []

    async def tokenize(self, text: str) -> list[int]:
        return await self._target.tokenize(text)

    async def answer(self, prompt: Prompt, max_tokens: int) -> AsyncIterator[Piece]:
        async for piece in self._target.answer(prompt, max_tokens):
            self.token_ids += piece.token_ids
            yield piece
