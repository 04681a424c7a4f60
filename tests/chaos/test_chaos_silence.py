"""Frozen workers are replaced, slow ones are not, and a clock that jumps changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

import psutil
import pytest
from mayhem import (
    SQUARE,
    Answers,
    Streams,
    clean_fleet,
    config_of,
    decoding,
    frozen,
    incident,
    kill,
    mended,
    num_incidents,
    num_incidents_in,
    pid_in,
    pids,
    same,
    until,
)
from scripted_head import eventually
from split_fleets import Yard, open_yard

from shoal.fleet.fleet import Fleet

pytestmark = pytest.mark.slow

MOST_SILENCE_S = 1.5
BUSY_PER_CORE = 12
BUSY_S = 8.0
HOUR_S = 3600.0


class Crew:
    def __init__(self, yard: Yard, fleet: Fleet) -> None:
        self.nodes = yard.nodes
        self.engine = fleet.engine
        self.calm: Answers = Streams(fleet.engine).answers()


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with open_yard() as yard, clean_fleet(yard, config_of(split=SQUARE)) as fleet:
        yield Crew(yard, fleet)


@pytest.mark.parametrize("seat", range(4))
def test_a_frozen_worker_is_replaced_and_does_nothing_when_it_thaws(crew: Crew, seat: int) -> None:
    engine, number = crew.engine, num_incidents(crew.engine)
    streams = Streams(engine)
    until(engine, decoding(streams.before))
    sleeper = psutil.Process(pid_in(engine, seat))
    # Of a machine that is out of reach nobody can end the worker.
    crew.nodes.is_deaf = True
    with frozen(sleeper.pid):
        now = until(engine, lambda stats: mended(stats, after=number))
        assert incident(now).noticed_by == "heartbeat"
        assert incident(now).phases["silence"] <= MOST_SILENCE_S
        assert sleeper.is_running()
    same(crew.calm, streams.answers())
    crew.nodes.is_deaf = False
    eventually(lambda: not sleeper.is_running(), "it thawed and did not end")
    assert num_incidents(engine) == number + 1


def test_a_worker_that_pauses_for_half_a_second_is_kept(crew: Crew) -> None:
    engine, before = crew.engine, crew.engine.stats()
    streams = Streams(engine)
    until(engine, decoding(streams.before))
    with frozen(pid_in(engine, 2)):
        time.sleep(0.5)
    same(crew.calm, streams.answers())
    assert pids(engine.stats()) == pids(before)


def test_all_frozen_at_once_are_replaced(crew: Crew) -> None:
    engine = crew.engine
    streams = Streams(engine)
    until(engine, decoding(streams.before))
    for worker in engine.stats().workers:
        os.kill(worker.pid, signal.SIGSTOP)
    same(crew.calm, streams.answers())
    told = incident(engine.stats())
    assert len(told.lost) == 4
    assert told.phases["silence"] <= MOST_SILENCE_S


def test_nobody_is_declared_dead_on_a_machine_under_load(crew: Crew) -> None:
    engine, before = crew.engine, crew.engine.stats()
    streams = Streams(engine)
    with busy_machine():
        time.sleep(BUSY_S)
        assert engine.stats().steps > before.steps, "nothing was computed meanwhile"
    same(crew.calm, streams.answers())
    assert pids(engine.stats()) == pids(before)
    assert num_incidents(engine) == num_incidents_in(before)


def test_the_time_of_day_jumps_to_and_fro_and_nothing_else_changes(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, number = crew.engine, num_incidents(crew.engine)
    streams = Streams(engine)
    until(engine, decoding(streams.before))
    offsets, now = cycle([HOUR_S, -HOUR_S, 0.0]), time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(offsets))
    kill(engine, 1)
    same(crew.calm, streams.answers())
    told = until(engine, lambda stats: mended(stats, after=number))
    monkeypatch.undo()
    assert incident(told).phases["total"] < 60
    assert engine.health().ok


@contextmanager
def busy_machine() -> Iterator[None]:
    """Processes that want every core for themselves; they end by themselves too."""
    script = f"import time\nend = time.monotonic() + {2 * BUSY_S}\nwhile time.monotonic() < end: 1"
    number = BUSY_PER_CORE * (os.cpu_count() or 1)
    busy = [subprocess.Popen([sys.executable, "-IS", "-c", script]) for _ in range(number)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
        for process in busy:
            process.wait()
