"""What routing achieves and costs: `python bench/router.py [--requests N] [--replicas N]`.

Method: requests arrive at random times (Poisson) at simulated replicas and stay open for a
log-normal time (sigma 1), as many as keep the mean load at 8 per replica; nothing slows down when
a replica is crowded, so that all routes see the same arrivals and durations. The workload is
conversations: each begins with one of 200 system prompts (popularity 1/rank, 64 to 512 tokens),
every turn adds 96 tokens and is the last one with probability 1/3. There are three conversations
for each open request; the one that has waited longest goes on. Each replica has a cache of its own
(LRU, 1,024 blocks of 16 tokens), simulated for every tenth; the router knows only its own decisions
and that number.

Printed: the fullest replica and the 99th percentile over the mean load (mean over samples taken
every 1,000 arrivals, after a tenth of the run), the part of prompt tokens found in the caches, and
the CPU time of `Router.start` and `Router.finish` per request (this thread's, so that neighbours do
not count; reading the clock is in it, and is shown). Beside them, in the same run: the
least that the `prefix` route must do, hashing the prompts' blocks; and the most that any router
could find in the caches: all but what the last turn has added.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import random
import statistics
from array import array
from collections import OrderedDict, deque
from itertools import accumulate
from time import thread_time_ns
from typing import get_args

import msgspec
from rich.console import Console
from rich.table import Table

from shoal.cluster.router import NEIGHBOUR_TOKENS, Router, Ticket
from shoal.config import Route
from shoal.schedule.prefix import HashChain

BLOCK_SIZE = 16
CACHE_BLOCKS = 1024
MEAN_LOAD = 8
NUM_SYSTEM_PROMPTS = 200
TURN_TOKENS = 96
SAMPLE_EVERY = 1000
SWEEP = (0, 16, 32, 64, 128, 256, 512)


class Row(msgspec.Struct, kw_only=True):
    route: str
    neighbour_tokens: int | None
    max_over_mean: float
    p99_over_mean: float
    hit_rate: float
    most_hits: float
    start_us: float
    start_p99_us: float
    finish_us: float


class Conversation:
    """A growing prompt, and the digests of its blocks."""

    __slots__ = ("chain", "tokens")

    def __init__(self, system_prompt: list[int]) -> None:
        self.tokens = system_prompt.copy()
        self.chain = HashChain(BLOCK_SIZE)

    def grow(self, draw: random.Random) -> None:
        first = draw.randrange(49_000)
        self.tokens += range(first, first + TURN_TOKENS)
        self.chain.extend(self.tokens)


class Cache:
    """What a replica really holds: blocks, least recently used out first."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def compute(self, digests: list[bytes]) -> int:
        """The number of blocks that were there; then all are."""
        num_found = 0
        for digest in digests:
            if digest not in self._blocks:
                break
            num_found += 1
        for digest in reversed(digests):
            self._blocks[digest] = None
            self._blocks.move_to_end(digest)
        while len(self._blocks) > CACHE_BLOCKS:
            self._blocks.popitem(last=False)
        return num_found


class Workload:
    """The same conversations in the same order for the same seed."""

    def __init__(self, num_open: int, seed: int) -> None:
        self._draw = random.Random(seed)
        self._prompts = [
            [self._draw.randrange(49_000) for _ in range(self._draw.randint(4, 32) * BLOCK_SIZE)]
            for _ in range(NUM_SYSTEM_PROMPTS)
        ]
        self._popularity = list(accumulate(1 / (rank + 1) for rank in range(NUM_SYSTEM_PROMPTS)))
        self._idle = deque(self._begin() for _ in range(3 * num_open))

    def next_turn(self) -> Conversation:
        """Who has waited longest; rarely, when all are being answered, a new one."""
        conversation = self._idle.popleft() if self._idle else self._begin()
        conversation.grow(self._draw)
        return conversation

    def answered(self, conversation: Conversation) -> None:
        self._idle.append(self._begin() if self._draw.random() < 1 / 3 else conversation)

    def _begin(self) -> Conversation:
        (prompt,) = self._draw.choices(self._prompts, cum_weights=self._popularity)
        return Conversation(prompt)


class Simulation:
    """One route's run. Time is counted in mean durations of a request."""

    def __init__(
        self, route: Route, num_replicas: int, seed: int, neighbour_tokens: int = NEIGHBOUR_TOKENS
    ) -> None:
        self.router = Router(
            route, seed=seed, block_size=BLOCK_SIZE, neighbour_tokens=neighbour_tokens
        )
        names = [f"replica-{i}" for i in range(num_replicas)]
        for name in names:
            self.router.join(name, cache_blocks=CACHE_BLOCKS)
        self._caches = {name: Cache() for name in names[::10]}
        self._draw = random.Random(seed + 1)
        self._workload = Workload(MEAN_LOAD * num_replicas, seed + 2)
        self._rate = MEAN_LOAD * num_replicas
        self._open: list[tuple[float, int, Ticket, Conversation]] = []
        self.start_ns, self.finish_ns = array("q"), array("q")
        self.ratios: list[tuple[float, float]] = []
        self.num_prompt_tokens = self.num_new_tokens = self.num_hit_tokens = 0

    def run(self, num_requests: int) -> None:
        now = 0.0
        for number in range(num_requests):
            now += self._draw.expovariate(self._rate)
            self._finish_until(now)
            conversation = self._workload.next_turn()
            ticket = self._start(conversation)
            ends = now + self._draw.lognormvariate(-0.5, 1.0)
            heapq.heappush(self._open, (ends, number, ticket, conversation))
            if number % SAMPLE_EVERY == 0 and number > num_requests // 10:
                self._sample()

    def _start(self, conversation: Conversation) -> Ticket:
        began_ns = thread_time_ns()
        ticket = self.router.start(conversation.tokens)
        self.start_ns.append(thread_time_ns() - began_ns)
        assert ticket is not None
        cache = self._caches.get(ticket.replica)
        if cache is not None:
            self.num_hit_tokens += cache.compute(conversation.chain.digests) * BLOCK_SIZE
            self.num_prompt_tokens += len(conversation.tokens)
            self.num_new_tokens += TURN_TOKENS
        return ticket

    def _finish_until(self, now: float) -> None:
        while self._open and self._open[0][0] <= now:
            _, _, ticket, conversation = heapq.heappop(self._open)
            began_ns = thread_time_ns()
            self.router.finish(ticket)
            self.finish_ns.append(thread_time_ns() - began_ns)
            self._workload.answered(conversation)

    def _sample(self) -> None:
        loads = sorted(self.router.loads.values())
        mean = statistics.fmean(loads)
        self.ratios.append((loads[-1] / mean, loads[int(0.99 * (len(loads) - 1))] / mean))


def measure(route: Route, arguments: argparse.Namespace, neighbour_tokens: int) -> Row:
    gc.collect()
    simulation = Simulation(route, arguments.replicas, arguments.seed, neighbour_tokens)
    simulation.run(arguments.requests)
    start_us = [ns / 1000 for ns in simulation.start_ns]
    return Row(
        route=route,
        neighbour_tokens=neighbour_tokens if route == "prefix" else None,
        max_over_mean=round(statistics.fmean(most for most, _ in simulation.ratios), 2),
        p99_over_mean=round(statistics.fmean(p99 for _, p99 in simulation.ratios), 2),
        hit_rate=round(simulation.num_hit_tokens / simulation.num_prompt_tokens, 4),
        most_hits=round(1 - simulation.num_new_tokens / simulation.num_prompt_tokens, 4),
        start_us=round(statistics.median(start_us), 2),
        start_p99_us=round(statistics.quantiles(start_us, n=100)[-1], 2),
        finish_us=round(statistics.median(simulation.finish_ns) / 1000, 2),
    )


def hash_us(arguments: argparse.Namespace) -> float:
    """The median µs of hashing a prompt's blocks."""
    workload = Workload(MEAN_LOAD * 100, arguments.seed)
    times_us = []
    for _ in range(20_000):
        conversation = workload.next_turn()
        began_ns = thread_time_ns()
        HashChain(BLOCK_SIZE).extend(conversation.tokens)
        times_us.append((thread_time_ns() - began_ns) / 1000)
        workload.answered(conversation)
    return round(statistics.median(times_us), 2)


def clock_us() -> float:
    times_ns = []
    for _ in range(10_000):
        began_ns = thread_time_ns()
        times_ns.append(thread_time_ns() - began_ns)
    return statistics.median(times_ns) / 1000


def cases(arguments: argparse.Namespace) -> list[tuple[Route, int]]:
    if arguments.sweep:
        return [("least-loaded", 0), *(("prefix", tokens) for tokens in SWEEP)]
    return [(route, NEIGHBOUR_TOKENS) for route in arguments.route or get_args(Route)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000, help="(1000000)")
    parser.add_argument("--replicas", type=int, default=1000, help="(1000)")
    parser.add_argument("--seed", type=int, default=1, help="(1)")
    parser.add_argument("--route", action="append", choices=get_args(Route), help="(all)")
    parser.add_argument("--sweep", action="store_true", help="what a neighbour is worth, instead")
    arguments = parser.parse_args()
    floor_us = hash_us(arguments)
    table = Table(
        "route", "neighbour", "max/mean", "p99/mean", "hits", "most", "start µs", "p99 µs", "end µs"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [measure(route, arguments, tokens) for route, tokens in cases(arguments)]
    for row in rows:
        table.add_row(
            row.route,
            "" if row.neighbour_tokens is None else str(row.neighbour_tokens),
            *(f"{value:.2f}" for value in (row.max_over_mean, row.p99_over_mean)),
            f"{row.hit_rate:.1%}",
            f"{row.most_hits:.1%}",
            *(f"{value:.1f}" for value in (row.start_us, row.start_p99_us, row.finish_us)),
        )
    console = Console()
    console.print(table)
    console.print(f"hashing a prompt: {floor_us:.1f} µs; reading the clock: {clock_us():.1f} µs")
    summary = {
        "benchmark": "router",
        "replicas": arguments.replicas,
        "requests": arguments.requests,
    }
    summary |= {"hash_us": floor_us, "rows": msgspec.to_builtins(rows)}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
