"""What was measured of nodes and of the links between them: the planner's input, as values."""

from __future__ import annotations

import msgspec


class MatrixRate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Matrix elements gone through per second when each meets `rows` rows of activations.

    A pass of `rows` rows through layers of n weights takes n / weights_per_s: bound by memory
    for few rows, by arithmetic for many. `spread` is the noise: the interquartile range of the
    passes over their median.
    """

    rows: int
    weights_per_s: float
    spread: float = 0.0


class NodeProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`memory_bytes` is what Shoal may use, `read_bytes_per_s` how fast weights stream from it.

    `matrix_rates` are by precision (a `Quantize` word), each by rising rows. `layer_overhead_s`
    is what a layer costs beside its matrices, whatever the number of rows.

    What rows cost beside matrices, 0 where it was not measured: a row of a layer takes the sum of
    its matrices' in- and out-features over `activations_per_s`, and the keys and values it
    attends to over `cache_bytes_per_s`. `spreads` are as in `MatrixRate`, by name of the figure.
    """

    name: str
    device: str = "cpu"
    num_cores: int
    memory_bytes: int
    read_bytes_per_s: float
    matrix_rates: dict[str, tuple[MatrixRate, ...]]
    layer_overhead_s: float = 0.0
    activations_per_s: float = 0.0
    cache_bytes_per_s: float = 0.0
    spreads: dict[str, float] = {}


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
