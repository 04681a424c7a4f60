"""An engine's executor over a crew: restarts, successors, and what workers did before them."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event

import pytest
from crew_fakes import Notes, crew_over, muster_over
from fleet_fakes import QUIET, FakeWorkers, usage
from scripted_head import eventually, nothing_left_behind

from shoal.errors import PeerLost, RetryError
from shoal.fleet.crew import Crew, FirstTrouble
from shoal.fleet.inbox import Lost
from shoal.fleet.muster import Muster
from shoal.fleet.remote_executor import RemoteExecutor
from shoal.messages import Plan, StepResult
from shoal.parallel.control import Form


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


@pytest.fixture
def muster(workers: FakeWorkers) -> Muster:
    return muster_over(workers, home=("here",))


def gathered(muster: Muster) -> Crew:
    crew = crew_over(muster)
    crew.man(FirstTrouble())
    return crew


@pytest.fixture
def executor(muster: Muster) -> RemoteExecutor:
    return RemoteExecutor(gathered(muster), step_timeout_s=1.0)


def refuse() -> None:
    raise RetryError("come again")


def test_a_restart_says_what_the_crew_holds_and_its_epoch(executor: RemoteExecutor) -> None:
    capacity = executor.restart(3, Notes())
    assert (capacity.num_blocks, capacity.max_in_flight, capacity.epoch) == (10, 3, 3)
    assert executor.restart(3, Notes()).epoch == 4, "no epoch comes twice"


def test_steps_go_out_and_results_come_back(executor: RemoteExecutor, workers: FakeWorkers) -> None:
    executor.restart(1, Notes())
    executor.submit(Plan(epoch=1, step=0, chunks=[]))
    workers.lines["r0s2t0-3"].say(StepResult(epoch=1, step=0, results=[]))
    assert executor.collect().step == 0
    assert executor.active_s() > 0
    workers.lines["r0s0t0-1"].die()
    with pytest.raises(PeerLost):
        executor.collect()


def test_a_loss_while_idle_wakes_the_engine(executor: RemoteExecutor, workers: FakeWorkers) -> None:
    woken: list[bool] = []
    executor.watch(lambda: woken.append(executor.wants_restart))
    assert executor.wants_restart, "nobody has formed yet"
    executor.restart(1, Notes())
    assert not executor.wants_restart
    workers.lines["r0s1t0-2"].die()
    assert woken == [True]
    executor.restart(2, Notes())
    assert not executor.wants_restart


def test_a_restart_that_is_given_up_counts_no_usage_twice(
    executor: RemoteExecutor, workers: FakeWorkers
) -> None:
    executor.restart(1, Notes())
    for line in workers.lines.values():
        line.usage = usage(1, 5, 1.0)
    workers.lines["r0s1t0-2"].die()
    for epoch in (2, 3):
        with pytest.raises(RetryError):
            executor.restart(epoch, Notes(refuse))
    assert executor.wants_restart
    capacity = executor.restart(4, Notes())
    assert [each.steps for each in executor.workers()] == [5, 5, 5]
    assert {line.form.epoch for line in workers.lines.values() if not line.dismissed} == {
        capacity.epoch
    }
    assert {each.pid for each in executor.workers()} == {7}


def test_a_successor_takes_over_at_the_next_restart(
    executor: RemoteExecutor, muster: Muster, workers: FakeWorkers
) -> None:
    woken: list[bool] = []
    executor.watch(lambda: woken.append(executor.wants_restart))
    executor.restart(1, Notes())
    done = executor.succeed_with(gathered(muster))
    assert woken == [True] and not done.is_set()
    assert not any(line.heard(Form) > 1 for line in workers.lines.values())
    notes = Notes()
    executor.restart(2, notes)
    assert done.is_set() and not executor.wants_restart
    assert list(executor.crew.members) == ["r0s0t0-4", "r0s1t0-5", "r0s2t0-6"]
    assert notes.decisions == ["the workers that stand ready take over"]
    eventually(lambda: len(workers.running) == 3, "the old workers go on")
    woken.clear()
    workers.lines["r0s0t0-4"].die()
    assert woken == [True], "it hears of the new crew's losses"


def test_a_successor_has_taken_over_only_once_it_has_formed(
    executor: RemoteExecutor, muster: Muster, workers: FakeWorkers
) -> None:
    executor.restart(1, Notes())
    done = executor.succeed_with(gathered(muster))
    workers.at_form["r0s1t0"] = iter([Lost("it hung up")])
    with pytest.raises(PeerLost):
        executor.restart(2, FirstTrouble())
    assert not done.is_set()
    executor.restart(3, Notes())
    assert done.is_set()
    assert [seat.worker for seat in executor.crew.placement.seats] == [
        "r0s0t0-4",
        "r0s1t0-7",
        "r0s2t0-6",
    ]
    eventually(lambda: len(workers.running) == 3, "old workers go on")


def test_a_successor_whose_turn_never_came_is_dismissed(
    executor: RemoteExecutor, muster: Muster, workers: FakeWorkers
) -> None:
    executor.succeed_with(gathered(muster))
    executor.succeed_with(gathered(muster))
    eventually(lambda: workers.lines["r0s2t0-6"].dismissed, "the first successor is kept")
    executor.close()
    eventually(lambda: not workers.running, "somebody is left behind")


def test_a_successor_takes_over_though_the_old_workers_are_still_awaited(
    executor: RemoteExecutor, muster: Muster, workers: FakeWorkers
) -> None:
    executor.restart(1, Notes())
    workers.at_start["r0s1t0"] = iter([QUIET])
    workers.lines["r0s1t0-2"].die()
    successors: list[Event] = []

    def offer() -> None:
        if workers.started[-1] == "r0s1t0-4" and not successors:
            successors.append(executor.succeed_with(gathered(muster)))

    notes = Notes(offer)
    assert executor.restart(2, notes).epoch >= 2
    assert successors[0].is_set() and not executor.wants_restart
    assert notes.lost == ["r0s1t0-2"]
    assert list(executor.crew.members) == ["r0s0t0-5", "r0s1t0-6", "r0s2t0-7"]
    eventually(lambda: len(workers.running) == 3, "old workers go on")
    assert not workers.expected
    executor.close()
