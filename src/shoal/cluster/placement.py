"""Which worker holds which shard. Values only."""

from __future__ import annotations

import msgspec

from shoal.parallel.partition import Shard


class Seat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker's place: the node it runs on, and what it holds there."""

    worker: str
    node: str
    shard: Shard


class ReplicaPlacement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A chain of stages, each a tuple of seats in rank order."""

    stages: tuple[tuple[Seat, ...], ...]

    @property
    def seats(self) -> list[Seat]:
        return [seat for stage in self.stages for seat in stage]


class Placement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    replicas: tuple[ReplicaPlacement, ...]
