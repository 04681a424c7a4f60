"""A fleet's starts and moves that go wrong, over nodes and workers that are not real."""

from __future__ import annotations

import threading
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import pytest
from test_fleet_parts import DIMS, FakeWorkers

from shoal.cluster.placement import Placement, divide
from shoal.config import EngineConfig, Split
from shoal.errors import OutOfMemory, PeerLost
from shoal.fleet.fleet import Fleet
from shoal.fleet.muster import Muster
from shoal.fleet.site import Node, Placed
from shoal.parallel.control import Failed, Load
from shoal.weights.source import ModelFiles


class Everywhere(FakeWorkers):
    """Remembers on which node each worker is."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[str, str] = {}

    def start(self, worker: str, node: str, *, num_threads: int) -> None:
        assert num_threads > 0
        self.nodes[worker] = node
        self.started.append(worker)

    @property
    def running(self) -> dict[str, str]:
        return {each: node for each, node in self.nodes.items() if each not in self.stopped}


class Site:
    security = "none"

    def __init__(self, names: str, split: Split) -> None:
        self._nodes = [Node(name=n, address="", num_cores=4, memory_bytes=0) for n in names]
        self._split = split

    def nodes(self) -> list[Node]:
        return self._nodes

    def place(self, nodes: Collection[str]) -> Placed:
        return Placed(placement=divide(DIMS, self._split, sorted(nodes)))

    def predict(self, _placement: Placement, _num_streams: int) -> None:
        return None


def fleet_on(workers: Everywhere, nodes: str, split: Split) -> Fleet:
    config = EngineConfig(model="any", split=split)
    return Fleet(
        config,
        Site(nodes, split),
        Muster(workers, workers, config, path_on=lambda _node: "/model"),
        ModelFiles(name="any", kind="gguf", path=Path("any")),
        object(),
        ExitStack(),
    )


def test_a_replica_that_cannot_form_leaves_no_engine_of_the_others() -> None:
    workers = Everywhere()
    workers.at_form["r1s0t0"] = Failed(epoch=0, kind="PeerLost", message="rank 1 did not come")
    with pytest.raises(PeerLost, match="did not come"):
        fleet_on(workers, "ab", Split(replicas=2))
    assert not workers.running
    assert "shoal-engine" not in {thread.name for thread in threading.enumerate()}


def test_a_drained_replica_moves_to_idle_nodes_rather_than_to_anothers() -> None:
    workers = Everywhere()
    fleet = fleet_on(workers, "abc", Split(replicas=2))
    assert sorted(workers.running.values()) == ["a", "b"]
    fleet.drain("a")
    fleet.close()
    assert [workers.nodes[name] for name in workers.started] == ["a", "b", "c"]


def test_a_move_that_fails_changes_nothing_for_workers_started_later() -> None:
    workers = Everywhere()
    fleet = fleet_on(workers, "ab", Split(replicas=2))
    workers.instead["r0s0t0"] = Failed(epoch=0, kind="OutOfMemory", message="no room")
    with pytest.raises(OutOfMemory):
        fleet.drain("a")
    workers.instead.clear()
    (lost,) = (name for name, node in workers.running.items() if node == "b")
    workers.lines[lost].is_lost = True
    fleet._executors[1].restart(1)
    (load,) = (each for each in workers.lines[workers.started[-1]].told if isinstance(each, Load))
    fleet.close()
    assert (workers.nodes[workers.started[-1]], load.memory_share) == ("b", 1.0)
