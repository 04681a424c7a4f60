"""What a run of chaos came to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec

from shoal.evaluate.answers import Answer
from shoal.evaluate.chaos import Tally
from shoal.evaluate.latency import percentile
from shoal.evaluate.strikes import Strike

_NUM_EXAMPLES = 3


class Gaps(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. `number` 0 leaves the others at 0."""

    number: int = 0
    p50_s: float = 0.0
    p99_s: float = 0.0
    max_s: float = 0.0


class HeadUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the server's own process holds."""

    rss_bytes: int
    num_fds: int
    num_threads: int


class ChaosReport(msgspec.Struct, frozen=True, kw_only=True):
    """`hit_gaps` are waits of streams during which a worker was struck, `other_gaps` all others.

    `recoveries` is by "noticed by, outcome". `problems` are why the server or the run is not well.
    """

    seconds: float
    num_requests: int
    num_tokens: int
    num_kills: int
    num_freezes: int
    num_broken: int
    num_different: int
    num_lost_tokens: int
    num_repeated_tokens: int
    hit_gaps: Gaps
    other_gaps: Gaps
    recoveries: dict[str, int]
    head_before: HeadUse
    head_after: HeadUse
    is_exact: bool
    problems: list[str]
    examples: list[str]

    @property
    def ok(self) -> bool:
        return not (self.num_broken or self.num_different or self.problems)


def summarise(
    tally: Tally,
    strikes: Sequence[Strike],
    *,
    seconds: float,
    recoveries: dict[str, int],
    head: tuple[HeadUse, HeadUse],
    is_exact: bool,
    problems: Sequence[str],
) -> ChaosReport:
    hit, other = divide_gaps(tally.answers, [strike.at_s for strike in strikes])
    differences = [each.difference for each in tally.different]
    examples = [f"{each.kind}: {each.reason}" for each in tally.broken[:_NUM_EXAMPLES]]
    examples += [f"{d.kind}: {d.difference.text}" for d in tally.different[:_NUM_EXAMPLES]]
    return ChaosReport(
        seconds=seconds,
        num_requests=len(tally.answers),
        num_tokens=tally.num_tokens,
        num_kills=sum(strike.how == "kill" for strike in strikes),
        num_freezes=sum(strike.how == "freeze" for strike in strikes),
        num_broken=len(tally.broken),
        num_different=len(tally.different),
        num_lost_tokens=sum(each.num_tokens for each in differences if each.kind == "lost"),
        num_repeated_tokens=sum(each.num_tokens for each in differences if each.kind == "repeated"),
        hit_gaps=gaps_of(hit),
        other_gaps=gaps_of(other),
        recoveries=recoveries,
        head_before=head[0],
        head_after=head[1],
        is_exact=is_exact,
        problems=list(problems),
        examples=examples,
    )


def divide_gaps(
    answers: Sequence[Answer], struck_s: Sequence[float]
) -> tuple[list[float], list[float]]:
    """The waits that span a strike, each once, and all others; in seconds.

    A stream waits from being sent to its first piece, and from one piece to the next.
    """
    hit: list[float] = []
    other: list[float] = []
    for before_s, after_s in _waits(answers):
        spans = any(before_s <= at_s < after_s for at_s in struck_s)
        (hit if spans else other).append(after_s - before_s)
    return hit, other


def gaps_of(waits_s: Sequence[float]) -> Gaps:
    if not waits_s:
        return Gaps()
    return Gaps(
        number=len(waits_s),
        p50_s=percentile(waits_s, 50),
        p99_s=percentile(waits_s, 99),
        max_s=max(waits_s),
    )


def _waits(answers: Sequence[Answer]) -> Iterator[tuple[float, float]]:
    for answer in answers:
        for sample in answer.samples:
            if sample.arrivals_s:
                yield from pairwise([answer.sent_s, *sample.arrivals_s])
