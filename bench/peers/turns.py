"""Engines at work one at a time, in alternation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from bench.peers.process import EngineProcess
from bench.ratios import in_turn
from bench.works import Work, figure_of, prompts_of

# Threads of OpenMP spin for a while after their work; they must not do so into a neighbour's.
_REST_S = 0.5
_WARM_UP_TOKENS = 4

Streams = dict[str, Any]


def rounds_of(
    engines: Sequence[EngineProcess], work: Work, num_rounds: int, text: Sequence[int]
) -> Iterator[dict[str, tuple[float, Streams]]]:
    """Each round's figure and answer, by engine. A round before them is not counted.

    Who cannot do the work is left out: a prompt is in nobody's cache who keeps none.
    """
    able = {one.name: one for one in engines if can_do(one.about, work)}
    for turn in range(num_rounds + 1):
        prompts = prompts_of(work, turn, text)
        done = {name: _ask(able[name], work, prompts) for name in in_turn(list(able), turn)}
        if turn:
            yield {name: done[name] for name in able}


def can_do(about: dict[str, Any], work: Work) -> bool:
    return work.figure != "cached" or bool(about.get("caches_prefixes"))


def _ask(engine: EngineProcess, work: Work, prompts: list[list[int]]) -> tuple[float, Streams]:
    time.sleep(_REST_S)
    # What others computed meanwhile has filled the caches of the processor.
    engine.call("generate", prompts=[prompts[0][:8]], new_tokens=_WARM_UP_TOKENS)
    times = 2 if work.figure == "cached" else 1
    for _ in range(times):
        streams = engine.call("generate", prompts=prompts, new_tokens=work.new_tokens)
    return figure_of(work, streams["arrivals_s"]), streams
