"""What was measured of nodes and of the links between them: the planner's input, as values."""

from __future__ import annotations

import msgspec


class MatrixRate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Matrix elements gone through per second when each meets `rows` rows of activations.

    A pass of `rows` rows through layers of n weights takes n / weights_per_s: bound by memory
    for few rows, by arithmetic for many.
    """

    rows: int
    weights_per_s: float


class NodeProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`memory_bytes` is what Shoal may use, `read_bytes_per_s` how fast weights stream from it.

    `matrix_rates` are by precision (a `Quantize` word), each by rising rows. `layer_overhead_s`
    is what a layer costs beside its matrices.
    """

    name: str
    device: str = "cpu"
    num_cores: int
    memory_bytes: int
    read_bytes_per_s: float
    matrix_rates: dict[str, tuple[MatrixRate, ...]]
    layer_overhead_s: float = 0.0


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From one node to another: a message of n bytes takes latency_s + n / bytes_per_s."""

    source: str
    target: str
    latency_s: float
    bytes_per_s: float


class Cluster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a cluster file. `links` that are missing are as `default_link`."""

    nodes: tuple[NodeProfile, ...]
    links: tuple[Link, ...] = ()
    default_latency_s: float = 200e-6
    default_bytes_per_s: float = 1e9 / 8
