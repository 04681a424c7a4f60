"""On small clusters nothing beats the planner: every placement is tried, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster.costs import ModelCost
from shoal.cluster.goal import Goal
from shoal.cluster.hardware import Cluster, Link, MatrixRate, NodeProfile
from shoal.cluster.layer_cuts import Line, bottleneck_s
from shoal.cluster.options import CutChain, Option, Options
from shoal.cluster.planner import as_placement, propose
from shoal.cluster.prediction import Objective, predict
from shoal.cluster.proposal import node_uses
from shoal.errors import PlacementError
from shoal.parallel.partition import Dims

OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "balanced")


@st.composite
def costs(draw: st.DrawFn) -> ModelCost:
    kv_heads = draw(st.integers(1, 3))
    return ModelCost(
        dims=Dims(
            num_layers=draw(st.integers(1, 6)),
            num_query_heads=kv_heads * draw(st.integers(1, 2)),
            num_kv_heads=kv_heads,
            num_mlp_columns=draw(st.sampled_from([96, 256])),
            vocab_size=draw(st.sampled_from([100, 4000])),
        ),
        hidden_size=64,
        head_dim=16,
        precision="int8",
        weight_bytes=2.0,
        embedding_bytes=2.0,
        head_bytes=draw(st.sampled_from([2.0, 3.0])),
        kv_element_bytes=4,
        is_tied=draw(st.booleans()),
    )


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    num_nodes = draw(st.integers(1, 4))
    names = "ABCD"[:num_nodes]
    nodes = tuple(_node(draw, name) for name in names)
    links = tuple(
        Link(
            source=source,
            target=target,
            latency_s=draw(st.sampled_from([1e-5, 1e-4, 1e-3])),
            bytes_per_s=draw(st.sampled_from([1e7, 1e9])),
        )
        for source, target in permutations(names, 2)
        if draw(st.booleans())
    )
    return Cluster(nodes=nodes, links=links, default_latency_s=5e-5, default_bytes_per_s=1e8)


def _node(draw: st.DrawFn, name: str) -> NodeProfile:
    # Few values, so that some nodes are alike.
    for_one = draw(st.sampled_from([1e7, 4e7, 1.5e8]))
    return NodeProfile(
        name=name,
        num_cores=1,
        memory_bytes=draw(st.sampled_from([150_000, 400_000, 900_000, 4_000_000])),
        read_bytes_per_s=1e9,
        layer_overhead_s=draw(st.sampled_from([0.0, 1e-4])),
        matrix_rates={
            "int8": (
                MatrixRate(rows=1, weights_per_s=for_one),
                MatrixRate(rows=8, weights_per_s=for_one * draw(st.sampled_from([0.2, 0.9]))),
            )
        },
    )


# ---- every placement, written down as plainly as possible ----------------------------------


def set_partitions(names: tuple[str, ...]) -> Iterator[list[tuple[str, ...]]]:
    if not names:
        yield []
        return
    first, rest = names[0], names[1:]
    for size in range(len(rest) + 1):
        for others in combinations(rest, size):
            left = tuple(name for name in rest if name not in others)
            for partition in set_partitions(left):
                yield [(first, *others), *partition]


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(1, total - parts + 2):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def replicas_of(nodes: tuple[str, ...], options: Options) -> Iterator[CutChain]:
    """Every replica that uses exactly these nodes."""
    dims = options.cost.dims
    for teams in set_partitions(nodes):
        if len(teams) > dims.num_layers or max(map(len, teams)) > options.max_ranks:
            continue
        for order in permutations(teams):
            chain = tuple(options.team_order(team) for team in order)
            for counts in compositions(dims.num_layers, len(chain)):
                yield CutChain(chain, counts)


def brute_force(cluster: Cluster, cost: ModelCost, goal: Goal) -> float:
    """The worth of the best placement by trying them all; 0 if none fits."""
    options = Options(cluster, cost, goal)
    names = tuple(node.name for node in cluster.nodes)
    memory = {node.name: node.memory_bytes for node in cluster.nodes}
    frontiers: dict[tuple[str, ...], set[tuple[float, float]]] = {}
    for size in range(1, len(names) + 1):
        for nodes in combinations(names, size):
            speeds = set()
            for cut in replicas_of(nodes, options):
                placement = as_placement(Option(0, 0, (cut,)), options)
                uses = node_uses(placement, options.clockwork, goal.kv_tokens)
                if all(use.used_bytes <= memory[use.node] for use in uses):
                    made = predict(placement, options.clockwork, num_streams=goal.num_streams)
                    speeds.add((made.one_stream, made.many_streams))
            frontiers[nodes] = {
                (one, many)
                for one, many in speeds
                if not any(a >= one and b >= many and (a, b) != (one, many) for a, b in speeds)
            }
    best = 0.0
    for size in range(1, len(names) + 1):
        for used in combinations(names, size):
            for partition in set_partitions(used):
                best = max([best, *_worths([frontiers[part] for part in partition], goal)])
    return best


def _worths(frontiers: list[set[tuple[float, float]]], goal: Goal) -> Iterator[float]:
    combined = {(float("inf"), 0.0)}
    for frontier in frontiers:
        combined = {(min(a, one), b + many) for a, b in combined for one, many in frontier}
    for one, many in combined:
        worths = {"latency": one, "throughput": many, "balanced": (one * many) ** 0.5}
        yield worths[goal.objective]


# ---- properties ----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=15)
@given(cluster=clusters(), cost=costs(), kv_tokens=st.sampled_from([1, 500]))
def test_nothing_beats_the_plan(
    objective: Objective, cluster: Cluster, cost: ModelCost, kv_tokens: int
) -> None:
    goal = Goal(objective=objective, kv_tokens=kv_tokens, num_streams=8, stream_tokens=10)
    best = brute_force(cluster, cost, goal)
    if not best:
        with pytest.raises(PlacementError, match="nodes offer"):
            propose(cluster, cost, goal)
        return
    proposal = propose(cluster, cost, goal)
    assert proposal.is_optimal
    assert proposal.prediction.worth(objective) == pytest.approx(best, rel=1e-9)


@given(
    lines=st.lists(
        st.builds(
            Line,
            most=st.integers(1, 8),
            one_s=st.floats(0.01, 10),
            many_s=st.floats(0.01, 10),
            rest_s=st.floats(0, 20),
        ),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_no_cut_has_a_quicker_slowest_stage(lines: list[Line], data: st.DataObject) -> None:
    most = sum(line.most for line in lines)
    num_layers = data.draw(st.integers(len(lines), most))
    slowest = min(
        max(line.many_s * count + line.rest_s for line, count in zip(lines, counts, strict=True))
        for counts in compositions(num_layers, len(lines))
        if all(count <= line.most for line, count in zip(lines, counts, strict=True))
    )
    assert bottleneck_s(lines, num_layers) == pytest.approx(slowest)
