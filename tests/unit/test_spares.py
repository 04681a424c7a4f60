"""Workers that stand by: kept up in number, with the shards read that they may have to take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from itertools import repeat

import pytest
from fleet_fakes import DIMS, PLACEMENT, QUIET, FakeLine, FakeWorkers
from msgspec import structs
from scripted_head import eventually, nothing_left_behind

from shoal.cluster.placement import Seat, divide
from shoal.config import EngineConfig, Split
from shoal.errors import PlacementError
from shoal.fleet import spares as spares_module
from shoal.fleet.inbox import Lost
from shoal.fleet.spares import SparePool
from shoal.parallel.control import Failed, Prepare, Prepared

SEATS = PLACEMENT.seats
SHARDS = [seat.shard for seat in SEATS]


class Pool:
    """Over fake workers on nodes that a test may change."""

    def __init__(self, workers: FakeWorkers, number: int, *nodes: str) -> None:
        self.nodes = list(nodes or ["here"])
        self.wanted: list[Seat] = list(SEATS)
        self.workers = workers
        self.pool = SparePool(
            workers,  # type: ignore[arg-type]
            workers,  # type: ignore[arg-type]
            EngineConfig(model="any", spares=number),
            path_on=lambda node: f"/{node}/model",
            numbers=itertools.count(1),
        )

    def start(self) -> None:
        self.pool.start(lambda: self.wanted, lambda: self.nodes)

    def prepared(self, worker: str) -> list[object]:
        line = self.workers.lines.get(worker)
        return [] if line is None else [m.shard for m in line.told if isinstance(m, Prepare)]

    def wait_for(self, *names: str, num_shards: int = 3) -> None:
        def all_ready() -> bool:
            return all(len(self.prepared(name)) >= num_shards for name in names)

        eventually(all_ready, f"spares do not stand ready: {self.workers.started}")


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> FakeWorkers:
    monkeypatch.setattr(spares_module, "_LOOK_S", 0.01)
    monkeypatch.setattr(spares_module, "_REST_S", 0.0)
    return FakeWorkers()


@pytest.fixture
def pools() -> Iterator[list[SparePool]]:
    opened: list[SparePool] = []
    yield opened
    for pool in opened:
        pool.close()


def started(workers: FakeWorkers, pools: list[SparePool], number: int, *nodes: str) -> Pool:
    pool = Pool(workers, number, *nodes)
    pools.append(pool.pool)
    pool.start()
    return pool


def test_so_many_as_are_wanted_stand_by_and_read_all_shards(
    workers: FakeWorkers, pools: list[SparePool]
) -> None:
    pool = started(workers, pools, 2)
    pool.wait_for("spare-1", "spare-2")
    assert pool.prepared("spare-1") == SHARDS
    order = workers.lines["spare-1"].told[0]
    assert isinstance(order, Prepare) and order.path == "/here/model"
    assert workers.started == ["spare-1", "spare-2"]


def test_without_a_wish_for_spares_there_are_none(
    workers: FakeWorkers, pools: list[SparePool]
) -> None:
    pool = started(workers, pools, 0)
    assert pool.pool.take(SEATS[0]) is None
    assert not workers.started


def test_spares_are_spread_over_nodes_best_ones_first(
    workers: FakeWorkers, pools: list[SparePool]
) -> None:
    pool = started(workers, pools, 3, "b", "a")
    pool.wait_for("spare-1", "spare-2", "spare-3")
    assert [workers.nodes_of[name] for name in workers.started] == ["b", "a", "b"]
    assert sorted(pool.pool.nodes()) == ["a", "b", "b"]


def test_one_that_is_taken_or_dies_is_replaced(
    workers: FakeWorkers, pools: list[SparePool]
) -> None:
    pool = started(workers, pools, 1)
    pool.wait_for("spare-1")
    line = pool.pool.take(SEATS[0])
    assert line is workers.lines["spare-1"]  # type: ignore[comparison-overlap]
    pool.wait_for("spare-2")
    workers.lines["spare-2"].die()
    pool.wait_for("spare-3")
    assert workers.lines["spare-2"].dismissed and workers.stopped == ["spare-2"]
    assert not workers.lines["spare-1"].dismissed, "it is another's now"


def test_who_recovers_is_given_time_before_the_next_spare_starts(
    workers: FakeWorkers, pools: list[SparePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = started(workers, pools, 1)
    pool.wait_for("spare-1")
    monkeypatch.setattr(spares_module, "_REST_S", 0.2)
    pool.pool.take(SEATS[0])
    with pytest.raises(AssertionError):
        eventually(lambda: len(workers.started) > 1, "not yet", within_s=0.1)
    pool.wait_for("spare-2")


def test_the_one_that_has_read_the_shard_is_taken_first(
    workers: FakeWorkers, pools: list[SparePool]
) -> None:
    pool = Pool(workers, 0)
    pools.append(pool.pool)
    for name, shard in zip("abc", SHARDS, strict=True):
        line = FakeLine(name, workers)
        line.shards = (shard,)
        pool.pool.adopt(line, "here")  # type: ignore[arg-type]
    assert workers.adopted == ["a", "b", "c"]
    for index, name in ((1, "b"), (2, "c"), (1, "a")):
        line = pool.pool.take(SEATS[index])
        assert line is not None and line.process == name
    assert pool.pool.take(SEATS[0]) is None


def test_only_one_that_lives_on_the_seats_node_is_taken(
    workers: FakeWorkers, pools: list[SparePool]
) -> None:
    pool = Pool(workers, 0)
    pools.append(pool.pool)
    pool.pool.adopt(FakeLine("a", workers), "there")  # type: ignore[arg-type]
    dead = FakeLine("b", workers)
    pool.pool.adopt(dead, "here")  # type: ignore[arg-type]
    dead.die()
    assert pool.pool.take(SEATS[0]) is None
    taken = pool.pool.take(structs.replace(SEATS[0], node="there"))
    assert taken is not None and taken.process == "a"


def test_what_a_spare_cannot_hold_it_is_not_asked_for_again(
    workers: FakeWorkers, pools: list[SparePool]
) -> None:
    refusal = Prepared(shard=SHARDS[1], held=False, reason="70 MB are free, 300 MB are needed")
    failure = Failed(epoch=0, kind="SourceError", message="the file is broken")
    held = Prepared(shard=SHARDS[0], held=True)
    workers.at_prepare["spare"] = iter([held, refusal, failure])
    pool = started(workers, pools, 1)
    pool.wait_for("spare-1")
    pool.wanted = [*SEATS, *divide(DIMS, Split(pipeline=2), ["here"]).replicas[0].seats]
    pool.wait_for("spare-1", num_shards=5)
    asked = pool.prepared("spare-1")
    assert asked[:3] == SHARDS and len(set(map(str, asked))) == 5
    assert not workers.lines["spare-1"].dismissed, "its process is of use all the same"
    other = FakeLine("other", workers)
    other.shards = (SHARDS[1],)
    pool.pool.adopt(other, "here")  # type: ignore[arg-type]
    assert pool.pool.take(SEATS[1]) is other  # type: ignore[comparison-overlap]


def test_one_that_is_taken_while_it_reads_reports_to_its_new_crew(
    workers: FakeWorkers, pools: list[SparePool]
) -> None:
    workers.at_prepare["spare"] = iter([QUIET])
    pool = started(workers, pools, 1)
    pool.wait_for("spare-1", num_shards=1)
    line = pool.pool.take(SEATS[2])
    assert line is not None and line.process == "spare-1"
    pool.wait_for("spare-2")
    assert len(pool.prepared("spare-1")) == 1


@pytest.mark.parametrize(
    "trouble", [PlacementError("the node is gone"), Lost("exit status 3"), QUIET]
)
def test_one_that_does_not_come_is_not_waited_for_and_tried_again(
    trouble: object, workers: FakeWorkers, pools: list[SparePool]
) -> None:
    workers.at_start["spare"] = iter([trouble, trouble])  # type: ignore[list-item]
    pool = started(workers, pools, 1)
    pool.wait_for("spare-3")
    assert not workers.expected
    assert set(workers.running) == {"spare-3"}


def test_closing_leaves_nobody(workers: FakeWorkers) -> None:
    workers.at_prepare["spare"] = repeat(QUIET)
    pool = Pool(workers, 2)
    pool.start()
    pool.wait_for("spare-1", num_shards=1)
    pool.pool.adopt(FakeLine("r0s0t0-1", workers), "here")  # type: ignore[arg-type]
    pool.pool.close()
    assert not workers.running and "r0s0t0-1" in workers.stopped
    assert all(line.dismissed for line in workers.lines.values())
    assert pool.pool.take(SEATS[0]) is None


def test_those_beyond_a_number_are_dismissed(workers: FakeWorkers, pools: list[SparePool]) -> None:
    pool = Pool(workers, 0)
    pools.append(pool.pool)
    for name in "abc":
        pool.pool.adopt(FakeLine(name, workers), "here")  # type: ignore[arg-type]
    pool.pool.reduce(1)
    assert workers.stopped == ["b", "c"]
    assert pool.pool.take(SEATS[0]) is not None


def test_one_on_a_node_that_is_not_used_any_more_goes_elsewhere(
    workers: FakeWorkers, pools: list[SparePool]
) -> None:
    pool = started(workers, pools, 1, "a", "b")
    pool.wait_for("spare-1")
    pool.nodes = ["b"]
    pool.wait_for("spare-2")
    assert workers.running == {"spare-2": "b"}
