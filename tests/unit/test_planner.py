"""The planner: its arithmetic by hand, its reasons, its refusals, and clusters too large to try."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise

import pytest
from planner_samples import MIB, node, random_cluster, small_model

from shoal.cluster.exact_search import ExactSearch, kinds_of, num_chains
from shoal.cluster.goal import Goal
from shoal.cluster.hardware import Cluster, Link
from shoal.cluster.local_search import LocalSearch
from shoal.cluster.options import Options
from shoal.cluster.planner import propose
from shoal.cluster.prediction import compare
from shoal.cluster.proposal import Proposal
from shoal.cluster.rates import head_weights_per_s, matrix_weights_per_s
from shoal.errors import ConfigError, PlacementError

KIB = 1024
LAYER = TABLE = MIB


def nodes_of(proposal: Proposal) -> list[list[list[str]]]:
    return [
        [[seat.node for seat in stage] for stage in replica.stages]
        for replica in proposal.placement.replicas
    ]


def layers_of(proposal: Proposal) -> list[list[int]]:
    return [
        [len(stage[0].shard.layers) for stage in replica.stages]
        for replica in proposal.placement.replicas
    ]


def whys(proposal: Proposal) -> dict[str, str]:
    return {rejected.what: rejected.why for rejected in proposal.rejected}


# ---- the time model, by hand ---------------------------------------------------------------


def test_rates_are_interpolated_in_logarithms() -> None:
    machine = node("a", 8e9)
    assert matrix_weights_per_s(machine, "int8", 1) == 8e9
    assert matrix_weights_per_s(machine, "int8", 0.5) == 8e9
    assert matrix_weights_per_s(machine, "int8", 32**0.5) == pytest.approx(4e9)
    assert matrix_weights_per_s(machine, "int8", 64) == pytest.approx(1e9)
    assert head_weights_per_s(machine, "int8", 32) == 2e9


def test_two_stages_by_hand() -> None:
    # Room for 4 of 8 layers, each of 2 MiB and 100 cached tokens, and a table.
    room = 4 * (2 + 100 * 2 / KIB) + 2
    machines = (node("a", 1e9, room), node("b", 1e9, room, layer_overhead_s=0.001))
    cluster = Cluster(nodes=machines, default_latency_s=0.002, default_bytes_per_s=1e6)
    goal = Goal(objective="throughput", kv_tokens=100, num_streams=32, stream_tokens=100)
    proposal = propose(cluster, small_model(), goal)
    assert layers_of(proposal) == [[4, 4]]

    cached_s = 100 * 2 * KIB / 1e10
    layers_s = 8 * (LAYER / 1e9 + cached_s) + 4 * 0.001
    hop_s = 0.002 + 256 * 4 / 1e6
    one_s = layers_s + TABLE / 1e9 + hop_s + 0.002
    assert proposal.prediction.one_stream == pytest.approx(1 / one_s)

    rate = 1e9 / 4 ** (4 / 5)  # at 16 rows: 4/5 of the way from 1 to 32 in logarithms
    first_s = 4 * (LAYER / rate + 16 * cached_s) + 0.002 + 16 * 256 * 4 / 1e6
    last_s = 4 * (LAYER / rate + 16 * cached_s + 0.001) + TABLE / rate + 0.002
    assert nodes_of(proposal) == [[["a"], ["b"]]]
    assert proposal.prediction.many_streams == pytest.approx(16 / max(first_s, last_s))


def test_a_team_waits_for_its_slowest_rank_and_for_the_wire() -> None:
    machines = (node("a", 3e9), node("b", 1e9))
    wires = tuple(
        Link(source=s, target=t, latency_s=1e-5, bytes_per_s=1e9)
        for s, t in (("a", "b"), ("b", "a"))
    )
    goal = Goal(objective="latency", stream_tokens=1)
    proposal = propose(Cluster(nodes=machines, links=wires), small_model(), goal)
    assert nodes_of(proposal) == [[["a", "b"]]]
    # 3 + 1 heads, 768 + 256 columns: both take as long.
    layer_s = 0.75 * LAYER / 3e9 + 3 * 2 * 64 * 4 / 1e10
    all_reduce_s = 1e-5 + 256 * 4 / 1e9
    gather_s = 1e-5 + KIB * 4 / 1e9
    one_s = 8 * (layer_s + 2 * all_reduce_s) + all_reduce_s + 0.75 * TABLE / 3e9 + gather_s
    assert proposal.prediction.one_stream == pytest.approx(1 / one_s)
    assert "each layer is shared in proportion to speed: a 75%, b 25%" in proposal.reasons


def test_rows_cost_what_was_measured_of_them() -> None:
    plain = Cluster(nodes=(node("a", 1e9),))
    slow = Cluster(nodes=(node("a", 1e9, activations_per_s=1e8, cache_bytes_per_s=1e8),))
    goal = Goal(objective="latency", stream_tokens=50)
    without = 1 / propose(plain, small_model(), goal).prediction.one_stream
    with_them = 1 / propose(slow, small_model(), goal).prediction.one_stream
    # In- and out-features of QKV, output, gate and up, down.
    features = (256 + 768) + (256 + 256) + (256 + 2048) + (1024 + 256)
    cache_s = 50 * 2 * KIB / 1e8 - 50 * 2 * KIB / 1e10
    assert with_them - without == pytest.approx(8 * (features / 1e8 + cache_s))


# ---- distributed or not --------------------------------------------------------------------


def test_a_model_that_fits_one_fast_node_is_not_split() -> None:
    cluster = Cluster(nodes=(node("fast", 1e10), node("mid", 8e9), node("slow", 1e9)))
    proposal = propose(cluster, small_model(), Goal(objective="latency"))
    assert nodes_of(proposal) == [[["fast"]]]
    assert "fits node fast alone: not split" in proposal.reasons[0]
    assert any("would give" in why and "tokens/s" in why for why in whys(proposal).values())


def test_a_slow_node_is_left_out_and_the_plan_says_what_it_would_cost() -> None:
    fast = Cluster(nodes=(node("fast", 1e10),))
    both = Cluster(nodes=(node("fast", 1e10), node("slow", 1e8, 8)))
    goal = Goal(objective="latency", kv_tokens=1)
    alone = propose(fast, small_model(), goal).prediction.one_stream
    proposal = propose(both, small_model(), goal)
    # Best with the slow one: a single layer there, first or last, or as a rank beside the other.
    options = Options(both, small_model(), goal)
    chains = [(("fast",), ("slow",)), (("slow",), ("fast",)), (("fast", "slow"),)]
    with_slow = max(option.one for chain in chains if (option := options.best(chain)))
    said = f"left out: it would slow the rest by {1 - with_slow / alone:.0%}"
    assert whys(proposal)["node slow"] == said
    assert with_slow < 0.9 * alone


def test_many_streams_take_a_replica_on_every_node_that_holds_the_model() -> None:
    cluster = Cluster(nodes=(node("b", 5e9), node("a", 1e10)))
    proposal = propose(cluster, small_model(), Goal(objective="throughput", stream_tokens=1))
    assert nodes_of(proposal) == [[["a"]], [["b"]]]
    assert proposal.reasons[0].startswith("2 replicas on 2 nodes: many streams add up; 1.50 times")


def test_memory_decides_who_holds_how_much() -> None:
    big, small = node("big", 1e9, 4096), node("small", 1e10, 11)
    cluster = Cluster(nodes=(big, small), default_latency_s=1e-5, default_bytes_per_s=1e10)
    goal = Goal(objective="balanced", kv_tokens=1)
    proposal = propose(cluster, small_model(), goal)
    assert all(use.used_bytes <= use.memory_bytes for use in proposal.nodes)
    assert sorted(layers_of(proposal)[0]) == [4, 4]
    assert any("small holds 4 layers because its memory" in reason for reason in proposal.reasons)


# ---- refusals ------------------------------------------------------------------------------


def test_what_fits_nowhere_is_refused_with_the_figures() -> None:
    cluster = Cluster(nodes=(node("a", 1e9, 6), node("b", 1e9, 6)))
    with pytest.raises(PlacementError) as caught:
        propose(cluster, small_model(), Goal(kv_tokens=1))
    # 8 layers and two tables of 2 MiB: 20 MiB; 12 MiB are there.
    assert "small needs 20.0 MiB" in caught.value.message
    assert "2 nodes offer 12.0 MiB" in caught.value.message
    assert "8.0 MiB too little" in caught.value.message
    assert "--context" in caught.value.message and "--quantize" in caught.value.message


def test_room_in_pieces_that_are_too_small_is_refused() -> None:
    cluster = Cluster(nodes=tuple(node(f"n{i}", 1e9, 0.4) for i in range(4)))
    cost = small_model(1)
    with pytest.raises(PlacementError, match=r"offer 1\.6 MiB"):
        propose(cluster, cost, Goal(kv_tokens=1))
    pieces = Cluster(nodes=tuple(node(f"n{i}", 1e9, 1.4) for i in range(5)))
    with pytest.raises(PlacementError, match="no division of them was found"):
        propose(pieces, cost, Goal(kv_tokens=1))


def test_a_precision_nobody_measured_is_refused() -> None:
    cost = small_model()
    cluster = Cluster(nodes=(node("a", 1e9),))
    with pytest.raises(PlacementError, match="node a was not measured with precision 'int4'"):
        matrix_weights_per_s(cluster.nodes[0], "int4", 1)
    with pytest.raises(PlacementError, match="no nodes"):
        propose(Cluster(nodes=()), cost, Goal())
    with pytest.raises(ConfigError, match="num_streams must be positive"):
        Goal(num_streams=0)


# ---- many nodes ----------------------------------------------------------------------------


def test_seven_nodes_of_two_kinds_are_still_few_placements() -> None:
    nodes = tuple(node(f"n{i}", 1e10 if i < 2 else 2e9, 9) for i in range(7))
    cluster = Cluster(nodes=nodes, default_latency_s=1e-5, default_bytes_per_s=1e9)
    assert kinds_of(cluster) == [["n0", "n1"], ["n2", "n3", "n4", "n5", "n6"]]
    proposal = propose(cluster, small_model(4), Goal(objective="throughput", kv_tokens=1))
    assert proposal.is_optimal
    used = Counter(use.node for use in proposal.nodes)
    assert max(used.values()) == 1


def test_a_link_of_its_own_makes_a_node_a_kind_of_its_own() -> None:
    nodes = tuple(node(name, 1e9) for name in "abc")
    link = Link(source="a", target="b", latency_s=1.0, bytes_per_s=1.0)
    assert kinds_of(Cluster(nodes=nodes)) == [["a", "b", "c"]]
    assert kinds_of(Cluster(nodes=nodes, links=(link,))) == [["a"], ["b"], ["c"]]
    assert num_chains([["a"], ["b"], ["c"]]) == 3 * 1 + 3 * 3 + 13
    assert num_chains([["a", "b", "c"]]) == 1 + 2 + 4


@pytest.mark.parametrize("objective", ["latency", "throughput", "balanced"])
def test_local_search_comes_close_to_the_best(objective: str) -> None:
    goal = Goal(objective=objective, kv_tokens=100)  # type: ignore[arg-type]
    parts = []
    for seed in range(8):
        cluster = random_cluster(4, seed, memory_mib=14, links=seed % 2 == 0)
        exact = ExactSearch(Options(cluster, small_model(), goal), kinds_of(cluster)).best()
        found = LocalSearch(Options(cluster, small_model(), goal)).best()
        assert exact and found
        parts.append(found.worth(goal.objective)[0] / exact.worth(goal.objective)[0])
    assert max(parts) <= 1 + 1e-9
    assert min(parts) > 0.8 and statistics.mean(parts) > 0.95


def test_a_large_cluster_is_placed_within_its_memory_and_twice_alike() -> None:
    cluster = random_cluster(40, 1, memory_mib=30, links=False)
    cost, goal = small_model(40), Goal(objective="throughput", kv_tokens=100)
    proposal = propose(cluster, cost, goal)
    assert not proposal.is_optimal
    assert max(Counter(use.node for use in proposal.nodes).values()) == 1
    assert all(use.used_bytes <= use.memory_bytes for use in proposal.nodes)
    for replica in proposal.placement.replicas:
        ranges = [stage[0].shard.layers for stage in replica.stages]
        assert (ranges[0].start, ranges[-1].stop) == (0, 40)
        assert all(one.stop == other.start for one, other in pairwise(ranges))
    assert propose(cluster, cost, goal) == proposal
    # What the nodes could do at best, each alone with all layers, were there memory.
    ideal = Options(cluster, cost, Goal(objective="throughput", kv_tokens=1))
    assert proposal.prediction.many_streams > 0.5 * sum(
        32 / (40 * ideal.clockwork.stage(ideal.team((n.name,)), 32).layer_s) for n in cluster.nodes
    )


# ---- afterwards ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "measured", "text"),
    [
        (41.2, 38.0, "predicted 41 tokens/s, measured 38: 8 % less"),
        (4.0, 5.0, "predicted 4 tokens/s, measured 5: 25 % more"),
        (1000.0, 1001.0, "predicted 1,000 tokens/s, measured 1,001: as predicted"),
        (0.0, 1.5, "predicted 0 tokens/s, measured 1.5"),
    ],
)
def test_predicted_against_measured(predicted: float, measured: float, text: str) -> None:
    assert compare(predicted, measured) == text
