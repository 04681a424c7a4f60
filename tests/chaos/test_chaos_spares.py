"""Workers that stand by take over without loading, and are replaced themselves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from mayhem import (
    Answers,
    Streams,
    clean_fleet,
    config_of,
    decoding,
    incident,
    kill,
    mended,
    num_incidents,
    pids,
    same,
    until,
    worker_processes,
)
from scripted_head import eventually
from split_fleets import open_yard

from shoal.fleet.fleet import Fleet

pytestmark = pytest.mark.slow

MOST_LOAD_S = 0.3
"""A shard is read in twice that time on a quiet machine; a cache is taken in a tenth of it."""
REFILL_S = 60.0


class Guarded:
    """A fleet with one spare."""

    def __init__(self, fleet: Fleet) -> None:
        self.engine = fleet.engine
        self.pool = fleet._muster.spares
        self.calm: Answers = Streams(fleet.engine).answers()

    def spare_pids(self) -> set[int]:
        """Those that stand by, prepared or not."""
        return {each.pid for each in worker_processes()} - set(pids(self.engine.stats()))

    def num_prepared(self) -> int:
        return sum(len(spare.shards) for spare in self.pool._spares if not spare.line.is_lost)

    def until_prepared(self, num_shards: int) -> None:
        eventually(
            lambda: self.num_prepared() >= num_shards,
            "no spare was made ready",
            within_s=REFILL_S,
            every_s=0.002,
        )


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    with open_yard() as yard, clean_fleet(yard, config_of(spares=1)) as fleet:
        yield Guarded(fleet)


def test_a_spare_takes_over_at_once(guarded: Guarded) -> None:
    seat = 0
    guarded.until_prepared(4)
    (spare,) = guarded.spare_pids()
    streams = Streams(guarded.engine)
    until(guarded.engine, decoding(streams.before))
    kill(guarded.engine, seat)
    same(guarded.calm, streams.answers())
    stats = guarded.engine.stats()
    assert stats.workers[seat].pid == spare
    told = incident(stats)
    taken, kept = told.decisions
    assert "takes over" in taken and kept == "every KV cache is kept"
    assert told.phases.get("load", 0.0) < MOST_LOAD_S
    assert told.phases.get("start", 0.0) < MOST_LOAD_S


def test_another_stands_by_and_of_two_lost_one_gets_it(guarded: Guarded) -> None:
    guarded.until_prepared(4)
    streams = Streams(guarded.engine)
    until(guarded.engine, decoding(streams.before))
    kill(guarded.engine, 1, 2)
    same(guarded.calm, streams.answers())
    told = incident(guarded.engine.stats())
    assert sum("takes over" in what for what in told.decisions) == 1
    assert sum("starts on" in what for what in told.decisions) == 1
    assert told.decisions[-1] == "every KV cache is kept"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_spare_is_replaced_and_the_next_taken_before_it_is_ready(
    guarded: Guarded, how: signal.Signals
) -> None:
    number = num_incidents(guarded.engine)
    guarded.until_prepared(1)
    (spare,) = guarded.spare_pids()
    streams = Streams(guarded.engine)
    os.kill(spare, how)
    eventually(lambda: spare not in guarded.spare_pids(), "it is still there", within_s=REFILL_S)
    guarded.until_prepared(1)
    assert guarded.num_prepared() < 4
    assert num_incidents(guarded.engine) == number
    kill(guarded.engine, 3)
    same(guarded.calm, streams.answers())
    now = until(guarded.engine, lambda now: mended(now, after=number))
    assert any("takes over" in what for what in incident(now).decisions)


def test_an_idle_fleet_is_whole_again_at_once(guarded: Guarded) -> None:
    guarded.until_prepared(4)
    number = num_incidents(guarded.engine)
    kill(guarded.engine, 0)
    now = until(guarded.engine, lambda now: mended(now, after=number))
    assert incident(now).phases["total"] < 3 * MOST_LOAD_S
    same(guarded.calm, Streams(guarded.engine).answers())
