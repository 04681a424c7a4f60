"""Chains of teams, timed: the options a search chooses among."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from shoal.cluster.costs import ModelCost
from shoal.cluster.goal import Goal
from shoal.cluster.hardware import Cluster
from shoal.cluster.layer_cuts import Line, layer_cuts
from shoal.cluster.prediction import Objective, chain_rate, rows_per_batch, worth_of
from shoal.cluster.rates import matrix_weights_per_s
from shoal.cluster.timing import Clockwork, StageTimes, Team
from shoal.parallel.partition import Slice, tensor_slices

Names = tuple[str, ...]
Chain = tuple[Names, ...]
"""The nodes of each stage, in the order of the layers."""


ENDS: tuple[Objective, ...] = ("latency", "throughput")

# Sums of the same times in another order are equal for all that matters.
_ALMOST_ONE = 1 - 1e-9


class CutChain(NamedTuple):
    chain: Chain
    num_layers: tuple[int, ...]


class TimedChain(NamedTuple):
    """`one_rest_s` is what a lone stream's step takes beside the layers of all stages."""

    chain: Chain
    lines: list[Line]
    one_rest_s: float


class Option(NamedTuple):
    """Replicas with their layers, in tokens per second for one stream and for many."""

    one: float
    many: float
    replicas: tuple[CutChain, ...]

    def worth(self, objective: Objective) -> tuple[float, float]:
        """To compare options by: the objective, then the other thing as well."""
        worth = worth_of(objective, self.one, self.many)
        return worth, self.many if objective == "latency" else self.one

    @property
    def nodes(self) -> list[str]:
        return [node for cut in self.replicas for team in cut.chain for node in team]


def together(options: Iterable[Option]) -> Option:
    """Replicas side by side: what many streams get adds up, a lone one may meet the slowest."""
    parts = list(options)
    return Option(
        min(part.one for part in parts),
        sum(part.many for part in parts),
        tuple(cut for part in parts for cut in part.replicas),
    )


class Options:
    """Times chains. Nodes within a team are always in the order that `team_order` gives."""

    def __init__(self, cluster: Cluster, cost: ModelCost, goal: Goal) -> None:
        self.cost = cost
        self.goal = goal
        self.clockwork = Clockwork(cluster, cost, stream_tokens=goal.stream_tokens)
        self.max_ranks = min(
            cost.dims.num_query_heads, cost.dims.num_mlp_columns, cost.dims.vocab_size
        )
        self._speeds = {node.name: self._speed(node.name) for node in cluster.nodes}
        self._order = {
            node.name: (-self._speeds[node.name], -node.memory_bytes, place)
            for place, node in enumerate(cluster.nodes)
        }
        self._teams: dict[Names, Team] = {}
        self._times: dict[tuple[Names, float], StageTimes] = {}
        self._boundaries: dict[tuple[Names, Names, float], float] = {}
        self._most_layers: dict[tuple[Names, bool, bool], int] = {}

    def speed(self, node: str) -> float:
        """Matrix elements per second, at the rows that the objective is about."""
        return self._speeds[node]

    @property
    def names_by_speed(self) -> Names:
        return tuple(sorted(self._order, key=self._order.__getitem__))

    def team_order(self, nodes: Iterable[str]) -> Names:
        """The quickest is rank 0, which samples."""
        return tuple(sorted(nodes, key=self._order.__getitem__))

    def team(self, nodes: Names) -> Team:
        """Slices in proportion to speed."""
        if nodes not in self._teams:
            shares = [self._speeds[node] for node in nodes]
            self._teams[nodes] = Team(nodes, tuple(tensor_slices(self.cost.dims, shares)))
        return self._teams[nodes]

    def most_layers(self, nodes: Names, *, is_first: bool, is_last: bool) -> int:
        """How many layers and their cache fit into the memory of every rank."""
        key = (nodes, is_first, is_last)
        if key not in self._most_layers:
            self._most_layers[key] = min(
                self._room(node, part, is_first=is_first, is_last=is_last)
                for node, part in zip(*self.team(nodes), strict=True)
            )
        return self._most_layers[key]

    def best(self, chain: Chain) -> Option | None:
        """The best of all cuts; of those equal in the objective, the best for the other thing."""
        timed = self.timed(chain)
        if timed is None:
            return None
        objective = self.goal.objective
        cuts = list(self.cuts(timed, "balanced"))
        most = max(option.worth(objective)[0] for option in cuts) * _ALMOST_ONE
        equal = [option for option in cuts if option.worth(objective)[0] >= most]
        return max(equal, key=lambda option: option.worth(objective)[1])

    def quick_best(self, chain: Chain) -> Option | None:
        """As `best`; for both objectives together, only the best cut for either."""
        timed = self.timed(chain)
        if timed is None:
            return None
        objective = self.goal.objective
        wanted = ENDS if objective == "balanced" else (objective,)
        cuts = (option for end in wanted for option in self.cuts(timed, end))
        return max(cuts, key=lambda option: option.worth(objective))

    def timed(self, chain: Chain) -> TimedChain | None:
        """None if the model's layers and the cache do not fit."""
        last = len(chain) - 1
        most = [
            self.most_layers(team, is_first=place == 0, is_last=place == last)
            for place, team in enumerate(chain)
        ]
        num_layers = self.cost.dims.num_layers
        if sum(most) < num_layers or len(chain) > num_layers or min(most) < 1:
            return None
        rows = rows_per_batch(self.goal.num_streams, len(chain))
        lines = [
            Line(cap, self._stage(team, 1).layer_s, self._stage(team, rows).layer_s, rest_s)
            for team, cap, rest_s in zip(chain, most, self._rests(chain, rows), strict=True)
        ]
        return TimedChain(chain, lines, sum(self._rests(chain, 1)))

    def cuts(self, timed: TimedChain, objective: Objective) -> Iterator[Option]:
        """A chain with the layer cuts that may be best: at least one."""
        lines, num_streams = timed.lines, self.goal.num_streams
        for counts in layer_cuts(lines, self.cost.dims.num_layers, objective):
            pairs = list(zip(lines, counts, strict=True))
            one_s = timed.one_rest_s + sum(line.one_s * count for line, count in pairs)
            stations_s = [line.many_s * count + line.rest_s for line, count in pairs]
            many = chain_rate(stations_s, num_streams)
            yield Option(1 / one_s, many, (CutChain(timed.chain, tuple(counts)),))

    def stations(self, cut: CutChain) -> list[float]:
        """Seconds that each stage takes for its part of many streams."""
        timed = self.timed(cut.chain)
        pairs = zip(timed.lines if timed else [], cut.num_layers, strict=True)
        return [line.many_s * count + line.rest_s for line, count in pairs]

    def _rests(self, chain: Chain, rows: float) -> list[float]:
        """What each stage takes beside its layers: its end of the model, and sending on."""
        rests = [self._boundary_s(team, after, rows) for team, after in pairwise(chain)]
        rests.append(self.clockwork.way_back_s(chain[-1], chain[0]))
        rests[0] += self._stage(chain[0], rows).first_s
        rests[-1] += self._stage(chain[-1], rows).last_s
        return rests

    def _stage(self, nodes: Names, rows: float) -> StageTimes:
        key = (nodes, rows)
        times = self._times.get(key)
        if times is None:
            times = self._times[key] = self.clockwork.stage(self.team(nodes), rows)
        return times

    def _boundary_s(self, source: Names, target: Names, rows: float) -> float:
        key = (source, target, rows)
        seconds = self._boundaries.get(key)
        if seconds is None:
            seconds = self._boundaries[key] = self.clockwork.boundary_s(source, target, rows)
        return seconds

    def _room(self, node: str, part: Slice, *, is_first: bool, is_last: bool) -> int:
        tables = self.cost.table_bytes(part, is_first=is_first, is_last=is_last)
        free = self.clockwork.nodes[node].memory_bytes - tables
        return max(0, int(free / self.cost.layer_bytes(part, self.goal.kv_tokens)))

    def _speed(self, node: str) -> float:
        profile, precision = self.clockwork.nodes[node], self.cost.precision
        for_one = matrix_weights_per_s(profile, precision, 1)
        for_many = matrix_weights_per_s(profile, precision, self.goal.num_streams)
        return worth_of(self.goal.objective, for_one, for_many)
