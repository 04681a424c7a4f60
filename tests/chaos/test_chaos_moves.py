"""Workers die while others are about to take over: restarts, rebalances, drains, full nodes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from mayhem import (
    Answers,
    Streams,
    clean_fleet,
    config_of,
    decoding,
    incident,
    kill,
    mending,
    num_incidents_in,
    pids,
    same,
    until,
    worker_processes,
)
from scripted_head import eventually
from split_fleets import Yard, open_yard

from shoal.errors import PeerLost
from shoal.fleet.fleet import Fleet

pytestmark = pytest.mark.slow

MOVE_S = 60.0


class Pair:
    """A fleet over two nodes; both stages have a rank on each."""

    def __init__(self, yard: Yard, fleet: Fleet, pool: ThreadPoolExecutor) -> None:
        self.nodes = yard.nodes
        self.fleet = fleet
        self.engine = fleet.engine
        self.calm: Answers = Streams(fleet.engine).answers()
        self._pool = pool

    def begin(self, move: Callable[[], str]) -> tuple[Future[str], set[int]]:
        """A move that new workers have been started for, and their process ids."""
        old = set(pids(self.engine.stats()))
        moving = self._pool.submit(move)
        eventually(lambda: len(self._others(old)) == 4, "no new workers", within_s=MOVE_S)
        return moving, self._others(old)

    def seats(self) -> list[str]:
        return [worker.node for worker in self.engine.stats().workers]

    def _others(self, old: set[int]) -> set[int]:
        return {each.pid for each in worker_processes()} - old


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with open_yard() as yard, ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # its thread is none that a fleet leaves behind
        yard.nodes.names = ["left", "right"]
        with clean_fleet(yard, config_of()) as fleet:
            yield Pair(yard, fleet, pool)


def test_an_old_worker_dies_while_all_are_being_replaced(pair: Pair) -> None:
    streams = Streams(pair.engine)
    until(pair.engine, decoding(streams.before))
    moving, new = pair.begin(lambda: pair.fleet.restart(1))
    kill(pair.engine, 0)
    same(pair.calm, streams.answers())
    assert moving.result(MOVE_S) == "4 workers replaced, without a break"
    assert set(pids(pair.engine.stats())) <= new | {each.pid for each in worker_processes()}
    assert not set(pids(pair.engine.stats())) & set(pids(streams.before))


def test_a_new_worker_dies_before_it_can_take_over(pair: Pair) -> None:
    streams = Streams(pair.engine)
    moving, new = pair.begin(lambda: pair.fleet.restart(1))
    os.kill(min(new), signal.SIGKILL)
    with pytest.raises(PeerLost, match="is lost"):
        moving.result(MOVE_S)
    same(pair.calm, streams.answers())
    assert pids(pair.engine.stats()) == pids(streams.before)
    eventually(lambda: len(worker_processes()) == 4, "new workers are left")


def test_a_full_node_is_done_without(pair: Pair) -> None:
    pair.nodes.full = {"right"}
    streams = Streams(pair.engine)
    until(pair.engine, decoding(streams.before))
    kill(pair.engine, pair.seats().index("right"))
    same(pair.calm, streams.answers())
    assert set(pair.seats()) == {"left"}
    assert "the replica goes to left/left + left/left" in incident(pair.engine.stats()).decisions
    pair.nodes.full = set()


def test_streams_wait_for_a_place(pair: Pair) -> None:
    pair.nodes.full = {"left", "right"}
    streams = Streams(pair.engine)
    until(pair.engine, decoding(streams.before))
    kill(pair.engine, 1)
    now = until(pair.engine, mending("start", after=num_incidents_in(streams.before)))
    assert incident(now).outcome == "under way"
    time.sleep(0.5)
    pair.nodes.full = set()
    same(pair.calm, streams.answers())
    assert incident(pair.engine.stats()).outcome == "recovered"


def test_a_worker_dies_during_a_rebalance(pair: Pair) -> None:
    streams = Streams(pair.engine)
    moving, _ = pair.begin(pair.fleet.rebalance)
    kill(pair.engine, 3)
    same(pair.calm, streams.answers())
    assert "1 replica moved" in moving.result(MOVE_S)
    assert set(pair.seats()) == {"left", "right"}


def test_all_old_workers_die_during_a_drain(pair: Pair) -> None:
    streams = Streams(pair.engine)
    moving, _ = pair.begin(lambda: pair.fleet.drain("right"))
    kill(pair.engine, 0, 1, 2, 3)
    same(pair.calm, streams.answers())
    assert "right is drained" in moving.result(MOVE_S)
    assert set(pair.seats()) == {"left"}
