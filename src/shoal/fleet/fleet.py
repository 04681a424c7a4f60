"""A model over workers: its replicas, who holds what, and moving that while streams go on."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from msgspec import structs

from shoal.cluster.placement import ReplicaPlacement, Seat
from shoal.cluster.router import Router
from shoal.config import EngineConfig
from shoal.engine.assembly import assemble, draft_model_of_head, model_info
from shoal.engine.replicas import ReplicatedEngine
from shoal.engine.serving import ServingEngine
from shoal.errors import EngineStopped, PlacementError
from shoal.fleet.crew import Crew, FirstTrouble
from shoal.fleet.forecast import Forecast
from shoal.fleet.muster import Muster
from shoal.fleet.remote_executor import RemoteExecutor
from shoal.fleet.session import Session
from shoal.fleet.site import Node, Site
from shoal.fleet.status import FleetStatus, NodeStatus, ReplicaStatus
from shoal.fleet.wording import count, describe, where
from shoal.fleet.worker_line import WorkerLine
from shoal.parallel.address import parse_address
from shoal.parallel.endpoint import UNNAMED_PEERS
from shoal.weights.source import ModelFiles
from shoal.weights.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_SWITCH_S = 120.0
_LOOK_S = 0.25
# Of a node that is to stand in for another: measured memory differs a little from start to start.
_AS_LARGE = 0.9


class Fleet:
    """`engine` serves. Close the fleet when done: it ends its workers."""

    def __init__(
        self,
        config: EngineConfig,
        site: Site,
        muster: Muster,
        files: ModelFiles,
        tokenizer: Tokenizer,
        resources: ExitStack,
        session: Session | None = None,
    ) -> None:
        """Raises PlacementError, PeerLost, and what kept a worker from loading.

        With a session, workers that an earlier head has left are taken back.

        `resources` are closed with the fleet, or when it cannot be made.
        """
        self._config = config
        self._site = site
        self._muster = muster
        self._resources = resources
        self._drained: set[tuple[str, str]] = set()
        self._moving = threading.Lock()
        self._placing = threading.Lock()
        self._session = session
        self._is_closing = False
        self._executors: list[RemoteExecutor] = []
        self._engines: list[ServingEngine] = []
        try:
            self._take_back()
            self.placed = site.place(self._usable_nodes())
            self._start_executors(self.placed.placement.replicas)
            for executor in self._executors:
                self._engines.append(self._engine(executor, files, tokenizer))
        except BaseException:
            for engine in self._engines:
                engine.close()
            for executor in self._executors:
                executor.close()
            resources.close()
            raise
        self._settle()
        self.engine = _behind_one_door(self._engines, config)
        self._forecast = Forecast(site, self._executors, self.engine.stats)

    @property
    def control(self) -> str:
        return self._muster.control

    def forecast(self) -> str:
        return self._forecast.text()

    def close(self) -> None:
        self._is_closing = True
        self.engine.close()
        with self._moving:
            for executor in self._executors:
                executor.close()  # of workers that were to take over, and came too late
            self._resources.close()

    # ---- what an operator asks for --------------------------------------------------------

    def status(self) -> FleetStatus:
        states = self.engine.health().replicas
        engines = zip(_names(self._engines), self._engines, strict=True)
        return FleetStatus(
            model=self.engine.info.name,
            description=self.engine.info.description,
            security=self._site.security,
            predicted=self.forecast(),
            nodes=self._node_statuses(),
            replicas=[
                ReplicaStatus(name=name, ok=health.ok, reason=health.reason, stats=engine.stats())
                for name, engine in engines
                for health in [states.get(name) or engine.health()]
            ],
        )

    def drain(self, node: str) -> str:
        """Move the work away from a node; no stream breaks, and the node gets nothing more.

        Blocks until it has moved. Raises PlacementError, and nothing has changed then.
        """
        with self._moving:
            usable = self._usable_nodes()
            if node not in usable:
                known = ", ".join(sorted(usable)) or "none"
                raise PlacementError(f"'{node}' runs no work here; the nodes in use: {known}")
            if len(usable) == 1:
                raise PlacementError(f"'{node}' is the only node left: let another join first")
            starts = {_start(each) for each in self._site.nodes() if each.name == node}
            self._drained |= starts  # now: what recovers meanwhile must not go there
            try:
                moved = self._move_away(node, [name for name in usable if name != node])
            except BaseException:
                self._drained -= starts
                raise
            return f"{node} is drained: {moved} moved, nothing of it is used any more"

    def rebalance(self) -> str:
        """Place the model anew over all nodes that are there and not drained.

        Blocks until it has moved. Raises PlacementError, and nothing has changed then.
        """
        with self._moving:
            placed = self._site.place(self._usable_nodes())
            wanted = placed.placement.replicas
            if len(wanted) != len(self._executors):
                raise PlacementError(
                    f"the best placement has {len(wanted)} replicas, {len(self._executors)} run: "
                    "start 'shoal serve' anew to change their number"
                )
            pairs = zip(self._executors, wanted, strict=True)
            changes = [
                (executor, target)
                for executor, target in pairs
                if _seating(executor.crew.placement) != _seating(target)
            ]
            if not changes:
                return "the placement is already the best: nothing moved"
            for executor, target in changes:
                self._change(executor, target)
            self.placed = placed
            return f"{count(len(changes), 'replica')} moved: {where(wanted)}"

    def restart(self, num_together: int) -> str:
        """Replace all workers, in so many replicas at a time: new ones load beside the old.

        Raises what keeps some from loading; their replicas, and the next, keep the old ones then.
        """
        with self._moving, ThreadPoolExecutor(len(self._executors), "shoal-restart") as pool:
            self._muster.spares.reduce(0)  # they are as old, and others come
            for first in range(0, len(self._executors), num_together):
                some = self._executors[first : first + num_together]
                list(pool.map(self._change, some, [each.crew.placement for each in some]))
            return f"{count(len(self._seats()), 'worker')} replaced, without a break"

    # ---- moving ---------------------------------------------------------------------------

    def _move_away(self, node: str, usable: Sequence[str]) -> str:
        touched = [
            executor
            for executor in self._executors
            if any(seat.node == node for seat in executor.crew.placement.seats)
        ]
        for executor in touched:
            self._change(executor, self._replacement(executor.crew.placement, usable))
        return count(len(touched), "replica")

    def _elsewhere(self, placement: ReplicaPlacement, without: frozenset[str]) -> ReplicaPlacement:
        """For a replica that has lost a node. Raises PlacementError."""
        with self._placing:  # or two that lost the same node would take the same idle one
            usable = [name for name in self._usable_nodes() if name not in without]
            target = self._substituted(placement, usable) or self._replacement(placement, usable)
            others = [each for each in self._placements() if each != placement]
            self._share_out([*others, target])
            return target

    def _placements(self) -> list[ReplicaPlacement]:
        return [executor.crew.placement for executor in self._executors]

    def _substituted(
        self, placement: ReplicaPlacement, usable: Sequence[str]
    ) -> ReplicaPlacement | None:
        """The same shards, with idle nodes in place of those that cannot be used: then only these
        have anything to load. None if there are too few that are as large."""
        memory = {node.name: node.memory_bytes for node in self._site.nodes()}
        idle = set(usable) - _nodes_of(self._placements())
        ready = self._muster.spares.nodes()
        best = sorted(idle, key=lambda name: (name not in ready, -memory[name]))
        instead: dict[str, str] = {}
        for lost in sorted(_nodes_of([placement]) - set(usable)):
            fits = [name for name in best if memory[name] >= memory.get(lost, 0) * _AS_LARGE]
            if not fits:
                return None
            best.remove(fits[0])
            instead[lost] = fits[0]
        return _moved(placement, instead)

    def _replacement(self, placement: ReplicaPlacement, usable: Sequence[str]) -> ReplicaPlacement:
        """On what is left of a replica's own nodes if they can hold it, else with idle ones, else
        on any."""
        own = _nodes_of([placement]) & set(usable)
        others = _nodes_of(each for each in self._placements() if each != placement)
        for nodes in (own, own | set(usable) - others):
            if not nodes:
                continue
            try:
                return self._site.place(nodes).placement.replicas[0]
            except PlacementError as error:
                log.info("%s cannot take over: %s", ", ".join(sorted(nodes)), error)
        return self._site.place(usable).placement.replicas[0]

    def _change(self, executor: RemoteExecutor, target: ReplicaPlacement) -> None:
        """New workers load while the old ones go on; then the replica restarts with them."""
        others = [each.crew.placement for each in self._executors if each is not executor]
        self._share_out([*others, target])
        try:
            crew = self._gather(target)
        except BaseException:
            self._share_out([*others, executor.crew.placement])
            raise
        done = executor.succeed_with(crew)
        deadline_s = time.monotonic() + _SWITCH_S
        while not done.wait(_LOOK_S):
            self._check_wanted()
            if time.monotonic() >= deadline_s:
                raise PlacementError(
                    f"the new workers have not taken over within {_SWITCH_S:.0f} s"
                )

    def _gather(self, placement: ReplicaPlacement) -> Crew:
        """New workers for every seat, loaded. Raises what goes wrong first."""
        crew = Crew(placement, self._muster, self._config, elsewhere=self._elsewhere)
        try:
            crew.man(FirstTrouble(self._check_wanted))
        except BaseException:
            crew.dismiss()
            raise
        return crew

    def _share_out(self, placements: Sequence[ReplicaPlacement]) -> None:
        most = self._config.num_threads or sys.maxsize
        cores = {node.name: min(node.num_cores, most) for node in self._site.nodes()}
        self._muster.share_out(placements, cores)

    # ---- starting -------------------------------------------------------------------------

    def _start_executors(self, placements: Sequence[ReplicaPlacement]) -> None:
        self._share_out(placements)
        with ThreadPoolExecutor(len(placements), "shoal-start") as pool:
            crews = [pool.submit(self._gather, placement) for placement in placements]
        failed = [crew.exception() for crew in crews if crew.exception() is not None]
        self._executors = [
            RemoteExecutor(crew.result(), step_timeout_s=self._config.stall_s)
            for crew in crews
            if crew.exception() is None
        ]
        for error in failed:
            if error is not None:
                raise error

    def _engine(
        self, executor: RemoteExecutor, files: ModelFiles, tokenizer: Tokenizer
    ) -> ServingEngine:
        capacity = executor.restart(0, FirstTrouble())
        loaded = executor.crew.description
        info = model_info(
            self._config,
            files,
            num_blocks=capacity.num_blocks,
            max_context=loaded.max_context,
            vocab_size=loaded.vocab_size,
            can_generate=True,
            description=f"{loaded.description}, {describe(executor.crew)}",
        )
        draft_model = draft_model_of_head(self._config, tokenizer)
        return assemble(self._config, executor, capacity, tokenizer, info, draft_model=draft_model)

    def _check_wanted(self) -> None:
        if self._is_closing:
            raise EngineStopped("the fleet is shutting down")

    def _take_back(self) -> None:
        if self._session is None or not self._session.num_workers_before:
            return
        before = self._session.num_workers_before
        number = self._muster.take_back(before, self._node_of)
        log.warning("%d of %d workers of the last head are taken back", number, before)

    def _node_of(self, line: WorkerLine) -> str:
        """By its certificate, or else by where it listens."""
        named = line.peers - set(UNNAMED_PEERS)
        if named:
            return named.pop()
        host = getattr(parse_address(line.address), "host", None)
        nodes = self._site.nodes()
        return next((node.name for node in nodes if node.address == host), nodes[0].name)

    def _settle(self) -> None:
        self._muster.settle()
        self._muster.spares.reduce(self._config.spares)
        self._muster.spares.start(self._seats, self._spare_nodes)
        if self._session is not None:
            self._session.note(num_workers=len(self._seats()) + self._config.spares)

    def _seats(self) -> list[Seat]:
        return [seat for placement in self._placements() for seat in placement.seats]

    def _spare_nodes(self) -> list[str]:
        """Those without work first: there a spare can stand in for its node's neighbours."""
        busy = _nodes_of(self._placements())
        return sorted(self._usable_nodes(), key=lambda name: (name in busy, name))

    # ---- nodes ----------------------------------------------------------------------------

    def _usable_nodes(self) -> list[str]:
        """Those that are there and not drained; one that left and came back is a new one."""
        nodes = self._site.nodes()
        return [node.name for node in nodes if node.alive and _start(node) not in self._drained]

    def _node_statuses(self) -> list[NodeStatus]:
        seats = [seat for each in self._executors for seat in each.crew.placement.seats]
        return [
            NodeStatus(
                name=node.name,
                address=node.address,
                alive=node.alive,
                drained=_start(node) in self._drained,
                device=f"cpu, {count(node.num_cores, 'core')}",
                memory_bytes=node.memory_bytes,
                num_workers=sum(seat.node == node.name for seat in seats),
            )
            for node in self._site.nodes()
        ]


def _behind_one_door(
    engines: Sequence[ServingEngine], config: EngineConfig
) -> ServingEngine | ReplicatedEngine:
    if len(engines) == 1:
        return engines[0]
    router = Router(config.split.route, block_size=config.block_size)
    return ReplicatedEngine(dict(zip(_names(engines), engines, strict=True)), router)


def _nodes_of(placements: Iterable[ReplicaPlacement]) -> set[str]:
    return {seat.node for placement in placements for seat in placement.seats}


def _moved(placement: ReplicaPlacement, instead: Mapping[str, str]) -> ReplicaPlacement:
    stages = (
        tuple(structs.replace(seat, node=instead.get(seat.node, seat.node)) for seat in stage)
        for stage in placement.stages
    )
    return ReplicaPlacement(stages=tuple(stages))


def _names(engines: Sequence[ServingEngine]) -> list[str]:
    return [f"r{index}" for index in range(len(engines))]


def _seating(placement: ReplicaPlacement) -> list[tuple[str, object]]:
    """Who sits where, whatever the workers are called."""
    return [(seat.node, seat.shard) for seat in placement.seats]


def _start(node: Node) -> tuple[str, str]:
    return node.name, node.start
