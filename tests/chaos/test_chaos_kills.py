"""Any worker is killed at any moment: every stream ends as if nothing had happened."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import psutil
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
    mending,
    num_incidents,
    num_incidents_in,
    pid_in,
    prefilling,
    reading,
    same,
    until,
    worker_processes,
)
from split_answers import leads
from split_fleets import open_yard

from shoal.fleet.deployment import AnyEngine
from shoal.request import FinishReason

pytestmark = pytest.mark.slow

SEATS = range(4)
MIN_LEAD = 1e-3


@dataclass
class Ship:
    """A fleet for all kills of this file, and what it answers when nobody dies."""

    engine: AnyEngine
    calm: Answers


@pytest.fixture(scope="module")
def ship() -> Iterator[Ship]:
    with open_yard() as yard, clean_fleet(yard, config_of()) as fleet:
        yield Ship(fleet.engine, Streams(fleet.engine).answers())


def test_nothing_that_is_compared_hangs_by_a_thread(ship: Ship) -> None:
    """What is computed in other company is rounded otherwise: a near tie could go either way."""
    outputs = ship.calm.outputs
    assert min(lead for output in outputs for lead in leads(output)) > MIN_LEAD
    assert outputs[5].samples[0].finish_reason is FinishReason.STOP
    same(ship.calm, Streams(ship.engine).answers())


@pytest.mark.parametrize("seat", SEATS)
def test_a_worker_dies_while_tokens_are_drawn(ship: Ship, seat: int) -> None:
    streams = Streams(ship.engine)
    until(ship.engine, decoding(streams.before))
    kill(ship.engine, seat)
    same(ship.calm, streams.answers())
    assert len(lost_since(ship, streams)) == 1


@pytest.mark.parametrize("seats", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
def test_workers_die_while_prompts_are_read(ship: Ship, seats: tuple[int, ...]) -> None:
    asked = reading(str(seats))
    streams = Streams(ship.engine, asked)
    now = until(ship.engine, prefilling(streams.before))
    kill(ship.engine, *seats)
    answers = streams.answers()
    assert now.generated_tokens == streams.before.generated_tokens, "it was too late"
    assert len(lost_since(ship, streams)) == len(seats)
    same(Streams(ship.engine, asked).answers(), answers)


def test_idle_workers_die(ship: Ship) -> None:
    for seat in SEATS:
        number = num_incidents(ship.engine)
        kill(ship.engine, seat)
        now = until(ship.engine, lambda now, number=number: mended(now, after=number))
        assert incident(now).num_requests == 0
    same(ship.calm, Streams(ship.engine).answers())


@pytest.mark.parametrize("phase", ["start", "load", "form"])
def test_a_survivor_dies_while_another_is_replaced(ship: Ship, phase: str) -> None:
    streams = Streams(ship.engine)
    until(ship.engine, decoding(streams.before))
    kill(ship.engine, 1)
    until(ship.engine, mending(phase, after=num_incidents_in(streams.before)))
    kill(ship.engine, 2)
    same(ship.calm, streams.answers())
    assert len(lost_since(ship, streams)) == 2


@pytest.mark.parametrize("phase", ["start", "load"])
def test_the_one_that_replaces_it_dies_too(ship: Ship, phase: str) -> None:
    before = set(worker_processes())
    streams = Streams(ship.engine)
    until(ship.engine, decoding(streams.before))
    kill(ship.engine, 3)
    until(ship.engine, mending(phase, after=num_incidents_in(streams.before)))
    (substitute,) = wait_for_new(before)
    os.kill(substitute.pid, signal.SIGKILL)
    same(ship.calm, streams.answers())
    assert len(lost_since(ship, streams)) == 2


@pytest.mark.parametrize("seats", [(0, 1), (0, 2), (0, 1, 2, 3)], ids=str)
def test_several_die_at_once(ship: Ship, seats: tuple[int, ...]) -> None:
    streams = Streams(ship.engine)
    until(ship.engine, decoding(streams.before))
    kill(ship.engine, *seats)
    same(ship.calm, streams.answers())
    assert len(lost_since(ship, streams)) == len(seats)


def test_one_seat_loses_its_worker_five_times_in_a_row(ship: Ship) -> None:
    streams = Streams(ship.engine)
    until(ship.engine, prefilling(streams.before))
    dead: set[int] = set()
    for _ in range(5):
        until(ship.engine, lambda now: now.workers[2].pid not in {0, *dead})
        pid = pid_in(ship.engine, 2)
        dead.add(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    same(ship.calm, streams.answers())
    assert len(lost_since(ship, streams)) == 5


def test_a_death_in_every_breath(ship: Ship) -> None:
    """One of the four, in turn, as soon as there is a token from the last time."""
    streams = Streams(ship.engine)
    at = streams.before
    for seat in itertools.islice(itertools.cycle([2, 0, 3, 1]), 4):
        at = until(ship.engine, decoding(at, 4))
        kill(ship.engine, seat)
        until(ship.engine, mending("recompute", after=num_incidents(ship.engine) - 1))
    same(ship.calm, streams.answers())


# ---- what is asked of the story ----------------------------------------------------------


def lost_since(ship: Ship, streams: Streams) -> list[str]:
    """All that were lost; each was noticed at once, and made good."""
    stats = ship.engine.stats()
    new = [each for each in stats.incidents if each.number > num_incidents_in(streams.before)]
    assert {each.outcome for each in new} == {"recovered"}
    assert {each.noticed_by for each in new} <= {"connection", "report"}
    assert ship.engine.health().ok
    return [worker for each in new for worker in each.lost]


def wait_for_new(before: set[psutil.Process]) -> set[psutil.Process]:
    while not (new := set(worker_processes()) - before):
        pass
    return new
