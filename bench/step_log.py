"""Every step of a worker in this process: what it computed, when, and what took its time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from threading import Event
from unittest.mock import patch

import msgspec

from bench.frames import Frames, framed
from bench.roofline import Load
from shoal.messages import Plan, StepResult
from shoal.worker.worker import Worker

REST = "rest of the step"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """`cpu_s` is of the thread that computes the step: less than its time where that waited.

    `seconds` and `calls` are by kind of work, empty for a step without frames.
    """

    num_chunks: int
    load: Load
    started_s: float
    ended_s: float
    cpu_s: float
    seconds: dict[str, float]
    calls: dict[str, int]

    @property
    def s(self) -> float:
        return self.ended_s - self.started_s


def load_of(plan: Plan) -> Load:
    """Keys a chunk attends to: all before it once, for each query those up to its own."""
    pairs = 0
    for chunk in plan.chunks:
        num = len(chunk.tokens)
        pairs += num * chunk.start + num * (num + 1) // 2
    return Load(
        rows=sum(len(chunk.tokens) for chunk in plan.chunks),
        head_rows=sum(chunk.sampling is not None for chunk in plan.chunks),
        keys=sum(chunk.start + len(chunk.tokens) for chunk in plan.chunks),
        pairs=pairs,
    )


@contextmanager
def logged(*, with_frames: bool, all_asked: Event) -> Iterator[list[Step]]:
    """The steps that any worker of this process executes meanwhile, as they end; the first begins
    when `all_asked` is set: else an answer might end before another is asked for.
    """
    steps: list[Step] = []
    frames = Frames()
    original = Worker.execute

    def execute(self: Worker, plan: Plan) -> StepResult:
        all_asked.wait()
        cpu_s, started_s = time.thread_time(), time.perf_counter()
        frames.begin(REST)
        result = original(self, plan)
        frames.end()
        ended_s = time.perf_counter()
        step = Step(
            num_chunks=len(plan.chunks),
            load=load_of(plan),
            started_s=started_s,
            ended_s=ended_s,
            cpu_s=time.thread_time() - cpu_s,
            seconds=frames.seconds if with_frames else {},
            calls=frames.calls if with_frames else {},
        )
        steps.append(step)
        return result

    with patch.object(Worker, "execute", execute):
        if with_frames:
            with framed(frames):
                yield steps
        else:
            yield steps


def periods_s(steps: Sequence[Step]) -> list[float]:
    """From a step's beginning to the next one's: what the engine does between them included."""
    return [after.started_s - step.started_s for step, after in pairwise(steps)]


def quicker_half(steps: Sequence[Step]) -> list[Step]:
    """Those that neighbours disturbed least. Raises ValueError for no steps."""
    if not steps:
        raise ValueError("no such step was computed")
    return sorted(steps, key=lambda step: step.s)[: (len(steps) + 1) // 2]
