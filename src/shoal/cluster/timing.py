"""The time model: how long a stage takes for a step of so many rows.

A matrix pass of M rows goes through a rank's weights at the rate measured for M rows; ranks wait
for the slowest at each of a layer's two all-reduces (Shoeybi et al. 2019, Megatron-LM, section
3). Each row takes its activations and its keys and values besides; where those were not measured,
keys and values are read at the rate of streaming memory. Everything is linear in the number of
layers, because layers are equal.
"""

from __future__ import annotations

from typing import NamedTuple

from shoal.cluster.costs import ModelCost
from shoal.cluster.hardware import Cluster
from shoal.cluster.rates import Wires, head_weights_per_s, matrix_weights_per_s
from shoal.parallel.partition import Slice

ALL_REDUCES_PER_LAYER = 2
_LOGIT_BYTES = 4


class Team(NamedTuple):
    """The nodes of a stage, in rank order, and each one's slice of every layer."""

    nodes: tuple[str, ...]
    slices: tuple[Slice, ...]


class StageTimes(NamedTuple):
    """Seconds per layer, and what the first and the last stage take besides."""

    layer_s: float
    first_s: float
    last_s: float


class Clockwork:
    """Answers how long teams take; `stream_tokens` is what each row attends to."""

    def __init__(self, cluster: Cluster, cost: ModelCost, *, stream_tokens: int) -> None:
        self.cost = cost
        self.nodes = {node.name: node for node in cluster.nodes}
        self._wires = Wires(cluster)
        self._stream_tokens = stream_tokens

    def boundary_s(self, source: tuple[str, ...], target: tuple[str, ...], rows: float) -> float:
        """Hidden states of a step from one stage to the next.

        Every rank holds them whole; rank i of the target gets them from rank i of the source,
        modulo the source's ranks.
        """
        num_bytes = self.cost.hidden_bytes(rows)
        return max(
            self._wires.fan_out_s(sender, target[rank :: len(source)], num_bytes)
            for rank, sender in enumerate(source)
        )

    def hop_s(self, source: str, target: str, rows: float) -> float:
        """`boundary_s` between single nodes."""
        latency_s, per_byte_s = self._wires.link(source, target)
        return latency_s + per_byte_s * self.cost.hidden_bytes(rows)

    def way_back_s(self, last: tuple[str, ...], first: tuple[str, ...]) -> float:
        """A sampled token's way to where its next step begins."""
        return self._wires.link(last[0], first[0])[0]

    def stage(self, team: Team, rows: float) -> StageTimes:
        layer_s = max(self._rank_layer_s(*rank, rows) for rank in zip(*team, strict=True))
        head_s = max(
            self.cost.table_weights(part)
            / head_weights_per_s(self.nodes[node], self.cost.precision, rows)
            for node, part in zip(*team, strict=True)
        )
        all_reduce_s = self._all_reduce_s(team.nodes, rows)
        return StageTimes(
            layer_s=layer_s + ALL_REDUCES_PER_LAYER * all_reduce_s,
            first_s=all_reduce_s,
            last_s=head_s + self._gather_s(team, rows),
        )

    def _rank_layer_s(self, node: str, part: Slice, rows: float) -> float:
        profile, cost = self.nodes[node], self.cost
        rate = matrix_weights_per_s(profile, cost.precision, rows)
        cache_bytes = self._stream_tokens * cost.kv_bytes(part)
        row_s = cache_bytes / (profile.cache_bytes_per_s or profile.read_bytes_per_s)
        if profile.activations_per_s:
            row_s += cost.layer_activations(part) / profile.activations_per_s
        return cost.layer_weights(part) / rate + profile.layer_overhead_s + rows * row_s

    def _all_reduce_s(self, nodes: tuple[str, ...], rows: float) -> float:
        """Every rank sends its partial sums to every other."""
        if len(nodes) == 1:
            return 0.0
        num_bytes = self.cost.hidden_bytes(rows)
        return max(
            self._wires.fan_out_s(node, [other for other in nodes if other != node], num_bytes)
            for node in nodes
        )

    def _gather_s(self, team: Team, rows: float) -> float:
        """Logits to rank 0, which receives them over one interface."""
        links = [self._wires.link(node, team.nodes[0]) for node in team.nodes]
        receiving_s = sum(
            per_byte * rows * len(part.vocab) * _LOGIT_BYTES
            for (_, per_byte), part in zip(links, team.slices, strict=True)
        )
        return receiving_s + max(latency for latency, _ in links)
