"""How placements and crews are told to people."""

from __future__ import annotations

from collections.abc import Collection

from shoal.cluster.placement import ReplicaPlacement
from shoal.fleet.crew import Crew


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def where(placements: Collection[ReplicaPlacement]) -> str:
    """Such as "a + b (18 + 12 layers)"."""
    texts = []
    for placement in placements:
        nodes = " + ".join("/".join(seat.node for seat in stage) for stage in placement.stages)
        layers = " + ".join(str(len(stage[0].shard.layers)) for stage in placement.stages)
        texts.append(f"{nodes} ({layers} layers)")
    return "; ".join(texts)


def describe(crew: Crew) -> str:
    """Such as "2 stages of 15 + 15 layers, 2 ranks each"."""
    layers = [len(stage[0].shard.layers) for stage in crew.stages]
    ranks = {len(stage) for stage in crew.stages}
    text = f"{len(layers)} stages of {' + '.join(map(str, layers))} layers"
    if len(layers) == 1:
        text = f"1 stage of {layers[0]} layers"
    return text if ranks == {1} else f"{text}, {' or '.join(map(str, sorted(ranks)))} ranks each"
