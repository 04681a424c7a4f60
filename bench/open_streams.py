"""Streams that are kept open over a fleet of this machine, and its workers' processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import psutil
from msgspec import structs

from shoal.engine.api import Delta, Incident
from shoal.errors import ShoalError
from shoal.evaluate.answers import Answer, AnsweredSample, Asked
from shoal.evaluate.chaos import OnTokens, Tally, calm_answers, keep_asking
from shoal.evaluate.chaos_prompts import LONG_PROMPT
from shoal.evaluate.strikes import Target, running
from shoal.fleet.fleet import Fleet

_LOOK_S = 0.005
_LIMIT_S = 180.0
# A spare that has read all of its shards only says that it lives.
_IDLE_CORES = 0.1
_IDLE_LOOK_S = 1.0


class EngineAsker:
    """An `Asker` without HTTP; `open` are the answers that have not ended, by their `id`."""

    def __init__(self, fleet: Fleet) -> None:
        self._engine = fleet.engine
        self.open: dict[int, Answer] = {}
        self._prompt_tokens: dict[int, int] = {}

    async def ask(self, asked: Asked, on_tokens: OnTokens) -> Answer:
        tokens = self._engine.tokenizer.encode(asked.prompt)
        now_s = time.perf_counter()
        samples = [AnsweredSample() for _ in range(asked.params.n)]
        answer = Answer(sent_s=now_s, ended_s=now_s, samples=samples)
        self.open[id(answer)] = answer
        self._prompt_tokens[id(answer)] = len(tokens) * asked.params.n
        try:
            async for delta in self._engine.submit(tokens, asked.params):
                _take(delta, answer)
                on_tokens(len(delta.token_ids))
        except ShoalError as error:
            answer.error = error.message
        finally:
            del self.open[id(answer)], self._prompt_tokens[id(answer)]
        answer.ended_s = time.perf_counter()
        return answer

    def num_known_tokens(self) -> int:
        """Of prompts and answers that are open: what a recovery has to compute again."""
        said = sum(answer.num_tokens for answer in self.open.values())
        return said + sum(self._prompt_tokens.values())


class Streams:
    """So many at a time, each held against the calm run's answer to its question."""

    def __init__(self, fleet: Fleet, questions: Sequence[Asked], num_streams: int) -> None:
        self.fleet = fleet
        self.tally = Tally()
        self.asker = EngineAsker(fleet)
        self._questions = questions
        self._num_streams = num_streams

    @asynccontextmanager
    async def kept_open(self) -> AsyncIterator[None]:
        """What is open at the end of the block ends in peace."""
        calm = await calm_answers(
            self.asker, self._questions, at_once=self._num_streams, tally=Tally()
        )
        enough = asyncio.Event()
        asking = asyncio.create_task(
            keep_asking(
                self.asker,
                self._questions,
                calm,
                num_streams=self._num_streams,
                seed=0,
                enough=enough,
                tally=self.tally,
            )
        )
        try:
            yield
        finally:
            enough.set()
            await asking

    async def moved_on(self, num_tokens: int) -> None:
        """All that are open now have got so many more, or have ended."""
        before = [(answer, answer.num_tokens) for answer in self.asker.open.values()]

        def moved() -> bool:
            return all(
                answer.num_tokens >= number + num_tokens or id(answer) not in self.asker.open
                for answer, number in before
            )

        await until(moved, f"streams have not moved on by {num_tokens} tokens")

    async def mended(self, last: int) -> Incident:
        """The first incident after number `last`, when it has ended."""

        def ended() -> list[Incident]:
            known = self.fleet.engine.stats().incidents
            return [each for each in known if each.number > last and each.outcome != "under way"]

        await until(lambda: bool(ended()), f"incident {last + 1} has not ended")
        return ended()[0]

    def last_incident(self) -> int:
        known = self.fleet.engine.stats().incidents
        return known[-1].number if known else 0

    def targets(self) -> list[Target]:
        workers = self.fleet.engine.stats().workers
        return [Target(each.worker, each.pid) for each in workers if running(each.pid)]

    async def spares_ready(self, number: int) -> None:
        """So many have started, and have read what they may have to take over."""
        deadline_s = time.perf_counter() + _LIMIT_S
        while True:
            spares = self._spares()
            before_s = sum(_cpu_s(each) for each in spares)
            await asyncio.sleep(_IDLE_LOOK_S)
            used_s = sum(_cpu_s(each) for each in spares) - before_s
            if len(spares) == number and 0 <= used_s < _IDLE_CORES * _IDLE_LOOK_S:
                return
            assert time.perf_counter() < deadline_s, f"{len(spares)} spares of {number} are there"

    def _spares(self) -> list[psutil.Process]:
        seated = {target.pid for target in self.targets()}
        nurseries = psutil.Process().children()
        return [
            each
            for nursery in nurseries
            for each in nursery.children()
            if each.pid not in seated and running(each.pid)
        ]


async def until(true: Callable[[], bool], complaint: str) -> None:
    deadline_s = time.perf_counter() + _LIMIT_S
    while not true():
        assert time.perf_counter() < deadline_s, f"{complaint} within {_LIMIT_S:.0f} s"
        await asyncio.sleep(_LOOK_S)


def _take(delta: Delta, answer: Answer) -> None:
    sample = answer.samples[delta.index]
    sample.token_ids += delta.token_ids
    sample.text += delta.text
    sample.logprobs += [score.logprob for score in delta.logprobs or []]
    if delta.token_ids:
        sample.arrivals_s.append(time.perf_counter())
    if delta.finish_reason is not None:
        sample.finish_reason = delta.finish_reason.value
        sample.stop_match = delta.stop_match
    answer.prompt_logprobs += [score.logprob for score in delta.prompt_logprobs or []]


def _cpu_s(process: psutil.Process) -> float:
    try:
        return float(sum(process.cpu_times()[:2]))
    except psutil.Error:
        return 0.0


def greedy_only(questions: Sequence[Asked]) -> list[Asked]:
    """The short ones, each with the plainest of parameters: all streams are alike."""
    plain = [structs.replace(each, params=questions[0].params, stream=True) for each in questions]
    return [each for each in plain if each.kind != LONG_PROMPT]
