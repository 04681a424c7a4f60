"""What an operator sees of a fleet: values."""

from __future__ import annotations

import msgspec

from shoal.engine.api import EngineStats


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine. `device` is such as "cpu, 8 cores"; `num_workers` are those of this model."""

    name: str
    address: str
    alive: bool
    drained: bool
    device: str
    memory_bytes: int
    num_workers: int


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`stats.workers` says who holds which layers; `stats.epoch` counts the re-formations."""

    name: str
    ok: bool
    reason: str
    stats: EngineStats


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`security` is how machines talk; `predicted` what the planner expects, in words."""

    model: str
    description: str
    security: str
    predicted: str
    nodes: list[NodeStatus]
    replicas: list[ReplicaStatus]
