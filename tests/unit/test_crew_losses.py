"""Lost, slow and strange workers: who is replaced, and what the others hear of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat

import pytest
from fleet_fakes import (
    DIMS,
    LOADED,
    PLACEMENT,
    QUIET,
    FakeWorkers,
    Notes,
    crew_over,
    muster_over,
)
from scripted_head import eventually, nothing_left_behind

from shoal.cluster.placement import ReplicaPlacement, divide
from shoal.config import Split
from shoal.errors import EngineStopped, PlacementError, RetryError
from shoal.fleet.crew import Crew, Elsewhere, FirstTrouble
from shoal.fleet.inbox import Called, Lost
from shoal.messages import StepResult
from shoal.parallel.control import Failed, Form, Formed, Load
from shoal.parallel.partition import Span

FIRST, SECOND, THIRD = "r0s0t0-1", "r0s1t0-2", "r0s2t0-3"
NOT_FORMED = Failed(epoch=0, kind="PeerLost", message="stage 1 did not come")


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


def formed(
    workers: FakeWorkers,
    placement: ReplicaPlacement = PLACEMENT,
    *,
    elsewhere: Elsewhere | None = None,
) -> Crew:
    muster = muster_over(workers, placement, home=("here",))
    crew = crew_over(muster, placement, **({"elsewhere": elsewhere} if elsewhere else {}))
    crew.man(FirstTrouble())
    crew.form(1, FirstTrouble())
    for line in workers.lines.values():
        line.told.clear()
    return crew


def names(crew: Crew) -> list[str]:
    return [seat.worker for seat in crew.placement.seats]


def on(*nodes: str) -> ReplicaPlacement:
    return divide(DIMS, Split(pipeline=len(nodes)), nodes).replicas[0]


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


# ---- another placement ------------------------------------------------------------------------


def moving(workers: FakeWorkers, target: ReplicaPlacement) -> tuple[Crew, list[frozenset[str]]]:
    """Over nodes a, b and c; b goes silent, and the replica goes to `target`."""
    asked: list[frozenset[str]] = []

    def elsewhere(_placement: ReplicaPlacement, without: frozenset[str]) -> ReplicaPlacement:
        asked.append(without)
        crew._muster.share_out([target], {seat.node: 6 for seat in target.seats})
        return target

    crew = formed(workers, on("a", "b", "c"), elsewhere=elsewhere)
    workers.lines[SECOND].lose(Lost("silent", noticed_by="heartbeat", silence_s=1.3))
    return crew, asked


def test_survivors_that_keep_their_shard_load_nothing(workers: FakeWorkers) -> None:
    crew, asked = moving(workers, on("a", "d", "c"))
    notes = Notes()
    crew.form(2, notes)
    assert asked == [frozenset("b")]
    assert names(crew) == [FIRST, "r0s1t0-4", THIRD]
    assert workers.nodes_of["r0s1t0-4"] == "d"
    assert workers.lines[FIRST].heard(Load) == workers.lines[THIRD].heard(Load) == 0
    assert "the replica goes to a + d + c" in notes.decisions


def test_survivors_with_another_shard_load_it(workers: FakeWorkers) -> None:
    crew, _ = moving(workers, on("a", "c"))
    crew.form(2, Notes())
    assert names(crew) == [FIRST, THIRD] and len(workers.started) == 3
    loads = [each for each in workers.lines[THIRD].told if isinstance(each, Load)]
    assert [load.shard.layers for load in loads] == [Span(15, 30)]
    assert workers.lines[FIRST].form.next_stage == [workers.lines[THIRD].address]


def test_who_gets_no_seat_is_dismissed_even_if_nobody_waits_for_the_rest(
    workers: FakeWorkers,
) -> None:
    crew, _ = moving(workers, on("d"))
    workers.at_start["r0s0t0"] = repeat(QUIET)

    def stop() -> None:
        raise EngineStopped("shutting down")

    with pytest.raises(EngineStopped):
        crew.form(2, Notes(stop))
    crew.dismiss()
    eventually(lambda: not workers.running, "somebody is left behind")
    assert not workers.expected
    assert all(line.dismissed for line in workers.lines.values())


def test_it_goes_on_asking_for_a_place_until_nobody_waits_any_more(
    workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.cluster.supervisor.REPLAN_S", 0.02)
    asked: list[frozenset[str]] = []

    def elsewhere(_placement: ReplicaPlacement, without: frozenset[str]) -> ReplicaPlacement:
        asked.append(without)
        raise PlacementError("no node is left")

    def give_up() -> None:
        if len(asked) == 4:
            raise RetryError("come again")

    crew = formed(workers, on("a"), elsewhere=elsewhere)
    workers.lines[FIRST].lose(Lost("silent", noticed_by="heartbeat", silence_s=1.3))
    notes = Notes(give_up)
    with pytest.raises(RetryError):
        crew.form(2, notes)
    assert asked == [frozenset("a"), frozenset(), frozenset(), frozenset()]
    assert notes.troubles == ["no node is left"] * 4
    assert crew.is_broken
    monkeypatch.setattr(crew, "_elsewhere", lambda *_: on("a"))
    assert crew.form(3, Notes()) == 3, "a node that comes back is used, after all that"
    assert names(crew) == ["r0s0t0-2"]


def test_a_node_on_which_nothing_can_be_started_is_left_out(workers: FakeWorkers) -> None:
    crew, asked = moving(workers, on("a", "d", "c"))
    targets = iter([on("a", "d", "c"), on("a", "e", "c")])
    elsewhere: Callable[..., ReplicaPlacement] = crew._elsewhere

    def next_target(placement: ReplicaPlacement, without: frozenset[str]) -> ReplicaPlacement:
        elsewhere(placement, without)
        target = next(targets)
        crew._muster.share_out([target], {seat.node: 6 for seat in target.seats})
        return target

    crew._elsewhere = next_target
    workers.at_start["r0s1t0"] = chain([PlacementError("'d' is not there")])
    notes = Notes()
    crew.form(2, notes)
    assert asked == [frozenset("b"), frozenset("bd")]
    assert [seat.node for seat in crew.placement.seats] == ["a", "e", "c"]
    assert notes.troubles == ["'d' is not there"] and not workers.expected
