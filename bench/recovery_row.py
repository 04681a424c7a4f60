"""Random workers killed in a row, the next as soon as all streams have moved on."""

from __future__ import annotations

import random
import time
from collections import Counter

import msgspec
import psutil
from msgspec import structs
from open_streams import Streams

from shoal.evaluate.chaos_report import divide_gaps, gaps_of

_TOKENS_BETWEEN = 3
_NUM_REPORTS = 20


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """The head, which here is the streams' client too, after so many kills."""

    num_kills: int
    seconds: float
    rss_mib: float
    num_fds: int
    num_threads: int
    num_requests: int
    num_tokens: int
    num_bad: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What remained. Growth is from the look after a tenth of the kills to the last."""

    num_kills: int
    seconds: float
    num_requests: int
    num_tokens: int
    num_broken: int
    num_different: int
    num_lost_tokens: int
    num_repeated_tokens: int
    num_incidents: int
    gap_p50_s: float
    gap_p99_s: float
    gap_max_s: float
    rss_growth_percent: float
    fds: tuple[int, int]
    threads: tuple[int, int]

    @property
    def ok(self) -> bool:
        return not self.num_broken and not self.num_different


async def strike_in_a_row(streams: Streams, num_kills: int, seed: int) -> Row:
    draw, start_s = random.Random(seed), time.perf_counter()
    looks: list[Look] = []
    gaps_s: list[float] = []
    struck_s: list[float] = []
    num_requests = 0
    every = max(num_kills // _NUM_REPORTS, 1)
    first = streams.last_incident()
    async with streams.kept_open():
        for number in range(1, num_kills + 1):
            await streams.moved_on(_TOKENS_BETWEEN)
            last = streams.last_incident()
            struck_s.append(time.perf_counter())
            psutil.Process(draw.choice(streams.targets()).pid).kill()
            await streams.mended(last)
            if number % every == 0 or number == num_kills:
                num_requests += len(streams.tally.answers)
                gaps_s += divide_gaps(streams.tally.answers, struck_s)[0]
                # What is kept of answers would look like a leak of the head's.
                streams.tally.answers.clear()
                looks.append(_look(streams, number, num_requests, time.perf_counter() - start_s))
    num_requests += len(streams.tally.answers)
    gaps = gaps_of(gaps_s + divide_gaps(streams.tally.answers, struck_s)[0])
    lost: Counter[str] = Counter()
    for each in streams.tally.different:
        lost[each.difference.kind] += each.difference.num_tokens
        print(f"differs: {each.kind}: {each.difference.text}")
    for broken in streams.tally.broken:
        print(f"broken: {broken.kind}: {broken.reason}")
    warm, end = looks[len(looks) // 10], looks[-1]
    return Row(
        num_kills=num_kills,
        seconds=time.perf_counter() - start_s,
        num_requests=num_requests,
        num_tokens=streams.tally.num_tokens,
        num_broken=len(streams.tally.broken),
        num_different=len(streams.tally.different),
        num_lost_tokens=lost["lost"],
        num_repeated_tokens=lost["repeated"],
        num_incidents=streams.last_incident() - first,
        gap_p50_s=gaps.p50_s,
        gap_p99_s=gaps.p99_s,
        gap_max_s=gaps.max_s,
        rss_growth_percent=100 * (end.rss_mib / warm.rss_mib - 1),
        fds=(warm.num_fds, end.num_fds),
        threads=(warm.num_threads, end.num_threads),
    )


def _look(streams: Streams, num_kills: int, num_requests: int, seconds: float) -> Look:
    head = psutil.Process()
    look = Look(
        num_kills=num_kills,
        seconds=seconds,
        rss_mib=head.memory_info().rss / 2**20,
        num_fds=head.num_fds(),
        num_threads=head.num_threads(),
        num_requests=num_requests,
        num_tokens=streams.tally.num_tokens,
        num_bad=len(streams.tally.broken) + len(streams.tally.different),
    )
    print(
        "{num_kills:5} kills {seconds:7.1f} s  {rss_mib:7.1f} MiB  {num_fds:4} files  "
        "{num_threads:3} threads  {num_requests:5} requests  {num_tokens:7} tokens  "
        "{num_bad} broken or different".format(**structs.asdict(look)),
        flush=True,
    )
    return look
