"""A fleet of values, and a head that serves it to operators over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import structs

from shoal.engine.api import EngineStats, Incident, WorkerStats
from shoal.errors import PlacementError
from shoal.fleet.operator import OperatorService
from shoal.fleet.reception import Reception
from shoal.fleet.serving_file import register
from shoal.fleet.state import StateFolder
from shoal.fleet.status import FleetStatus, NodeStatus, ReplicaStatus
from shoal.parallel.endpoint import LocalOnly, listen

TICK_S = 0.01


def fake_node(name: str, *, alive: bool = True, drained: bool = False) -> NodeStatus:
    return NodeStatus(
        name=name,
        address=f"10.0.0.{len(name)}",
        alive=alive,
        drained=drained,
        device="cpu, 8 cores",
        memory_bytes=16 * 2**30,
        num_workers=1,
    )


def fake_worker(stage: int, node: str, **counters: float) -> WorkerStats:
    return WorkerStats(
        worker=f"r0s{stage}t0-{stage + 1}",
        node=node,
        stage=stage,
        rank=0,
        layers=(15 * stage, 15 * stage + 15),
        **counters,  # type: ignore[arg-type]
    )


LOST = Incident(
    number=1,
    replica="r0",
    cause="reset by the other side",
    noticed_by="connection",
    began_s=1_800_000_000.0,
    epoch=4,
    lost=["r0s1t0-5"],
    decisions=["w7 starts on local", "epoch 5 begins"],
    phases={"load": 0.31, "start": 0.02, "recompute": 0.25, "form": 0.04, "total": 0.62},
    num_requests=12,
    outcome="recovered",
)


def fake_incident(**changes: object) -> Incident:
    return structs.replace(LOST, **changes)


def fake_status(
    *,
    nodes: tuple[NodeStatus, ...] = (fake_node("a"), fake_node("bb")),
    workers: tuple[WorkerStats, ...] = (fake_worker(0, "a"), fake_worker(1, "bb")),
    ok: bool = True,
    num_running: int = 0,
    generated_tokens: int = 0,
    incidents: tuple[Incident, ...] = (),
) -> FleetStatus:
    stats = EngineStats(
        num_running=num_running,
        num_blocks=100,
        num_used_blocks=25,
        generated_tokens=generated_tokens,
        epoch=3,
        workers=list(workers),
        incidents=list(incidents),
    )
    reason = "working" if ok else "no step has finished for 31 s"
    return FleetStatus(
        model="small",
        description="Llama, 2 stages of 15 + 15 layers",
        security="mutual TLS 1.3",
        predicted="predicted 41 tokens/s, measured 38: 7 % less",
        nodes=list(nodes),
        replicas=[ReplicaStatus(name="r0", ok=ok, reason=reason, stats=stats)],
    )


@dataclass
class FakeFleet:
    """Its calls wait for their gates."""

    value: FleetStatus = field(default_factory=fake_status)
    may_move: threading.Event = field(default_factory=threading.Event)
    may_tell: threading.Event = field(default_factory=threading.Event)
    moving: threading.Event = field(default_factory=threading.Event)
    drained: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may_tell.set()

    def status(self) -> FleetStatus:
        self.may_tell.wait(10)
        return self.value

    def drain(self, node: str) -> str:
        if node not in [each.name for each in self.value.nodes]:
            raise PlacementError(f"'{node}' runs no work here")
        self.moving.set()
        self.may_move.wait(10)
        self.drained.set()
        return f"{node} is drained"

    def restart(self, num_together: int) -> str:
        self.moving.set()
        self.may_move.wait(10)
        return f"restarted, {num_together} together"

    def rebalance(self) -> str:
        raise ZeroDivisionError("a bug")


@contextmanager
def serving(fleet: FakeFleet, folder: Path, *, tick_s: float = TICK_S) -> Iterator[str]:
    """The control address of a head that serves `fleet` and is to be found in `folder`."""
    listener = listen(f"unix:{folder}/head.sock", LocalOnly())
    reception = Reception(listener, {"operator": OperatorService(fleet, tick_s=tick_s).serve})
    try:
        with register(
            StateFolder(folder / "state"),
            model="small",
            url="http://127.0.0.1:8000",
            control=reception.address,
        ):
            yield reception.address
    finally:
        fleet.may_move.set()
        fleet.may_tell.set()
        reception.close()
