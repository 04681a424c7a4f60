"""Heartbeats at the head: who gives none is lost, and told apart from who hangs up."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from reception_calls import Caller, connected, opened
from scripted_head import WAIT_S, nothing_left_behind

from shoal.fleet.inbox import Lost
from shoal.fleet.reception import Reception
from shoal.parallel.control import Alive

DEAD_AFTER_S = 0.5


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def reception() -> Iterator[Reception]:
    with opened(dead_after_s=DEAD_AFTER_S) as reception:
        yield reception


def beat(caller: Caller, stop: threading.Event) -> None:
    while not stop.wait(0.05):
        caller.say(Alive())


def test_a_silent_worker_is_lost_and_one_that_beats_is_not(reception: Reception) -> None:
    silent, mute, inbox = connected(reception, "mute")
    alive, beating, other_inbox = connected(reception, "beating")
    stop = threading.Event()
    thread = threading.Thread(target=beat, args=(beating, stop))
    thread.start()
    taken = inbox.take(WAIT_S)
    assert taken is not None and isinstance(taken[1], Lost)
    assert taken[1].noticed_by == "heartbeat"
    assert DEAD_AFTER_S <= taken[1].silence_s < WAIT_S
    assert silent.is_lost
    assert other_inbox.take(DEAD_AFTER_S) is None and not alive.is_lost
    stop.set()
    thread.join()
    for line, caller in ((silent, mute), (alive, beating)):
        line.dismiss()
        caller.close()


def test_who_has_hung_up_is_not_reported_as_silent_too(reception: Reception) -> None:
    line, caller, inbox = connected(reception)
    caller.close()
    taken = inbox.take(WAIT_S)
    assert taken is not None and isinstance(taken[1], Lost)
    assert taken[1].noticed_by == "connection"
    assert inbox.take(DEAD_AFTER_S + 0.3) is None
    line.dismiss()
