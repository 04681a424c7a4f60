"""The head's connections with one worker: what is passed on, and when it counts as lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from fleet_fakes import usage
from reception_calls import connected, opened
from scripted_head import WAIT_S, eventually, nothing_left_behind

from shoal.errors import PeerLost
from shoal.fleet import worker_line as worker_line_module
from shoal.fleet.inbox import Inbox, Lost
from shoal.fleet.reception import Reception
from shoal.parallel.control import Alive, Fetching, Formed, OpenCache, Stop


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def reception() -> Iterator[Reception]:
    with opened() as reception:
        yield reception


def test_messages_go_both_ways_and_signs_of_life_are_no_reports(reception: Reception) -> None:
    line, caller, inbox = connected(reception)
    assert (line.worker, line.address, line.pid, line.epoch) == ("w", "unix:/w", 7, 4)
    line.send(OpenCache(num_blocks=3))
    assert caller.hear() == OpenCache(num_blocks=3)
    before_s = line.heard_s
    for message in (Alive(), usage(0, 5, 1.0), Formed(epoch=0)):
        caller.say(message)
    assert inbox.take(WAIT_S) == ("w", Formed(epoch=0))
    assert line.usage == usage(0, 5, 1.0) and line.heard_s > before_s
    line.dismiss()
    assert caller.hear() == Stop()
    caller.close()


def test_what_was_fetched_is_told_to_who_wants_to_know(reception: Reception) -> None:
    line, caller, inbox = connected(reception)
    told: list[tuple[str, int, int | None]] = []
    line.report = lambda *progress: told.append(progress)
    caller.say(Fetching(what="weights", done_bytes=1, total_bytes=2))
    caller.say(Formed(epoch=0))
    assert inbox.take(WAIT_S) == ("w", Formed(epoch=0))
    assert told == [("weights", 1, 2)]
    line.dismiss()
    caller.close()


def test_a_worker_that_hangs_up_is_lost(reception: Reception) -> None:
    line, caller, inbox = connected(reception)
    lost = threading.Event()
    line.report_to(inbox, lost.set)
    caller.close()
    assert lost.wait(WAIT_S) and line.is_lost
    taken = inbox.take(WAIT_S)
    assert taken is not None and isinstance(taken[1], Lost)
    assert taken[1].noticed_by == "connection"
    line.dismiss()


def test_only_the_first_reason_for_a_loss_counts(reception: Reception) -> None:
    line, caller, inbox = connected(reception)
    calls: list[None] = []
    line.report_to(inbox, lambda: calls.append(None))
    silent = Lost("silent for 1.30 s", noticed_by="heartbeat", silence_s=1.3)
    line.lose(silent)
    line.lose(Lost("reset"))
    caller.close()
    line.dismiss()
    assert inbox.take(WAIT_S) == ("w", silent)
    assert inbox.take(0.01) is None and len(calls) == 1


def test_a_loss_is_told_again_to_who_comes_later(reception: Reception) -> None:
    """Such as the crew for which a spare is taken that has just died."""
    line, caller, _ = connected(reception)
    caller.close()
    eventually(lambda: line.is_lost, "its loss was not noticed")
    later = Inbox()
    line.worker = "r0s1t0-4"
    line.report_to(later)
    taken = later.take(WAIT_S)
    assert taken is not None and taken[0] == "r0s1t0-4" and isinstance(taken[1], Lost)
    line.dismiss()


def test_reports_go_to_the_last_inbox_under_the_last_name(reception: Reception) -> None:
    line, caller, before = connected(reception)
    after = Inbox()
    line.worker = "r0s0t0-2"
    line.report_to(after)
    caller.say(Formed(epoch=1))
    assert after.take(WAIT_S) == ("r0s0t0-2", Formed(epoch=1))
    assert before.take(0.01) is None and line.process == "w"
    line.dismiss()
    caller.close()


def test_a_line_whose_reports_cannot_be_heard_is_lost(
    reception: Reception, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever waits for the worker must hear of it: loading may take an hour."""

    def broken(_what: str, _done_bytes: int, _total_bytes: int | None) -> None:
        raise BrokenPipeError(32, "nobody reads the terminal")

    line, caller, inbox = connected(reception)
    line.report = broken
    caller.say(Fetching(what="weights", done_bytes=1, total_bytes=2))
    taken = inbox.take(WAIT_S)
    assert taken is not None and isinstance(taken[1], Lost) and "nobody reads" in taken[1].reason
    assert line.is_lost and "cannot be taken" in caplog.text
    line.dismiss()
    caller.close()


def test_a_line_that_cannot_be_sent_to_is_lost(reception: Reception) -> None:
    """It must not be taken for alive until its other connection breaks as well."""
    line, caller, _ = connected(reception)
    caller.down.close()
    with pytest.raises(PeerLost):
        line.send(OpenCache(num_blocks=3))
    assert line.is_lost
    line.dismiss()
    caller.close()


def test_a_worker_that_does_not_read_is_lost(
    reception: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen one must not keep its head waiting for ever, with whoever waits for that."""
    monkeypatch.setattr(worker_line_module, "_SEND_S", 0.1)
    line, caller, _ = connected(reception)
    with pytest.raises(PeerLost, match="silent"):
        line.send_encoded(bytes(2**24))
    assert line.is_lost
    line.dismiss()
    caller.close()


def test_a_loss_ends_a_send_to_a_worker_that_does_not_read(reception: Reception) -> None:
    """Else the engine would wait for the frozen one long after it was noticed."""
    line, caller, _ = connected(reception)
    silent = Lost("silent for 1.30 s", noticed_by="heartbeat", silence_s=1.3)
    noticing = threading.Timer(0.1, line.lose, [silent])
    noticing.start()
    start_s = time.monotonic()
    with pytest.raises(PeerLost):
        line.send_encoded(bytes(2**24))
    assert time.monotonic() - start_s < worker_line_module._SEND_S / 2
    noticing.join()
    line.dismiss()
    caller.close()
