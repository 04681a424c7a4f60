"""Which worker holds which shard. Values only."""

from __future__ import annotations

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


def divide(dims: Dims, split: Split, node: str) -> Placement:
    """A model divided on one node as the split says, evenly where it does not.

    Raises ConfigError for a split that the model does not allow.
    """
    shares = split.shares or (1.0,) * split.tensor
    ranges = _stage_layers(dims.num_layers, split)
    return Placement(
        replicas=tuple(
            ReplicaPlacement(
                stages=tuple(
                    tuple(
                        Seat(worker=f"r{replica}s{stage}t{rank}", node=node, shard=shard)
                        for rank, shard in enumerate(shards_of(dims, layers, shares))
                    )
                    for stage, layers in enumerate(ranges)
                )
            )
            for replica in range(split.replicas)
        )
    )


def _stage_layers(num_layers: int, split: Split) -> list[Span]:
    if split.layers is None:
        return layer_ranges(num_layers, [1.0] * split.pipeline)
    if sum(split.layers) != num_layers:
        raise ConfigError(
            f"the stages' layers {list(split.layers)} make {sum(split.layers)}, "
            f"the model has {num_layers}",
            param="layers",
        )
    stops = [sum(split.layers[: stage + 1]) for stage in range(split.pipeline)]
    return [Span(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
