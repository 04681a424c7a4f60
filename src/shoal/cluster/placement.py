"""Which worker holds which shard. Values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from shoal.config import Split
from shoal.errors import ConfigError
from shoal.parallel.partition import Dims, Shard, Span, layer_ranges, shards_of


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
    dims: Dims, split: Split, nodes: Sequence[str], speeds: Mapping[str, float] | None = None
) -> Placement:
    """A model divided as the split says over nodes in turn, a seat each, until all have seats.

    Where the split leaves layers or shares open they are in proportion to the nodes' `speeds`, or
    equal without. Raises ConfigError for a split that the model does not allow.
    """
    chain_size = split.pipeline * split.tensor
    replicas = []
    for replica in range(split.replicas):
        seats = range(replica * chain_size, (replica + 1) * chain_size)
        chain = [nodes[seat % len(nodes)] for seat in seats]
        replicas.append(_chain(dims, split, replica, chain, speeds or {}))
    return Placement(replicas=tuple(replicas))


def _chain(
    dims: Dims, split: Split, replica: int, nodes: Sequence[str], speeds: Mapping[str, float]
) -> ReplicaPlacement:
    starts = range(0, len(nodes), split.tensor)
    teams = [nodes[start : start + split.tensor] for start in starts]
    team_speeds = [[speeds.get(node, 1.0) for node in team] for team in teams]
    ranges = _stage_layers(dims.num_layers, split, [sum(team) for team in team_speeds])
    return ReplicaPlacement(
        stages=tuple(
            tuple(
                Seat(worker=f"r{replica}s{stage}t{shard.rank}", node=node, shard=shard)
                for node, shard in zip(
                    team, shards_of(dims, layers, split.shares or each), strict=True
                )
            )
            for stage, (team, each, layers) in enumerate(
                zip(teams, team_speeds, ranges, strict=True)
            )
        )
    )


def _stage_layers(num_layers: int, split: Split, speeds: Sequence[float]) -> list[Span]:
    if split.layers is None:
        return layer_ranges(num_layers, speeds)
    if sum(split.layers) != num_layers:
        raise ConfigError(
            f"the stages' layers {list(split.layers)} make {sum(split.layers)}, "
            f"the model has {num_layers}",
            param="layers",
        )
    stops = [sum(split.layers[: stage + 1]) for stage in range(split.pipeline)]
    return [Span(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
