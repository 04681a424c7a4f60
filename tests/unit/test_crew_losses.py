"""Lost, slow and strange workers: who is replaced, and what the others hear of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from crew_fakes import Notes, formed, names, on
from fleet_fakes import LOADED, QUIET, FakeWorkers
from scripted_head import eventually, nothing_left_behind

from shoal.fleet.inbox import Called, Lost
from shoal.messages import StepResult
from shoal.parallel.control import Failed, Form, Formed, Load

FIRST, SECOND, THIRD = "r0s0t0-1", "r0s1t0-2", "r0s2t0-3"
NOT_FORMED = Failed(epoch=0, kind="PeerLost", message="stage 1 did not come")


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


# ---- one is lost ------------------------------------------------------------------------------


def test_the_seat_of_a_lost_one_is_filled_and_only_that_one_loads(workers: FakeWorkers) -> None:
    crew, notes = formed(workers), Notes()
    workers.lines[SECOND].die("reset")
    assert crew.form(2, notes) == 2
    assert names(crew) == [FIRST, "r0s1t0-4", THIRD] and not crew.is_broken
    assert workers.lines["r0s1t0-4"].heard(Load) == 1
    for survivor in (FIRST, THIRD):
        assert [type(each) for each in workers.lines[survivor].told] == [Form]
    assert notes.losses == [(SECOND, "connection", 0.0)] and notes.reasons == ["reset"]
    assert notes.phases == ["form", "start", "load", "form"]
    assert not notes.troubles
    eventually(lambda: workers.stopped == [SECOND], "its process was not ended")
    assert workers.lines[SECOND].dismissed


def test_who_replaces_another_is_told_how_many_blocks_there_are(workers: FakeWorkers) -> None:
    crew = formed(workers)
    workers.at_load["r0s1t0"] = iter([LOADED])
    workers.lines[SECOND].die()
    crew.form(2, Notes())
    load = workers.lines["r0s1t0-4"].told[0]
    assert isinstance(load, Load) and load.num_blocks == LOADED.num_blocks


def test_when_nobody_is_lost_all_only_form_anew(workers: FakeWorkers) -> None:
    crew = formed(workers)
    assert crew.form(7, Notes()) == 7
    assert all([type(each) for each in line.told] == [Form] for line in workers.lines.values())
    assert names(crew) == [FIRST, SECOND, THIRD]


@pytest.mark.parametrize(
    ("script", "loss"),
    [
        ("at_start", Lost("exit status 3")),
        ("at_load", Lost("it hung up")),
        ("at_form", Lost("silent", noticed_by="heartbeat", silence_s=1.4)),
    ],
    ids=["before it calls", "while it loads", "while all form"],
)
def test_one_that_is_lost_on_the_way_is_replaced_too(
    script: str, loss: Lost, workers: FakeWorkers
) -> None:
    crew, notes = formed(workers), Notes()
    workers.lines[SECOND].die()
    getattr(workers, script)["r0s1t0"] = iter([loss])
    crew.form(2, notes)
    assert names(crew) == [FIRST, "r0s1t0-5", THIRD]
    assert notes.losses[1:] == [("r0s1t0-4", loss.noticed_by, loss.silence_s)]
    assert workers.lines[FIRST].heard(Load) == 0
    eventually(lambda: len(workers.running) == 3, "the lost ones were not ended")


def test_a_survivor_that_is_lost_while_another_is_replaced_is_replaced_as_well(
    workers: FakeWorkers,
) -> None:
    crew = formed(workers)
    workers.lines[SECOND].die()
    workers.at_form["r0s0t0"] = iter([Lost("it hung up")])
    notes = Notes()
    crew.form(2, notes)
    assert notes.lost == [SECOND, FIRST]
    assert names(crew) == ["r0s0t0-5", "r0s1t0-4", THIRD]
    assert workers.lines["r0s1t0-4"].heard(Load) == 1, "what it has loaded is kept"


def test_a_load_that_fails_is_tried_with_another_process(workers: FakeWorkers) -> None:
    crew, notes = formed(workers), Notes()
    workers.lines[SECOND].die()
    workers.at_load["r0s1t0"] = iter([Failed(epoch=0, kind="OutOfMemory", message="no room")])
    crew.form(2, notes)
    assert names(crew) == [FIRST, "r0s1t0-5", THIRD]
    assert notes.troubles == ["worker r0s1t0-4: no room"]
    assert notes.lost == [SECOND], "it was there; we hung up"
    assert workers.lines["r0s1t0-4"].dismissed


def test_who_cannot_form_is_asked_again_before_anybody_is_blamed(workers: FakeWorkers) -> None:
    crew, notes = formed(workers), Notes()
    workers.at_form["r0s0t0"] = iter([NOT_FORMED, NOT_FORMED])
    assert crew.form(2, notes) == 4
    assert names(crew) == [FIRST, SECOND, THIRD]
    assert len(notes.troubles) == 2


def test_who_can_never_form_is_replaced(workers: FakeWorkers) -> None:
    crew = formed(workers)
    workers.at_form["r0s0t0"] = iter([NOT_FORMED] * 3)
    assert crew.form(2, Notes()) == 5
    assert names(crew) == ["r0s0t0-4", SECOND, THIRD]


# ---- strangers --------------------------------------------------------------------------------


def test_one_that_calls_with_another_nodes_certificate_is_not_used(workers: FakeWorkers) -> None:
    crew, notes = formed(workers), Notes()
    workers.lines[SECOND].die()
    workers.at_start["r0s1t0"] = iter(["mallory"])
    crew.form(2, notes)
    assert notes.troubles == ["'mallory' called as worker r0s1t0-4, which runs on 'here'"]
    assert names(crew) == [FIRST, "r0s1t0-5", THIRD]
    assert workers.lines["r0s1t0-4"].dismissed
    assert workers.lines["r0s1t0-4"].heard(Load) == 0


def test_what_the_dropped_still_say_changes_nothing(workers: FakeWorkers) -> None:
    crew = formed(workers)
    gone = workers.lines[SECOND]
    gone.die()
    crew.form(2, Notes())
    gone.say(LOADED)
    gone.say(Formed(epoch=3))
    gone.say(Failed(epoch=3, kind="PeerLost", message="stage 0 is silent"))
    crew._inbox.put(SECOND, Lost("once more"))
    crew._inbox.put(SECOND, Called())
    notes = Notes()
    workers.at_form["r0s1t0"] = iter([QUIET])

    def answer_late() -> None:
        line = workers.lines["r0s1t0-4"]
        if line.heard(Form) == 2:
            line.say(Formed(epoch=3))

    notes = Notes(answer_late)
    assert crew.form(3, notes) == 3
    assert not notes.losses and not notes.troubles
    assert names(crew) == [FIRST, "r0s1t0-4", THIRD]
    gone.say(Failed(epoch=3, step=0, kind="PeerLost", message="stage 0 is silent"))
    workers.lines[THIRD].say(StepResult(epoch=3, step=0, results=[]))
    assert crew.next_result(3, timeout_s=1).step == 0


def test_a_call_that_comes_too_late_is_ended(
    workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.cluster.supervisor.CALL_S", 0.05)
    crew = formed(workers)
    workers.lines[SECOND].die()
    workers.at_start["r0s1t0"] = iter([QUIET])
    inbox = crew._inbox
    crew.form(2, Notes())
    assert names(crew) == [FIRST, "r0s1t0-5", THIRD]
    assert "r0s1t0-4" in workers.stopped and not workers.expected
    inbox.put("r0s1t0-4", Called())
    assert crew.form(3, Notes()) == 3
    assert "r0s1t0-4" not in crew.members


def test_a_step_that_failed_before_does_not_count_against_a_load(workers: FakeWorkers) -> None:
    """Survivors report the step in which they missed the lost one, be it late."""
    crew = formed(workers, on("a", "b", "c"), elsewhere=lambda *_: on("a", "c"))
    first, second, third = workers.lines.values()
    second.lose(Lost("silent", noticed_by="heartbeat", silence_s=1.3))
    workers.at_load["r0s0t0"] = iter([QUIET])

    def load_late() -> None:
        if first.heard(Load) == 1 and not first.heard(Form):
            first.say(Failed(epoch=1, step=4, kind="PeerLost", message="stage 1 is silent"))
            first.say(LOADED)

    notes = Notes(load_late)
    crew._muster.share_out([on("a", "c")], {"a": 6, "c": 6})
    crew.form(2, notes)
    assert names(crew) == [first.worker, third.worker] and not notes.troubles
