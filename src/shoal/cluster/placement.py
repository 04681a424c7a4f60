"""Which worker holds which shard. Values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from shoal.config import Split
from shoal.errors import ConfigError
from shoal.parallel.partition import Dims, Shard, Span, layer_ranges, shards_of

_LEAST_SHARE = 1e-6


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


def divide(
    dims: Dims,
    split: Split,
    nodes: Sequence[str],
    *,
    speeds: Mapping[str, float] | None = None,
    head_layers: float = 0.0,
) -> Placement:
    """A model divided as the split says over nodes in turn, a seat each, until all have seats.

    Where the split leaves layers or shares open they are in proportion to the nodes' `speeds`, or
    equal without; the last stage gets fewer layers, because its output head takes as long as
    `head_layers` of them. Raises ConfigError for a split that the model does not allow.
    """
    chain_size = split.pipeline * split.tensor
    replicas = []
    for replica in range(split.replicas):
        seats = range(replica * chain_size, (replica + 1) * chain_size)
        chain = [nodes[seat % len(nodes)] for seat in seats]
        starts = range(0, chain_size, split.tensor)
        teams = [chain[start : start + split.tensor] for start in starts]
        replicas.append(_chain(dims, split, replica, teams, speeds or {}, head_layers))
    return Placement(replicas=tuple(replicas))


def _chain(
    dims: Dims,
    split: Split,
    replica: int,
    teams: Sequence[Sequence[str]],
    speeds: Mapping[str, float],
    head_layers: float,
) -> ReplicaPlacement:
    team_speeds = [[speeds.get(node, 1.0) for node in team] for team in teams]
    stage_speeds = [sum(team) for team in team_speeds]
    ranges = _stage_layers(dims.num_layers, split, stage_speeds, head_layers)
    stages = [
        tuple(
            Seat(worker=f"r{replica}s{stage}t{shard.rank}", node=node, shard=shard)
            for node, shard in zip(team, shards_of(dims, layers, shares), strict=True)
        )
        for stage, (team, shares, layers) in enumerate(
            zip(teams, [split.shares or each for each in team_speeds], ranges, strict=True)
        )
    ]
    return ReplicaPlacement(stages=tuple(stages))


def _stage_layers(
    num_layers: int, split: Split, speeds: Sequence[float], head_layers: float
) -> list[Span]:
    if split.layers is None:
        per_speed = (num_layers + head_layers) / sum(speeds)
        shares = [speed * per_speed for speed in speeds]
        shares[-1] = max(shares[-1] - head_layers, _LEAST_SHARE)
        return layer_ranges(num_layers, shares)
    if sum(split.layers) != num_layers:
        raise ConfigError(
            f"the stages' layers {list(split.layers)} make {sum(split.layers)}, "
            f"the model has {num_layers}",
            param="layers",
        )
    stops = [sum(split.layers[: stage + 1]) for stage in range(split.pipeline)]
    return [Span(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
