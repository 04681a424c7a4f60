"""How fast a placement will be, and how that compares with what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Literal

import msgspec

from shoal.cluster.placement import Placement, ReplicaPlacement
from shoal.cluster.timing import Clockwork, Team

Objective = Literal["latency", "throughput", "balanced"]


class Prediction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens per second for a lone stream, and together for `num_streams` on every replica."""

    one_stream: float
    many_streams: float
    num_streams: int

    def worth(self, objective: Objective) -> float:
        """What an objective makes most of."""
        return worth_of(objective, self.one_stream, self.many_streams)


def worth_of(objective: Objective, one_stream: float, many_streams: float) -> float:
    if objective == "latency":
        return one_stream
    if objective == "throughput":
        return many_streams
    return sqrt(one_stream * many_streams)


def rows_per_batch(num_streams: int, num_stages: int) -> float:
    """Streams are spread over as many batches as there are stages to keep busy."""
    return max(1.0, num_streams / num_stages)


def chain_rate(stations_s: Sequence[float], num_streams: int) -> float:
    """Tokens per second of a pipeline whose stages take `stations_s` for a batch of its rows.

    A closed line: limited by its slowest stage, and by the way of a batch round all of them
    (Denning and Buzen 1978, asymptotic bounds).
    """
    num_stages = len(stations_s)
    batches = min(num_stages, num_streams)
    cycle_s = max(max(stations_s), sum(stations_s) / batches)
    return rows_per_batch(num_streams, num_stages) / cycle_s


def predict(placement: Placement, clockwork: Clockwork, *, num_streams: int) -> Prediction:
    """Replicas add up; a lone stream may meet the slowest of them."""
    chains = [_as_teams(replica) for replica in placement.replicas]
    one, many = [], 0.0
    for chain in chains:
        one.append(1 / sum(stations(chain, clockwork, 1)))
        rows = rows_per_batch(num_streams, len(chain))
        many += chain_rate(stations(chain, clockwork, rows), num_streams)
    return Prediction(one_stream=min(one), many_streams=many, num_streams=num_streams)


def stations(chain: Sequence[tuple[Team, int]], clockwork: Clockwork, rows: float) -> list[float]:
    """Seconds that each (team, number of layers) takes for a step, its sending included."""
    seconds = []
    for place, (team, num_layers) in enumerate(chain):
        times = clockwork.stage(team, rows)
        is_last = place == len(chain) - 1
        following = chain[0] if is_last else chain[place + 1]
        seconds.append(
            num_layers * times.layer_s
            + (times.first_s if place == 0 else 0.0)
            + (times.last_s if is_last else 0.0)
            + (
                clockwork.way_back_s(team.nodes, following[0].nodes)
                if is_last
                else clockwork.boundary_s(team.nodes, following[0].nodes, rows)
            )
        )
    return seconds


def compare(predicted: float, measured: float) -> str:
    """`predicted 41 tokens/s, measured 38: 7 % less`."""
    said = f"predicted {_rate(predicted)} tokens/s, measured {_rate(measured)}"
    if predicted <= 0:
        return said
    percent = round(100 * (measured / predicted - 1))
    if percent == 0:
        return f"{said}: as predicted"
    return f"{said}: {abs(percent)} % {'more' if percent > 0 else 'less'}"


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 20 else f"{tokens_per_s:.2g}"


def _as_teams(replica: ReplicaPlacement) -> list[tuple[Team, int]]:
    return [
        (
            Team(
                nodes=tuple(seat.node for seat in stage),
                slices=tuple(seat.shard.slice for seat in stage),
            ),
            len(stage[0].shard.layers),
        )
        for stage in replica.stages
    ]
