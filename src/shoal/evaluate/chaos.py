"""Keeps streams open while workers die, and holds every answer against that of a calm run."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from shoal.errors import OperatorError
from shoal.evaluate.answers import Answer, Asked, Difference, first_difference

How = Literal["kill", "freeze", "mix"]
OnTokens = Callable[[int], None]


class ChaosPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`every_s` is the mean time between strikes, `for_s` how long new requests are sent."""

    every_s: float
    for_s: float
    num_streams: int
    how: How
    max_tokens: int
    seed: int


class Asker(Protocol):
    """Something that answers; what goes wrong is the answer's error."""

    async def ask(self, asked: Asked, on_tokens: OnTokens) -> Answer:
        """`on_tokens` hears how many have come, whenever some come."""
        ...


@dataclass
class Broken:
    kind: str
    reason: str


@dataclass
class Different:
    kind: str
    difference: Difference


@dataclass
class Tally:
    """What there is of a run so far."""

    num_tokens: int = 0
    answers: list[Answer] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    different: list[Different] = field(default_factory=list)

    def count(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens


async def calm_answers(
    asker: Asker, questions: Sequence[Asked], *, at_once: int, tally: Tally
) -> list[Answer]:
    """In the order of the questions. Raises OperatorError if one has no whole answer."""
    seats = asyncio.Semaphore(at_once)

    async def ask(asked: Asked) -> Answer:
        async with seats:
            answer = await asker.ask(asked, tally.count)
        if (reason := answer.broken()) is not None:
            raise OperatorError(f"already without any chaos, '{asked.kind}' failed: {reason}")
        tally.answers.append(answer)
        return answer

    tasks = [asyncio.create_task(ask(asked)) for asked in questions]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def keep_asking(
    asker: Asker,
    questions: Sequence[Asked],
    calm: Sequence[Answer],
    *,
    num_streams: int,
    seed: int,
    enough: asyncio.Event,
    tally: Tally,
) -> None:
    """So many streams at a time until there is enough; those that are open then may end."""
    order = _shuffled(len(questions), seed)

    async def stream() -> None:
        while not enough.is_set():
            number = next(order)
            answer = await asker.ask(questions[number], tally.count)
            judge(questions[number], calm[number], answer, tally)

    async with asyncio.TaskGroup() as group:
        for _ in range(num_streams):
            group.create_task(stream())


def judge(asked: Asked, calm: Answer, answer: Answer, tally: Tally) -> None:
    tally.answers.append(answer)
    if (reason := answer.broken()) is not None:
        tally.broken.append(Broken(asked.kind, reason))
    elif (difference := first_difference(calm, answer)) is not None:
        tally.different.append(Different(asked.kind, difference))


def _shuffled(number: int, seed: int) -> Iterator[int]:
    """Every one once, then every one once again in another order, without end."""
    draw = random.Random(seed)
    rounds = (draw.sample(range(number), number) for _ in itertools.count())
    return itertools.chain.from_iterable(rounds)
