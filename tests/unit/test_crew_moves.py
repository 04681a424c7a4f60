"""A replica goes elsewhere: who keeps what, and what if there is no place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat

import pytest
from crew_fakes import Notes, formed, names, on
from fleet_fakes import QUIET, FakeWorkers
from scripted_head import eventually, nothing_left_behind

from shoal.cluster.placement import ReplicaPlacement
from shoal.errors import EngineStopped, PlacementError, RetryError
from shoal.fleet.crew import Crew
from shoal.fleet.inbox import Lost
from shoal.parallel.control import Load
from shoal.parallel.partition import Span

FIRST, SECOND, THIRD = "r0s0t0-1", "r0s1t0-2", "r0s2t0-3"


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


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


def test_an_error_that_nobody_has_foreseen_ends_no_recovery(
    workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.cluster.supervisor.REPLAN_S", 0.02)
    answers = iter([KeyError("a"), on("a")])

    def elsewhere(_placement: ReplicaPlacement, _without: frozenset[str]) -> ReplicaPlacement:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    crew = formed(workers, on("a"), elsewhere=elsewhere)
    workers.lines[FIRST].lose(Lost("silent", noticed_by="heartbeat", silence_s=1.3))
    notes = Notes()
    crew.form(2, notes)
    assert notes.troubles == ["KeyError: 'a'"]
    assert names(crew) == ["r0s0t0-2"]
    crew.dismiss()
