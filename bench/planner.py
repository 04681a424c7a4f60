"""How long planning takes, and how good it is: `python bench/planner.py [--seeds N]`.

Method: clusters of nodes that all differ, with matrix rates over a range of 10 and memory over a
range of 4, of which most hold a part of the model only; every second cluster has links that all
differ as well. Times are of this thread's CPU. The ideal beside them: if every node had memory for
the whole model, the quickest alone for one stream (teams may beat it) and all of them together
for many (nothing beats that). The second table holds local search, which plans for seven nodes
and more, against trying every placement, on four and five. Limit: 2 s for 200 nodes and 100
layers.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import msgspec
from rich.console import Console
from rich.table import Table

from shoal.cluster.costs import ModelCost
from shoal.cluster.exact_search import ExactSearch, kinds_of
from shoal.cluster.goal import Goal
from shoal.cluster.hardware import Cluster, Link, MatrixRate, NodeProfile
from shoal.cluster.local_search import LocalSearch
from shoal.cluster.options import Options
from shoal.cluster.planner import propose
from shoal.cluster.prediction import Objective
from shoal.parallel.partition import Dims

OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "balanced")
SIZES = ((3, 30), (6, 30), (8, 30), (50, 100), (200, 100))
GIB = 2**30


class Row(msgspec.Struct, kw_only=True):
    num_nodes: int
    num_layers: int
    objective: str
    median_s: float
    slowest_s: float
    of_ideal: float


class Quality(msgspec.Struct, kw_only=True):
    """Local search against every placement tried, over clusters of 4 and 5 nodes."""

    objective: str
    num_clusters: int
    num_best: int
    mean: float
    least: float


def make_model(num_layers: int) -> ModelCost:
    """As Llama 3.2 1B, but for the number of layers, in 8 bits."""
    return ModelCost(
        dims=Dims(
            num_layers=num_layers,
            num_query_heads=32,
            num_kv_heads=8,
            num_mlp_columns=8192,
            vocab_size=128_256,
        ),
        hidden_size=2048,
        head_dim=64,
        precision="int8",
        weight_bytes=2.0,
        embedding_bytes=2.0,
        head_bytes=2.0,
        kv_element_bytes=4,
    )


def make_cluster(num_nodes: int, seed: int, model: ModelCost) -> Cluster:
    rng = random.Random(seed)
    model_bytes = model.dims.num_layers * 0.12 * GIB
    nodes = tuple(_node(f"n{i}", rng, model_bytes) for i in range(num_nodes))
    links = tuple(
        Link(
            source=source.name,
            target=target.name,
            latency_s=rng.uniform(3e-5, 1e-3),
            bytes_per_s=rng.uniform(1e8, 1.2e9),
        )
        for source in nodes
        for target in nodes
        if seed % 2 and source is not target
    )
    return Cluster(nodes=nodes, links=links)


def _node(name: str, rng: random.Random, model_bytes: float) -> NodeProfile:
    for_one = rng.uniform(3e9, 3e10)
    falls = {1: 1.0, 4: 0.8, 16: 0.45, 64: rng.uniform(0.1, 0.25)}
    return NodeProfile(
        name=name,
        num_cores=4,
        memory_bytes=int(model_bytes * rng.uniform(0.3, 1.2)),
        read_bytes_per_s=for_one,
        layer_overhead_s=1e-4,
        matrix_rates={
            "int8": tuple(
                MatrixRate(rows=rows, weights_per_s=for_one * part) for rows, part in falls.items()
            )
        },
    )


def measure(num_nodes: int, num_layers: int, objective: Objective, num_seeds: int) -> Row:
    times_s, parts = [], []
    for seed in range(num_seeds):
        model, goal = make_model(num_layers), Goal(objective=objective)
        cluster = make_cluster(num_nodes, seed, model)
        started_s = time.thread_time()
        proposal = propose(cluster, model, goal)
        times_s.append(time.thread_time() - started_s)
        parts.append(proposal.prediction.worth(objective) / ideal(cluster, model, goal))
    return Row(
        num_nodes=num_nodes,
        num_layers=num_layers,
        objective=objective,
        median_s=round(statistics.median(times_s), 2),
        slowest_s=round(max(times_s), 2),
        of_ideal=round(statistics.mean(parts), 3),
    )


def ideal(cluster: Cluster, model: ModelCost, goal: Goal) -> float:
    """For one stream the quickest node, for many all together, with room for everything."""
    roomy = [msgspec.structs.replace(node, memory_bytes=10**15) for node in cluster.nodes]
    options = Options(Cluster(nodes=tuple(roomy)), model, goal)
    alone = [option for node in roomy if (option := options.best(((node.name,),)))]
    one, many = max(option.one for option in alone), sum(option.many for option in alone)
    return {"latency": one, "throughput": many, "balanced": (one * many) ** 0.5}[goal.objective]


def judge(objective: Objective, num_clusters: int) -> Quality:
    model, goal = make_model(30), Goal(objective=objective)
    parts = []
    for seed in range(num_clusters):
        cluster = make_cluster(4 + seed // 2 % 2, seed, model)
        best = ExactSearch(Options(cluster, model, goal), kinds_of(cluster)).best()
        found = LocalSearch(Options(cluster, model, goal)).best()
        if best is not None:
            parts.append(found.worth(objective)[0] / best.worth(objective)[0] if found else 0.0)
    return Quality(
        objective=objective,
        num_clusters=len(parts),
        num_best=sum(part > 1 - 1e-9 for part in parts),
        mean=round(statistics.mean(parts), 4),
        least=round(min(parts), 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4, help="clusters per row (4)")
    num_seeds = parser.parse_args().seeds
    rows = [measure(*size, objective, num_seeds) for size in SIZES for objective in OBJECTIVES]
    table = Table("nodes", "layers", "objective", "median s", "slowest s", "of the ideal")
    for row in rows:
        table.add_row(*map(str, msgspec.structs.astuple(row)))
    Console().print(table)
    judged = [judge(objective, 10 * num_seeds) for objective in OBJECTIVES]
    table = Table("local search for", "clusters", "best found", "mean part of best", "least")
    for quality in judged:
        table.add_row(*map(str, msgspec.structs.astuple(quality)))
    Console().print(table)
    record = {"rows": msgspec.to_builtins(rows), "quality": msgspec.to_builtins(judged)}
    print(json.dumps({"benchmark": "planner", **record}))


if __name__ == "__main__":
    main()
