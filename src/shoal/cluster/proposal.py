"""What the planner answers: a placement, what to expect of it, and why it is this one."""

from __future__ import annotations

import msgspec

from shoal.cluster.goal import Goal
from shoal.cluster.placement import Placement, Seat
from shoal.cluster.prediction import Prediction
from shoal.cluster.timing import Clockwork


class NodeUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node with a seat holds, in bytes. `tables` are embedding and head."""

    node: str
    replica: int
    stage: int
    first_layer: int
    last_layer: int
    num_query_heads: int
    num_kv_heads: int
    weight_bytes: int
    table_bytes: int
    kv_bytes: int
    memory_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.weight_bytes + self.table_bytes + self.kv_bytes


class Rejected(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    what: str
    why: str


class Proposal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`is_optimal`: every placement was looked at; otherwise a good one was searched for."""

    goal: Goal
    placement: Placement
    prediction: Prediction
    nodes: tuple[NodeUse, ...]
    reasons: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    is_optimal: bool


def node_uses(placement: Placement, clockwork: Clockwork, kv_tokens: int) -> tuple[NodeUse, ...]:
    return tuple(
        _use(seat, replica, stage, clockwork, kv_tokens)
        for replica, chain in enumerate(placement.replicas)
        for stage, seats in enumerate(chain.stages)
        for seat in seats
    )


def _use(seat: Seat, replica: int, stage: int, clockwork: Clockwork, kv_tokens: int) -> NodeUse:
    cost, shard = clockwork.cost, seat.shard
    part, num_layers = shard.slice, len(shard.layers)
    tables = cost.table_bytes(part, is_first=shard.is_first, is_last=shard.is_last)
    return NodeUse(
        node=seat.node,
        replica=replica,
        stage=stage,
        first_layer=shard.layers.start,
        last_layer=shard.layers.stop - 1,
        num_query_heads=len(part.query_heads),
        num_kv_heads=len(part.kv_heads),
        weight_bytes=round(num_layers * cost.layer_weights(part) * cost.weight_bytes),
        table_bytes=round(tables),
        kv_bytes=num_layers * kv_tokens * cost.kv_bytes(part),
        memory_bytes=clockwork.nodes[seat.node].memory_bytes,
    )
