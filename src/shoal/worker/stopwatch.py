"""Times short calls, each for itself and many in turn, so that a neighbour's burst spoils few.

One disturbed core makes all threads of a call wait for it: medians of single calls survive that,
sums over many calls do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch

_CALLS_PER_TURN = 4
_MIN_ROUNDS = 1
_MAX_ROUNDS = 500

Call = Callable[[], object]


class Timing(NamedTuple):
    """Median of the calls, and their interquartile range over it."""

    seconds: float
    spread: float


def time_in_turn(
    series: Sequence[Sequence[Call]], *, budget_s: float, device: str = "cpu"
) -> list[Timing]:
    """Seconds per call of each series, for about `budget_s`.

    A round is a few calls of each series, which goes on where it stopped the round before: a call
    comes again only after all others of its series. A first call of each only warms up. At least
    one round is timed, however little the budget.
    """
    deadline_s = time.perf_counter() + budget_s
    endless = [cycle(calls) for calls in series]
    for calls in endless:
        _time_turn(calls, device, num_calls=1)
    samples: list[list[float]] = [[] for _ in series]
    for num_rounds in range(_MAX_ROUNDS):
        if num_rounds >= _MIN_ROUNDS and time.perf_counter() > deadline_s:
            break
        for calls, seconds in zip(endless, samples, strict=True):
            seconds += _time_turn(calls, device)
    return [_summary(seconds) for seconds in samples]


def _time_turn(
    endless: Iterator[Call], device: str, num_calls: int = _CALLS_PER_TURN
) -> list[float]:
    calls = list(islice(endless, num_calls))
    if device == "cuda":
        # Calls only enqueue work there: waiting after each would measure the waiting.
        return [_time(lambda: _run_all(calls)) / len(calls)]
    return [_time(call) for call in calls]


def _time(call: Call) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
    torch.cuda.synchronize()


def _summary(seconds: Sequence[float]) -> Timing:
    if len(seconds) == 1:
        return Timing(seconds[0], 0.0)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, (high - low) / median)
