"""Clusters and models for the planner's tests, as far as possible in round numbers."""

from __future__ import annotations

import random

from shoal.cluster.costs import ModelCost
from shoal.cluster.hardware import Cluster, Link, MatrixRate, NodeProfile
from shoal.parallel.partition import Dims

MIB = 2**20


def node(name: str, weights_per_s: float, memory_mib: float = 4096, **more: float) -> NodeProfile:
    """At 32 rows a quarter as many weights per second as at one."""
    return NodeProfile(
        name=name,
        num_cores=4,
        memory_bytes=int(memory_mib * MIB),
        read_bytes_per_s=1e10,
        matrix_rates={
            "int8": (
                MatrixRate(rows=1, weights_per_s=weights_per_s),
                MatrixRate(rows=32, weights_per_s=weights_per_s / 4),
            )
        },
        **more,  # type: ignore[arg-type]
    )


def small_model(num_layers: int = 8) -> ModelCost:
    """A layer has 1 Mi weights of 2 bytes, embedding and head 1 Mi each, a cached token 2 KiB."""
    return ModelCost(
        name="small",
        dims=Dims(
            num_layers=num_layers,
            num_query_heads=4,
            num_kv_heads=4,
            num_mlp_columns=1024,
            vocab_size=4096,
        ),
        hidden_size=256,
        head_dim=64,
        precision="int8",
        weight_bytes=2.0,
        embedding_bytes=2.0,
        head_bytes=2.0,
        kv_element_bytes=4,
    )


def random_cluster(num_nodes: int, seed: int, *, memory_mib: float, links: bool) -> Cluster:
    rng = random.Random(seed)
    nodes = tuple(
        node(f"n{i}", rng.uniform(1e9, 1e10), memory_mib * rng.uniform(0.5, 2))
        for i in range(num_nodes)
    )
    found = (
        Link(
            source=source.name,
            target=target.name,
            latency_s=rng.uniform(2e-5, 5e-4),
            bytes_per_s=rng.uniform(1e8, 1e9),
        )
        for source in nodes
        for target in nodes
        if links and source != target
    )
    return Cluster(nodes=nodes, links=tuple(found))
