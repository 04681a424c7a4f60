"""How fast a node is with so many rows, and how long a message takes between two nodes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from shoal.cluster.hardware import Cluster, MatrixRate, NodeProfile
from shoal.errors import PlacementError

# The output head has 8 bits at the least, see compute.linear.make_head.
HEAD_PRECISION = "int8"


def matrix_weights_per_s(node: NodeProfile, precision: str, rows: float) -> float:
    """Matrix elements per second for `rows` rows. Raises PlacementError if not measured.

    Straight lines between the measured points in logarithms of both; as the first point below
    it, and beyond the last bound by arithmetic: twice the rows take twice as long.
    """
    rates = node.matrix_rates.get(precision)
    if not rates:
        measured = ", ".join(node.matrix_rates) or "nothing"
        raise PlacementError(
            f"node {node.name} was not measured with precision '{precision}', only with "
            f"{measured}: run 'shoal profile' there, or choose a --quantize that was measured"
        )
    return _interpolate(rates, rows)


def head_weights_per_s(node: NodeProfile, precision: str, rows: float) -> float:
    """As `matrix_weights_per_s`, of the output head, which is never narrower than 8 bits."""
    rate = matrix_weights_per_s(node, precision, rows)
    if not node.matrix_rates.get(HEAD_PRECISION):
        return rate
    return min(rate, matrix_weights_per_s(node, HEAD_PRECISION, rows))


def _interpolate(rates: Sequence[MatrixRate], rows: float) -> float:
    if rows <= rates[0].rows:
        return rates[0].weights_per_s
    if rows >= rates[-1].rows:
        return rates[-1].weights_per_s * rates[-1].rows / rows
    after = bisect_left(rates, rows, key=lambda rate: rate.rows)
    low, high = rates[after - 1], rates[after]
    part = math.log(rows / low.rows) / math.log(high.rows / low.rows)
    return low.weights_per_s * math.exp(part * math.log(high.weights_per_s / low.weights_per_s))


class Wires:
    """The links of a cluster, by name of source and target. A node reaches itself at no cost."""

    def __init__(self, cluster: Cluster) -> None:
        self._links = {
            (link.source, link.target): (link.latency_s, 1 / link.bytes_per_s)
            for link in cluster.links
        }
        self._default = (cluster.default_latency_s, 1 / cluster.default_bytes_per_s)

    def link(self, source: str, target: str) -> tuple[float, float]:
        """(seconds per message, seconds per byte)."""
        if source == target:
            return 0.0, 0.0
        return self._links.get((source, target), self._default)

    def fan_out_s(self, source: str, targets: Sequence[str], num_bytes: float) -> float:
        """Until the same bytes, sent to each target in turn over one interface, are there."""
        links = [self.link(source, target) for target in targets]
        sending_s = num_bytes * sum(per_byte for _, per_byte in links)
        return sending_s + max((latency for latency, _ in links), default=0.0)
