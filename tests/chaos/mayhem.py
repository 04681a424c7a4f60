"""Streams of every kind under way at once, workers killed or frozen meanwhile, and what is left."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
from scripted_head import eventually, num_open_files
from split_answers import same_answers
from split_fleets import Asked, Yard

from shoal.config import EngineConfig, Split
from shoal.engine.api import EngineStats, Incident
from shoal.engine.outputs import RequestOutput, gather
from shoal.engine.streams import SyncStream
from shoal.errors import ShoalError
from shoal.fleet.deployment import AnyEngine
from shoal.fleet.fleet import Fleet
from shoal.request import SamplingParams

MODEL = "smollm2-135m"
SQUARE = Split(pipeline=2, tensor=2)
STEP_TOKENS = 32
# No stream takes so long, whatever happens to its workers here.
PATIENCE_S = 60.0

LONG = "The quick brown fox jumps over the lazy dog. " * 8
COUNTING = "1, 2, 3, 4, 5, 6, 7, 8,"


def greedy(max_tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=2, **more)


def seeded(seed: int, max_tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0.9, seed=seed, max_tokens=max_tokens, **more)


ASKED: list[Asked] = [
    (LONG, greedy(6)),
    (LONG[10:100], greedy(6, prompt_logprobs=3)),
    ("Once upon a time", seeded(3, 8, n=3, logprobs=3)),
    ("The sea, the sea, the sea,", greedy(8, repetition_penalty=1.3)),
    (COUNTING, seeded(5, 8, presence_penalty=0.7, frequency_penalty=0.4)),
    (COUNTING, greedy(12, stop=("10, 1",))),
    ("Water boils at", seeded(9, 8, min_p=0.05, logit_bias={260: -4.0}, min_tokens=6)),
    ("The capital of France is", seeded(11, 10, top_p=0.9, top_k=40)),
]


def reading(tag: str) -> list[Asked]:
    """What takes several steps before the first token, unless it is cached."""
    return [
        (f"{tag}. {LONG}", greedy(3)),
        (f"{tag}, {LONG}"[:300], seeded(4, 3, n=2, logprobs=2)),
        (f"{tag}: {LONG}"[:200], greedy(2, prompt_logprobs=2)),
    ]


def config_of(**more: object) -> EngineConfig:
    settings: dict[str, object] = {
        "model": MODEL,
        "dtype": "float32",
        "quantize": "none",
        "kv_memory_bytes": 64 * 2**20,
        "max_step_tokens": STEP_TOKENS,
        "split": SQUARE,
    }
    return EngineConfig(**settings | more)  # type: ignore[arg-type]


# ---- streams ------------------------------------------------------------------------------


@dataclass
class Answers:
    outputs: list[RequestOutput]
    embedding: list[float]


class Streams:
    """All that is asked, and an embedding, submitted at once."""

    def __init__(self, engine: AnyEngine, all_asked: Sequence[Asked] = ASKED) -> None:
        self._asked: list[tuple[list[int], int, SyncStream]] = []
        self.before = engine.stats()
        for prompt, params in all_asked:
            tokens = engine.tokenizer.encode(prompt)
            self._asked.append((tokens, params.n, engine.submit_sync(tokens, params)))
        self._embed = engine.submit_embed_sync(engine.tokenizer.encode(all_asked[0][0][:100]))

    def answers(self) -> Answers:
        """Raises what ended one of them; those that hang are cancelled, so that they differ."""
        with self._limit():
            outputs = [gather(*each) for each in self._asked]
            return Answers(outputs, self._embed.embedding())

    def ends(self) -> list[Exception | None]:
        """What ended each, None for those that went well."""
        reads = [partial(gather, *each) for each in self._asked]
        with self._limit():
            return [_end(read) for read in [*reads, self._embed.embedding]]

    @contextmanager
    def _limit(self) -> Iterator[None]:
        streams = [self._embed, *(stream for _, _, stream in self._asked)]
        watchdog = threading.Timer(PATIENCE_S, lambda: [each.cancel() for each in streams])
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()
            watchdog.join()


def _end(read: Callable[[], object]) -> Exception | None:
    try:
        read()
    except ShoalError as error:
        return error
    return None


def same(calm: Answers, got: Answers) -> None:
    same_answers(calm.outputs, got.outputs, within=1e-4)
    assert got.embedding == pytest.approx(calm.embedding, abs=1e-4)
    for output in got.outputs:
        assert 0 <= output.num_cached_tokens <= len(output.prompt_tokens) * len(output.samples)


# ---- moments ------------------------------------------------------------------------------


def until(engine: AnyEngine, is_so: Callable[[EngineStats], bool]) -> EngineStats:
    """What the engine was like when it first was so."""
    found: list[EngineStats] = []

    def look() -> bool:
        found[:] = [engine.stats()]
        return is_so(found[0])

    eventually(look, "the moment did not come", within_s=PATIENCE_S, every_s=0.001)
    return found[0]


def prefilling(before: EngineStats) -> Callable[[EngineStats], bool]:
    return lambda now: now.steps > before.steps


def decoding(before: EngineStats, num_tokens: int = 20) -> Callable[[EngineStats], bool]:
    return lambda now: now.generated_tokens >= before.generated_tokens + num_tokens


def mending(phase: str, *, after: int) -> Callable[[EngineStats], bool]:
    """An incident later than number `after` has come to a phase."""
    return lambda now: num_incidents_in(now) > after and phase in incident(now).phases


def mended(now: EngineStats, *, after: int) -> bool:
    return num_incidents_in(now) > after and incident(now).outcome == "recovered"


def incident(stats: EngineStats) -> Incident:
    return stats.incidents[-1]


def num_incidents_in(stats: EngineStats) -> int:
    return incident(stats).number if stats.incidents else 0


def num_incidents(engine: AnyEngine) -> int:
    return num_incidents_in(engine.stats())


def pids(stats: EngineStats) -> list[int]:
    return [worker.pid for worker in stats.workers]


# ---- blows --------------------------------------------------------------------------------


def pid_in(engine: AnyEngine, seat: int) -> int:
    pid = engine.stats().workers[seat].pid
    assert pid > 0, f"nobody sits in seat {seat}"
    return pid


def kill(engine: AnyEngine, *seats: int) -> None:
    for pid in [pid_in(engine, seat) for seat in seats]:
        os.kill(pid, signal.SIGKILL)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """For so long the process does nothing, and its connections stay as they are."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


# ---- what is left -------------------------------------------------------------------------


def worker_processes() -> Sequence[psutil.Process]:
    """Of all fleets of this test's process, spares too."""
    found: list[psutil.Process] = []
    for nursery in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            found += nursery.children()
    return found


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("shoal-*")}


@contextmanager
def clean_fleet(yard: Yard, config: EngineConfig) -> Iterator[Fleet]:
    """A fleet that leaves no process, thread, descriptor, socket or shared memory behind."""
    threads, num_files = set(threading.enumerate()), num_open_files()
    segments, sockets = shared_memory(), set(yard.folder.iterdir())
    with yard.fleet(config) as fleet:
        yield fleet
    eventually(lambda: not worker_processes(), "workers are left")
    eventually(lambda: set(threading.enumerate()) <= threads, "threads are left")
    gc.collect()
    eventually(lambda: num_open_files() <= num_files, "files or sockets are left open")
    eventually(lambda: shared_memory() <= segments, "shared memory is left")
    eventually(lambda: set(yard.folder.iterdir()) <= sockets, "names of sockets are left")
