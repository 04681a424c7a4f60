"""Failure orders: seeded scenarios of a tiny cluster, a few requests, and faults at any moment.

`python tests/property/failure_orders.py --seed N` tells one again, event by event;
`--orders 100000 --processes 2` plays many.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import Any

from msgspec import structs
from simulated_cluster import NEVER_S, Cluster, Timeline, Worker
from simulated_head import Client, Head, fresh_supervisor

from shoal.cluster.placement import ReplicaPlacement, divide
from shoal.cluster.supervisor import Dismiss, Form, Load, Replan, Start
from shoal.config import Split
from shoal.parallel.partition import Dims
from shoal.request import Request, SamplingParams

DIMS = Dims(num_layers=4, num_query_heads=4, num_kv_heads=2, num_mlp_columns=64, vocab_size=128)
NODES = ("a", "b", "c")
MOST_EVENTS = 6_000
PATIENCE_S = 600.0
"""Everything must have ended so long after the last fault: processes that never call, formations
that time out, and nodes that are left out take minutes."""
PLAIN, STRICT = SamplingParams(max_tokens=None), SamplingParams(max_tokens=None, min_tokens=2)

FAULTS: dict[str, int] = {
    "kill": 6,
    "freeze": 4,
    "cut off for a while": 4,
    "load fails": 2,
    "kill two": 2,
    "kill all": 1,
    "kill again and again": 1,
    "lose a node": 2,
    "lose a node silently": 1,
    "lose all nodes": 1,
    "freeze the head": 2,
    "freeze the head while one is cut off": 1,
}
_ORDERS_PER_COLLECTION = 500
_FAULT_NAMES, _FAULT_WEIGHTS = list(FAULTS), list(FAULTS.values())


class OrderFailed(AssertionError):
    """Names the seed, and tells what happened."""


@cache
def chain(pipeline: int, tensor: int, nodes: tuple[str, ...]) -> ReplicaPlacement:
    return divide(DIMS, Split(pipeline=pipeline, tensor=tensor), nodes).replicas[0]


class Order:
    """One failure order, a function of its seed."""

    def __init__(self, seed: int, *, log: Callable[..., None] | None = None) -> None:
        self.seed = seed
        self.dice = dice = random.Random(seed)
        self.timeline = Timeline()
        self._log = log
        self._split = (1 + (dice.random() < 0.5), 1 + (dice.random() < 0.5))
        self._nodes = NODES[: dice.randint(1, 3)]
        home = frozenset(NODES[:1]) if dice.random() < 0.5 else frozenset()
        self.head = Head(
            self.timeline,
            partial(Cluster, dice, self.timeline),
            fresh_supervisor(chain(*self._split, self._nodes), home),
            self._plan,
            num_spares={dice.choice(self._nodes): dice.randint(0, 2)},
            log=self.log if log else _silent,
            num_blocks=dice.choice((8, 12)),
            max_step_tokens=dice.choice((4, 16)),
            max_running=4,
            max_in_flight=self._split[0],
            max_drafted=(0, 1, 6)[seed % 3],
        )
        self.cluster = self.head.cluster
        self.cluster.nodes_up = set(self._nodes)
        self.cluster.says_twice = dice.random() < 0.3
        self._faults = self._draw_faults()
        self._next_fault = self._faults[-1][0]
        self._last_fault_s = 0.0
        self._to_kill_again = 0
        self._request_ids = 0
        self._came_again = False

    def run(self) -> int:
        """Returns the number of events. Raises AssertionError."""
        head, timeline = self.head, self.timeline
        head.begin()
        for _ in range(self.dice.choice((1, 1, 2, 3))):
            self._submit()
        num_events = 0
        while head.num_open or not self._is_over():
            num_events += 1
            assert num_events < MOST_EVENTS, "no end in sight"
            assert timeline.now_s < self._last_fault_s + PATIENCE_S, "nothing has come of it"
            if num_events >= self._next_fault:
                self._strike(num_events)
            due_s = head.due_s
            if timeline.next_s <= due_s:
                timeline.run_next()
            else:
                assert due_s < NEVER_S, "everybody waits for everybody"
                timeline.now_s = max(due_s, timeline.now_s)
                head.act()
        self._check_end()
        return num_events

    def forget(self) -> None:
        """Its parts know each other: apart, they need no collection of garbage."""
        self.timeline.clear()
        vars(self.head).clear()

    def log(self, *words: Any) -> None:
        assert self._log is not None
        self._log(f"{self.timeline.now_s:9.3f} s  {' '.join(map(_word, words))}")

    # ---- the end --------------------------------------------------------------------------

    def _is_over(self) -> bool:
        """Work goes on, at the latest with a node that returns, and everybody has an answer."""
        if not self.cluster.nodes_up:
            self._return(self._nodes[0])
        if self.head.is_recovering:
            return False
        sent_away = any(client.told_to_come_again for client in self.head.clients.values())
        if sent_away and not self._came_again:
            self._came_again = True
            self._submit()
            return False
        return True

    def _check_end(self) -> None:
        scheduler = self.head.scheduler
        for client in self.head.clients.values():
            client.check_so_far()
        while scheduler.has_work and scheduler._flights:
            self.timeline.run_next()
        counts = scheduler.counts()
        assert (counts.num_waiting, counts.num_running, counts.num_used_blocks) == (0, 0, 0)
        scheduler.check()

    # ---- requests -------------------------------------------------------------------------

    def _submit(self) -> None:
        dice = self.dice
        num_samples = 2 if dice.random() < 0.25 else 1
        prompt = [1] * dice.randint(1, 5) + [dice.randrange(7)]
        stop_ids = frozenset((dice.randrange(7),)) if dice.random() < 0.4 else frozenset()
        stop_after = dice.randint(1, 4) if dice.random() < 0.2 else None
        clients = []
        for _ in range(num_samples):
            self._request_ids += 1
            request = Request(
                request_id=self._request_ids,
                prompt_tokens=prompt,
                params=STRICT if dice.random() < 0.2 else PLAIN,
                max_tokens=dice.randint(1, 5),
                seed=self._request_ids,
                stop_ids=stop_ids,
                group=self._request_ids - len(clients) if num_samples > 1 else None,
            )
            clients.append(Client(request, stop_after))
        self.head.submit(clients)

    # ---- nodes ----------------------------------------------------------------------------

    def _plan(
        self, placement: ReplicaPlacement, without: frozenset[str]
    ) -> ReplicaPlacement | None:
        """Other nodes for the same shards if there are enough, else the layers cut anew."""
        usable = [n for n in self._nodes if n in self.cluster.nodes_up and n not in without]
        if not usable:
            return None
        held = {seat.node for seat in placement.seats}
        idle = [node for node in usable if node not in held]
        lost = sorted(held - set(usable))
        if lost and len(idle) >= len(lost):
            instead = dict(zip(lost, idle, strict=False))
            return _moved(placement, instead)
        pipeline, tensor = self._split
        return chain(min(pipeline, len(usable)), tensor, tuple(usable))

    def _return(self, node: str) -> None:
        if self._log:
            self.log("*** node", node, "is there")
        self.cluster.nodes_up.add(node)
        self._last_fault_s = self.timeline.now_s

    # ---- faults ---------------------------------------------------------------------------

    def _draw_faults(self) -> list[tuple[int, str]]:
        """By number of the event they come before, last first."""
        dice, faults, at = self.dice, [], 0
        names = dice.choices(_FAULT_NAMES, _FAULT_WEIGHTS, k=dice.randint(1, 4))
        for name in names:
            at += int(dice.expovariate(1 / 14))
            faults.append((at, name))
        return [*faults, (MOST_EVENTS, "")][::-1]

    def _strike(self, num_events: int) -> None:
        while self._faults[-1][0] <= num_events:
            _, name = self._faults.pop()
            if self._log:
                self.log("***", name)
            self._last_fault_s = self.timeline.now_s
            self._do(name)
        if self._to_kill_again and num_events % 7 == 0:
            self._to_kill_again -= 1
            self._last_fault_s = self.timeline.now_s
            self._kill(1)
        self._next_fault = num_events if self._to_kill_again else self._faults[-1][0]

    def _do(self, name: str) -> None:  # noqa: C901 (a table)
        dice = self.dice
        match name:
            case "kill":
                self._kill(1)
            case "kill two":
                self._kill(2)
            case "kill all":
                self._kill(4)
            case "kill again and again":
                self._to_kill_again = 7
            case "freeze":
                self._mute(NEVER_S)
            case "cut off for a while":
                self._mute(dice.choice((0.4, 1.2, 1.6, 4.0, 30.0)))
            case "load fails":
                self.cluster.num_bad_loads = dice.choice((1, 1, 2, 8))
            case "lose a node":
                self._lose(dice.choice(self._nodes), silently=False)
            case "lose a node silently":
                self._lose(dice.choice(self._nodes), silently=True)
            case "lose all nodes":
                silently = dice.random() < 0.5
                for node in self._nodes:
                    self._lose(node, silently=silently)
            case "freeze the head":
                self._freeze_head()
            case "freeze the head while one is cut off":
                self._mute(1.2)
                self.timeline.after(1.0, self._freeze_head)
            case _:
                raise AssertionError(f"there is no fault called {name}")

    def _victims(self) -> list[Worker]:
        """Those in seats, in any state; now and then one that has none any more."""
        seats = self.head.supervisor.placement.seats
        workers = [w for s in seats if (w := self.cluster.workers.get(s.worker)) is not None]
        return workers if self.dice.random() < 0.9 else list(self.cluster.workers.values())

    def _kill(self, number: int) -> None:
        victims = [worker for worker in self._victims() if not worker.is_dead]
        for worker in self.dice.sample(victims, min(number, len(victims))):
            if self._log:
                self.log("  kills", worker.name)
            self.cluster.kill(worker)

    def _mute(self, duration_s: float) -> None:
        if victims := self._victims():
            worker = self.dice.choice(victims)
            if self._log:
                self.log("  mutes", worker.name, f"for {duration_s} s")
            self.head.watch_closely()
            self.cluster.mute(worker, duration_s)
            self.head.watch_closely()

    def _freeze_head(self) -> None:
        duration_s = self.dice.choice((0.6, 1.0, 2.0, 40.0))
        if self._log:
            self.log("  freezes the head for", duration_s, "s")
        self.head.watch_closely()
        self.head.pause(duration_s, reads_late=self.dice.random() < 0.5)

    def _lose(self, node: str, *, silently: bool) -> None:
        self.head.watch_closely()
        self.cluster.lose_node(node, silently=silently)
        self.head.watch_closely()
        self.head._num_spares.pop(node, None)
        if self.dice.random() < 0.6:
            self.timeline.after(self.dice.choice((0.5, 3.0, 20.0, 90.0)), self._return, node)


def _moved(placement: ReplicaPlacement, instead: dict[str, str]) -> ReplicaPlacement:
    return ReplicaPlacement(
        stages=tuple(
            tuple(structs.replace(s, node=instead.get(s.node, s.node)) for s in stage)
            for stage in placement.stages
        )
    )


def _word(word: object) -> str:
    match word:
        case Start(seat=seat) | Load(seat=seat):
            return f"     {type(word).__name__} {seat.worker} on {seat.node}"
        case Form() | Dismiss() | Replan():
            return f"     {word}"
        case _:
            return str(word)


def _silent(*_words: Any) -> None:
    pass


def tell(seed: int) -> str:
    """The story of an order, and how it fails if it does."""
    lines: list[str] = []
    try:
        Order(seed, log=lines.append).run()
    except Exception:
        lines.append(traceback.format_exc(limit=-4))
    return "\n".join([f"failure order, seed {seed}", *lines])


def run_orders(seeds: range) -> int:
    """Returns the number of events. Raises OrderFailed."""
    num_events = 0
    gc.disable()  # an order is garbage as a whole, and small
    gc.freeze()
    try:
        for seed in seeds:
            try:
                order = Order(seed)
                num_events += order.run()
                order.forget()
            except Exception:
                raise OrderFailed(tell(seed)) from None
            if seed % _ORDERS_PER_COLLECTION == 0:
                gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
    return num_events


def run_many(num_orders: int, num_processes: int) -> int:
    share = -(-num_orders // (num_processes * 16))
    parts = [range(i, min(i + share, num_orders)) for i in range(0, num_orders, share)]
    with ProcessPoolExecutor(num_processes) as processes:
        return sum(processes.map(run_orders, parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="tell this one")
    parser.add_argument("--orders", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.seed is not None:
        print(tell(options.seed))
        return
    start_s = time.monotonic()
    try:
        num_events = run_many(options.orders, options.processes)
    except OrderFailed as error:
        sys.exit(str(error))
    print(f"{options.orders} orders, {num_events} events, {time.monotonic() - start_s:.1f} s")


if __name__ == "__main__":
    main()
