"""A fleet's starts, losses and moves, over nodes and workers that are not real."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path

import pytest
from fleet_fakes import DIMS, LOADED, QUIET, FakeLine, FakeWorkers
from scripted_head import eventually, nothing_left_behind

from shoal.cluster.placement import Placement, divide
from shoal.config import EngineConfig, Split
from shoal.errors import EngineStopped, OutOfMemory, PeerLost, PlacementError
from shoal.fleet.fleet import Fleet
from shoal.fleet.inbox import Lost
from shoal.fleet.muster import Muster
from shoal.fleet.session import Session
from shoal.fleet.site import Node, Placed
from shoal.parallel.control import Failed, Form, Load, Prepare
from shoal.weights.source import ModelFiles


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


class Site:
    security = "none"

    def __init__(self, names: str, split: Split) -> None:
        self._nodes = [Node(name=n, address="", num_cores=4, memory_bytes=0) for n in names]
        self._split = split

    def nodes(self) -> list[Node]:
        return self._nodes

    def place(self, nodes: Collection[str]) -> Placed:
        if not nodes:
            raise PlacementError("no node is left to run the model on")
        return Placed(placement=divide(DIMS, self._split, sorted(nodes)))

    def predict(self, _placement: Placement, _num_streams: int) -> None:
        return None


def fleet_on(
    workers: FakeWorkers,
    nodes: str,
    split: Split,
    *,
    spares: int = 0,
    session: Session | None = None,
) -> Fleet:
    config = EngineConfig(model="any", split=split, spares=spares)
    first_number = 1 if session is None else session.first_number
    muster = Muster(
        workers,  # type: ignore[arg-type]
        workers,  # type: ignore[arg-type]
        config,
        path_on=lambda _node: "/model",
        first_number=first_number,
    )
    resources = ExitStack()
    resources.callback(muster.spares.close)
    return Fleet(
        config,
        Site(nodes, split),
        muster,
        ModelFiles(name="any", kind="gguf", path=Path("any")),
        object(),  # type: ignore[arg-type]
        resources,
        session,
    )


def load_of(workers: FakeWorkers, worker: str) -> Load:
    (load,) = (each for each in workers.lines[worker].told if isinstance(each, Load))
    return load


def silent() -> Lost:
    return Lost("silent for 1.30 s", noticed_by="heartbeat", silence_s=1.3)


# ---- starting ---------------------------------------------------------------------------------


def test_a_replica_that_cannot_form_leaves_no_engine_of_the_others(workers: FakeWorkers) -> None:
    failure = Failed(epoch=0, kind="PeerLost", message="rank 1 did not come")
    workers.at_form["r1s0t0"] = repeat(failure)
    with pytest.raises(PeerLost, match="did not come"):
        fleet_on(workers, "ab", Split(replicas=2))
    assert not workers.running


def test_a_replica_that_cannot_load_leaves_no_worker_of_the_others(workers: FakeWorkers) -> None:
    workers.at_load["r1s0t0"] = repeat(Failed(epoch=0, kind="OutOfMemory", message="no room"))
    with pytest.raises(OutOfMemory):
        fleet_on(workers, "ab", Split(replicas=2))
    assert not workers.running


def test_the_workers_of_a_head_that_was_killed_are_used_again(
    workers: FakeWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.fleet.muster._COME_BACK_S", 0.2)
    Session(tmp_path).note(num_workers=3)
    seats = divide(DIMS, Split(pipeline=2), "ab").replicas[0].seats
    left = []
    # In an order that is not the seats', and one that nobody needs.
    for worker, node, seat in (("r0s1t0-2", "b", seats[1]), ("r0s0t0-1", "a", seats[0])):
        line = FakeLine(worker, workers)
        line.shards, line.peers, line.epoch = (seat.shard,), {node}, 5
        left.append(line)
    excess = FakeLine("r0s0t0-9", workers)
    excess.shards, excess.peers = (seats[0].shard,), {"b"}
    workers.callers = [*left, excess]
    fleet = fleet_on(workers, "ab", Split(pipeline=2), session=Session(tmp_path))
    assert workers.started == [], "nothing is started that is there"
    assert [line.heard(Load) for line in left] == [1, 1] and excess.dismissed
    assert [load.shard for load in loads(left)] == [seats[1].shard, seats[0].shard]
    assert left[0].form.epoch > 5
    fleet.close()
    assert all(line.dismissed for line in left)


def loads(lines: list[FakeLine]) -> list[Load]:
    return [each for line in lines for each in line.told if isinstance(each, Load)]


# ---- losses -----------------------------------------------------------------------------------


def test_a_worker_lost_while_nothing_is_asked_is_replaced_at_once(workers: FakeWorkers) -> None:
    fleet = fleet_on(workers, "ab", Split(pipeline=2))
    workers.lines["r0s1t0-2"].die()
    eventually(lambda: "r0s1t0-3" in workers.lines, "nobody is started in its place")
    eventually(lambda: workers.lines["r0s1t0-3"].heard(Form) == 1, "they do not form")
    fleet.close()
    assert not workers.running


def test_an_idle_node_stands_in_for_a_silent_one(workers: FakeWorkers) -> None:
    fleet = fleet_on(workers, "abc", Split(pipeline=2))
    survivor = workers.lines["r0s0t0-1"]
    workers.lines["r0s1t0-2"].lose(silent())
    eventually(lambda: "r0s1t0-3" in workers.lines, "nobody is started elsewhere")
    eventually(lambda: workers.lines["r0s1t0-3"].heard(Form) == 1, "they do not form")
    assert workers.nodes_of["r0s1t0-3"] == "c"
    assert survivor.heard(Load) == 1, "it keeps what it holds"
    fleet.close()


def test_a_spare_stands_in_for_a_lost_worker_and_is_replaced(
    workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.fleet.spares._LOOK_S", 0.01)
    monkeypatch.setattr("shoal.fleet.spares._REST_S", 0.05)
    fleet = fleet_on(workers, "a", Split(pipeline=2), spares=1)
    eventually(lambda: len(workers.started) == 3, "no spare is started")
    spare = workers.started[2]
    eventually(lambda: workers.lines[spare].heard(Prepare) == 2, "it has not read the shards")
    workers.lines["r0s1t0-2"].die()
    eventually(lambda: workers.lines[spare].heard(Form) == 1, "the spare is not taken")
    eventually(lambda: len(workers.started) == 4, "the spare is not replaced")
    assert [name.partition("-")[0] for name in workers.started[2:]] == ["spare", "spare"]
    fleet.close()
    assert not workers.running


# ---- moves ------------------------------------------------------------------------------------


def test_a_drained_replica_moves_to_idle_nodes_rather_than_to_anothers(
    workers: FakeWorkers,
) -> None:
    fleet = fleet_on(workers, "abc", Split(replicas=2))
    assert sorted(workers.running.values()) == ["a", "b"]
    fleet.drain("a")
    fleet.close()
    assert [workers.nodes_of[name] for name in workers.started] == ["a", "b", "c"]


def test_a_move_that_fails_changes_nothing_for_workers_started_later(workers: FakeWorkers) -> None:
    fleet = fleet_on(workers, "ab", Split(replicas=2))
    workers.at_load["r0s0t0"] = iter([Failed(epoch=0, kind="OutOfMemory", message="no room")])
    with pytest.raises(OutOfMemory):
        fleet.drain("a")
    (lost,) = (name for name, node in workers.running.items() if node == "b")
    num_started = len(workers.started)
    workers.lines[lost].die()
    eventually(lambda: len(workers.started) > num_started, "it is not replaced")
    recruit = workers.started[-1]
    eventually(lambda: workers.lines[recruit].heard(Form) == 1, "they do not form")
    assert (workers.nodes_of[recruit], load_of(workers, recruit).memory_share) == ("b", 1.0)
    fleet.close()


@pytest.mark.parametrize("num_together", [1, 2, 2**16])
def test_a_restart_replaces_every_worker_where_it_is(
    workers: FakeWorkers, num_together: int
) -> None:
    fleet = fleet_on(workers, "ab", Split(replicas=2))
    before = dict(workers.running)
    assert fleet.restart(num_together) == "2 workers replaced, without a break"
    eventually(lambda: not before.keys() & workers.running.keys(), "the old ones do not go")
    assert sorted(workers.running.values()) == ["a", "b"]
    fleet.close()
    assert not workers.running


def test_a_restart_takes_no_spare_from_before_it(workers: FakeWorkers) -> None:
    fleet = fleet_on(workers, "a", Split(pipeline=2), spares=1)
    eventually(lambda: len(fleet._muster.spares._spares) == 1, "no spare is started")
    before = set(workers.running)
    fleet.restart(1)
    eventually(lambda: not before & workers.running.keys(), "an old one still runs")
    fleet.close()


def test_a_rolling_restart_that_fails_ends_where_it_is(workers: FakeWorkers) -> None:
    fleet = fleet_on(workers, "ab", Split(replicas=2))
    before = dict(workers.running)
    failed = Failed(epoch=0, kind="OutOfMemory", message="no room for both")
    workers.at_load["r0s0t0"] = iter([failed])
    with pytest.raises(OutOfMemory, match="no room for both"):
        fleet.restart(1)
    assert dict(workers.running) == before
    assert len(workers.started) == 3, "nothing was begun with the next replica"
    fleet.close()


def test_a_fleet_that_is_closed_waits_for_no_move(workers: FakeWorkers) -> None:
    fleet = fleet_on(workers, "ab", Split())
    workers.at_form["r0s0t0"] = iter([QUIET])
    with ThreadPoolExecutor(1) as pool:
        moving = pool.submit(fleet.drain, "a")
        eventually(lambda: len(workers.started) == 2, "nobody is to take over")
        eventually(lambda: workers.lines[workers.started[1]].heard(Form) == 1, "it does not form")
        start_s = time.monotonic()
        fleet.close()
        assert time.monotonic() - start_s < 5
        assert isinstance(moving.exception(), EngineStopped)
    eventually(lambda: not workers.running, "somebody is left behind")


def test_who_recovers_does_not_go_to_a_node_that_is_being_drained(
    workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.cluster.supervisor.REPLAN_S", 0.02)
    fleet = fleet_on(workers, "ab", Split(replicas=2))
    workers.at_load["r0s0t0"] = iter([QUIET])
    with ThreadPoolExecutor(1) as pool:
        draining = pool.submit(fleet.drain, "a")
        eventually(lambda: len(workers.started) == 3, "the drain does not begin")
        workers.lines["r1s0t0-2"].lose(silent())
        eventually(lambda: len(workers.started) == 4, "it is not replaced")
        eventually(lambda: workers.lines[workers.started[3]].heard(Form) == 1, "it does not form")
        workers.lines[workers.started[2]].say(LOADED)
        assert "1 replica moved" in draining.result()
    eventually(lambda: len(workers.running) == 2, "the old one goes on")
    assert set(workers.running.values()) == {"b"}
    fleet.close()
