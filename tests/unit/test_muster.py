"""Workers are got together: from spares or as new processes, and those of an earlier head."""

from __future__ import annotations

import pytest
from crew_fakes import Notes, crew_over, muster_over
from fleet_fakes import DIMS, PLACEMENT, FakeLine, FakeWorkers

from shoal.cluster.placement import divide
from shoal.config import Split
from shoal.errors import PlacementError
from shoal.fleet import muster as muster_module
from shoal.fleet.crew import Crew, FirstTrouble
from shoal.fleet.inbox import Called, Inbox
from shoal.fleet.muster import Muster
from shoal.parallel.control import Form, Load

SEAT = PLACEMENT.seats[1]


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


@pytest.fixture
def muster(workers: FakeWorkers) -> Muster:
    return muster_over(workers, home=("here",))


def gathered(muster: Muster) -> Crew:
    crew = crew_over(muster)
    crew.man(FirstTrouble())
    crew.form(1, FirstTrouble())
    return crew


def stray(worker: str, *, pid: int = 7) -> FakeLine:
    line = FakeLine(worker)
    line.shards = (SEAT.shard,)
    line.epoch, line.pid = 6, pid
    return line


def test_a_worker_that_cannot_be_started_is_not_expected(
    muster: Muster, workers: FakeWorkers
) -> None:
    workers.at_start["r0s1t0"] = iter([PlacementError("no such node")])
    with pytest.raises(PlacementError):
        muster.fill(SEAT, Inbox())
    assert not workers.expected


def test_a_spare_takes_over_where_there_is_one(muster: Muster, workers: FakeWorkers) -> None:
    crew = gathered(muster)
    spare = stray("r0s1t0-90")
    muster.spares.adopt(spare, "here")
    workers.lines["r0s1t0-2"].die()
    notes = Notes()
    crew.form(2, notes)
    assert crew.members["r0s1t0-4"].line is spare  # type: ignore[comparison-overlap]
    assert [type(each) for each in spare.told] == [Load, Form]
    assert notes.decisions == ["r0s1t0-90 takes over on here as r0s1t0-4"]
    assert len(workers.started) == 3, "no process was started"
    assert crew.placement.seats[1].worker == "r0s1t0-4"
    crew.dismiss()
    assert spare.dismissed and "r0s1t0-90" in workers.stopped, "stopped under its process's name"


def test_the_epoch_is_later_than_that_of_the_spares_earlier_head(muster: Muster) -> None:
    muster.spares.adopt(stray("r0s1t0-90"), "here")
    crew = crew_over(muster)
    crew.man(FirstTrouble())
    assert crew.form(1, FirstTrouble()) == 7


def test_a_spare_that_dies_as_it_is_taken_is_replaced(muster: Muster, workers: FakeWorkers) -> None:
    crew = gathered(muster)
    spare = stray("r0s1t0-90")
    muster.spares.adopt(spare, "here")
    workers.lines["r0s1t0-2"].die()
    inbox = crew._inbox
    take = inbox.take

    def die_first(timeout_s: float) -> object:
        taken = take(timeout_s)
        if taken is not None and isinstance(taken[1], Called):
            spare.die()
        return taken

    inbox.take = die_first  # type: ignore[method-assign,assignment]
    notes = Notes()
    crew.form(2, notes)
    assert notes.lost == ["r0s1t0-2", "r0s1t0-4"]
    assert crew.placement.seats[1].worker == "r0s1t0-5"


def test_a_spare_is_given_up_with_its_seat(muster: Muster, workers: FakeWorkers) -> None:
    spare = stray("r0s1t0-90")
    muster.spares.adopt(spare, "here")
    muster.fill(SEAT, Inbox())
    muster.give_up(SEAT.worker)
    assert spare.dismissed and workers.stopped == ["r0s1t0-90"]


def test_workers_of_an_earlier_head_are_taken_back(
    muster: Muster, workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muster_module, "_COME_BACK_S", 0.1)
    workers.callers = [stray("r0s0t0-1"), stray("r0s1t0-2")]
    assert muster.take_back(2, lambda _line: "here") == 2
    assert workers.adopted == ["r0s0t0-1", "r0s1t0-2"]
    assert muster.take_back(1, lambda _line: "here") == 0, "it does not wait for ever"


def test_one_that_is_gone_by_the_time_it_is_adopted_keeps_nobody_from_starting(
    muster: Muster, workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muster_module, "_COME_BACK_S", 0.1)
    gone = stray("r0s0t0-1", pid=0)
    workers.callers = [gone, stray("r0s1t0-2")]
    assert muster.take_back(2, lambda _line: "here") == 1
    assert gone.dismissed and workers.adopted == ["r0s1t0-2"]


def test_those_that_come_when_all_are_there_are_turned_away(
    muster: Muster, workers: FakeWorkers
) -> None:
    workers.callers = [stray("r0s0t0-1")]
    (late,) = workers.callers
    muster.settle()
    assert late.dismissed


def test_a_worker_lost_while_another_placement_is_prepared_is_replaced_where_it_was(
    muster: Muster, workers: FakeWorkers
) -> None:
    crew = gathered(muster)
    muster.share_out(divide(DIMS, Split(pipeline=2), ["there"]).replicas, {"there": 4})
    workers.lines["r0s1t0-2"].die()
    crew.form(2, Notes())
    assert workers.nodes_of["r0s1t0-4"] == "here"
