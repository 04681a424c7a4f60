"""Who calls the head: expected workers, strays of an earlier head, operators, strangers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
from fleet_fakes import PLACEMENT
from reception_calls import Caller, connected, dialled, hello, opened
from scripted_head import WAIT_S, eventually, nothing_left_behind

from shoal.errors import PeerLost
from shoal.fleet import reception as reception_module
from shoal.fleet.inbox import Called, Inbox, Lost
from shoal.fleet.reception import Reception
from shoal.fleet.worker_line import WorkerLine
from shoal.parallel.channel import Channel
from shoal.parallel.endpoint import LocalOnly, dial
from shoal.parallel.head_call import call_head

SHARD = PLACEMENT.seats[0].shard


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def reception() -> Iterator[Reception]:
    with opened() as reception:
        yield reception


def expected(reception: Reception, worker: str) -> Inbox:
    inbox = Inbox()
    reception.expect(worker, inbox)
    return inbox


def strays(reception: Reception, number: int) -> list[WorkerLine]:
    found: list[WorkerLine] = []

    def all_have_come() -> bool:
        found.extend(reception.strays())
        return len(found) >= number

    eventually(all_have_come, "the strays have not come")
    return found


# ---- workers that are expected ----------------------------------------------------------------


def test_connections_are_paired_in_whatever_order_they_come(reception: Reception) -> None:
    inboxes = {worker: expected(reception, worker) for worker in "ab"}
    order = [("a", "up"), ("b", "down"), ("a", "down"), ("b", "up")]
    calls = [dialled(reception, msgspec.msgpack.encode(hello(*each))) for each in order]
    for worker, inbox in inboxes.items():
        assert inbox.take(WAIT_S) == (worker, Called())
        line = reception.take(worker)
        assert (line.worker, line.address) == (worker, f"unix:/{worker}")
        line.dismiss()
    for channel in calls:
        channel.close()


def test_nobody_waits_for_a_process_that_has_ended(reception: Reception) -> None:
    inbox = expected(reception, "w")
    half = dialled(reception, msgspec.msgpack.encode(hello("w")))
    reception.note_end("w", "exit status 3")
    reception.note_end("unknown", "exit status 3")
    assert inbox.take(WAIT_S) == ("w", Lost("exit status 3"))
    half.close()


def test_the_end_of_one_that_has_called_is_told_by_its_line(reception: Reception) -> None:
    line, caller, inbox = connected(reception)
    reception.note_end("w", "exit status 0")
    assert inbox.take(0.01) is None
    line.dismiss()
    caller.close()


def test_one_may_be_waited_for(reception: Reception) -> None:
    def wait(worker: str, inbox: Inbox, within_s: float) -> WorkerLine:
        return reception.wait_for(worker, inbox, deadline_s=time.monotonic() + within_s)

    inbox = expected(reception, "w")
    caller = Caller(reception, hello("w"))
    wait("w", inbox, WAIT_S).dismiss()
    caller.close()
    inbox = expected(reception, "x")
    threading.Timer(0.05, reception.note_end, ("x", "exit status 3")).start()
    with pytest.raises(PeerLost, match="x ended before it called: exit status 3"):
        wait("x", inbox, WAIT_S)
    with pytest.raises(PeerLost, match="did not call in time"):
        wait("y", expected(reception, "y"), 0.01)
    late = Caller(reception, hello("y"))
    assert late.is_told_to_end()
    late.close()


def test_one_that_is_forgotten_is_told_to_end_when_it_calls(reception: Reception) -> None:
    inbox = expected(reception, "w")
    reception.forget("w")
    caller = Caller(reception, hello("w"))
    assert caller.is_told_to_end()
    assert inbox.take(0.01) is None
    caller.close()


def test_one_that_is_forgotten_after_its_call_is_told_to_end(reception: Reception) -> None:
    inbox = expected(reception, "w")
    caller = Caller(reception, hello("w"))
    assert inbox.take(WAIT_S) == ("w", Called())
    reception.forget("w")
    assert caller.is_told_to_end()
    caller.close()


# ---- strays -----------------------------------------------------------------------------------


def test_workers_of_an_earlier_head_wait_until_they_are_taken_in(reception: Reception) -> None:
    callers = [Caller(reception, hello(worker, shards=(SHARD,))) for worker in ("r0-1", "r0-2")]
    lines = strays(reception, 2)
    assert {line.process for line in lines} == {"r0-1", "r0-2"}
    assert all((line.shards, line.epoch, line.pid) == ((SHARD,), 4, 7) for line in lines)
    assert reception.strays() == [], "each is given out once"
    for line in lines:
        line.dismiss()
    for caller in callers:
        caller.close()


def test_strays_that_come_too_late_or_hold_nothing_are_told_to_end(reception: Reception) -> None:
    early = Caller(reception, hello("early", shards=(SHARD,)))
    empty = Caller(reception, hello("empty"))
    assert empty.is_told_to_end()
    reception.turn_away_strays()
    late = Caller(reception, hello("late", shards=(SHARD,)))
    assert early.is_told_to_end() and late.is_told_to_end()
    assert reception.strays() == []
    for caller in (early, empty, late):
        caller.close()


def test_a_stray_that_calls_again_is_there_once(reception: Reception) -> None:
    callers = []
    for _ in range(3):
        callers.append(Caller(reception, hello("w", shards=(SHARD,))))
        callers[-1].close()
    callers.append(Caller(reception, hello("w", shards=(SHARD,))))
    eventually(lambda: reception._strays.get("w") is not None, "it has not come")
    eventually(lambda: not reception._strays["w"].is_lost, "an old line is kept")
    (line,) = reception.strays()
    line.dismiss()
    callers[-1].close()


# ---- others -----------------------------------------------------------------------------------


def test_foreign_silent_and_unknown_callers_are_dropped(
    reception: Reception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception_module, "_HELLO_S", 0.1)
    silent = dial(reception.address, LocalOnly(), timeout_s=WAIT_S)
    rude = dialled(reception, b"\xc1 no msgpack")
    strange = call_head(reception.address, LocalOnly(), hello("w", service="operator"))
    line, caller, _ = connected(reception)
    line.dismiss()
    eventually(lambda: caplog.text.count("is dropped") == 2, "rude or silent ones are kept")
    assert "'operator', which is not served here" in caplog.text
    for channel in (silent, rude, *strange):
        with pytest.raises(PeerLost, match=r"hung up|reset"):
            channel.receive(WAIT_S)
        channel.close()
    caller.close()


def test_a_service_gets_its_caller_and_its_failure_harms_nobody(
    reception: Reception, caplog: pytest.LogCaptureFixture
) -> None:
    def serve(down: Channel, up: Channel) -> None:
        question, _ = up.receive(WAIT_S)
        down.send(question.upper())
        raise ZeroDivisionError

    reception.offer("operator", serve)
    for _ in range(2):
        down, up = call_head(reception.address, LocalOnly(), hello("me", service="operator"))
        up.send(b"status?")
        assert down.receive(WAIT_S)[0] == b"STATUS?"
        with pytest.raises(PeerLost):
            down.receive(WAIT_S)
        down.close()
        up.close()
    assert caplog.text.count("raise ZeroDivisionError") == 2


def test_closing_hangs_up_on_everyone(reception: Reception) -> None:
    started = threading.Event()

    def serve(_down: Channel, up: Channel) -> None:
        started.set()
        up.receive()

    reception.offer("operator", serve)
    unawaited = Caller(reception, hello("stray", shards=(SHARD,)))
    inbox = expected(reception, "called")
    called = Caller(reception, hello("called"))
    assert inbox.take(WAIT_S) == ("called", Called())
    channels = [dialled(reception, msgspec.msgpack.encode(hello("half", "up")))]
    channels += call_head(reception.address, LocalOnly(), hello("me", service="operator"))
    assert started.wait(WAIT_S)
    reception.close()
    for caller in (unawaited, called):
        assert caller.is_told_to_end()
        channels += (caller.down, caller.up)
    for channel in channels:
        with pytest.raises(PeerLost, match=r"hung up|reset"):
            channel.receive(WAIT_S)
        channel.close()
