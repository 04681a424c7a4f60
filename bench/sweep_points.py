"""One point of `bench.sweep`: so many streams of such a length, on an engine of this process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec

from bench.ratios import Spread, spread_of
from bench.roofline import Load, Shape
from bench.step import own_steps, steps_of
from bench.step_log import Step, periods_s
from bench.works import Work, prompts_of
from shoal.engine.serving import ServingEngine
from shoal.evaluate.perplexity import english_text

HEAD_KINDS = ("output head", "sampling")


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """Who is measured. `step_tokens` is the most that its engine computes in a step."""

    model: str
    num_layers: int
    engine: ServingEngine
    shape: Shape
    step_tokens: int


class Taken(msgspec.Struct, kw_only=True):
    """Steps of one subject and work, and seconds for each of them: of decoding from a step's
    beginning to the next one's, of prefill the step's own.
    """

    steps: list[Step] = []
    seconds: list[float] = []


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """`ms` is of a step that computes `load`, for so many streams alike."""

    model: str
    num_layers: int
    figure: Literal["decode", "prefill"]
    num_streams: int
    load: Load
    shape: Shape
    num_steps: int
    ms: Spread

    @property
    def context(self) -> int:
        """Keys of a stream."""
        return self.load.keys // self.num_streams

    @property
    def tokens_per_s(self) -> float:
        return self.load.rows / self.ms.median * 1e3


def decoding(num_streams: int, context: int, num_steps: int, step_tokens: int) -> Work:
    """Answers long enough for `num_steps` steps in which all streams decode: those that are read
    first have gone on while the others were read.
    """
    reading = -(-num_streams * context // max(1, step_tokens - num_streams))
    return Work(
        name=f"decode-{num_streams}",
        figure="decode",
        num_streams=num_streams,
        prompt_tokens=context,
        new_tokens=reading + num_steps + 1,
    )


def reading(num_tokens: int) -> Work:
    """A prompt that is read in one step."""
    return Work(name="prefill", figure="prefill", prompt_tokens=num_tokens, new_tokens=1)


def run(subject: Subject, work: Work, turn: int, *, with_frames: bool = False) -> list[Step]:
    """All steps of a turn, reading the prompts included."""
    tokens = subject.engine.tokenizer.encode(english_text(), add_special=False)
    text = tokens * (work.prompt_tokens // len(tokens) + 2)
    prompts = prompts_of(work, turn, text)
    return steps_of(subject.engine, prompts, work.new_tokens, with_frames=with_frames)


def of_work(work: Work, steps: Sequence[Step]) -> Taken:
    """Those that are the work itself."""
    own = own_steps(work, steps)
    if work.figure == "prefill":
        return Taken(steps=own, seconds=[step.s for step in own])
    return Taken(steps=own, seconds=periods_s(own))


def point_of(subject: Subject, work: Work, taken: Taken) -> Point:
    """Raises ValueError for no steps."""
    ms = spread_of([seconds * 1e3 for seconds in taken.seconds])
    middle = sorted(taken.steps, key=lambda step: step.load.keys)[len(taken.steps) // 2]
    return Point(
        model=subject.model,
        num_layers=subject.num_layers,
        figure="prefill" if work.figure == "prefill" else "decode",
        num_streams=work.num_streams,
        load=middle.load,
        shape=subject.shape,
        num_steps=len(taken.seconds),
        ms=ms,
    )


def head_ms(framed: Sequence[Step]) -> float:
    """The part of a step that grows with the vocabulary; from steps with frames."""
    return statistics.median(
        sum(step.seconds.get(kind, 0.0) for kind in HEAD_KINDS) * 1e3 for step in framed
    )
