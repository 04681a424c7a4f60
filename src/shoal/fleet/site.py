"""Where workers can run, and who would hold what there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import msgspec

from shoal.cluster.costs import ModelCost
from shoal.cluster.goal import Goal
from shoal.cluster.hardware import Cluster
from shoal.cluster.placement import Placement, divide
from shoal.cluster.planner import propose
from shoal.cluster.prediction import predict
from shoal.cluster.timing import Clockwork
from shoal.config import Split
from shoal.errors import PlacementError
from shoal.parallel.partition import Dims


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that can take workers. An `alive` of False: it was there, and has gone.

    `start` tells one start of the same machine from the next.
    """

    name: str
    start: str = ""
    address: str
    num_cores: int
    memory_bytes: int
    alive: bool = True


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """A placement and why it is this one; `describe` says what to expect, if that is known."""

    placement: Placement
    reasons: tuple[str, ...] = ()


class Site(Protocol):
    """`security` says how the machines talk."""

    security: str

    def nodes(self) -> list[Node]: ...

    def place(self, nodes: Collection[str]) -> Placed:
        """Divide the model over some of the nodes. Raises PlacementError, ConfigError."""
        ...

    def predict(self, placement: Placement, num_streams: int) -> float | None:
        """Tokens per second that so many streams on each replica should get together."""
        ...


class FixedSite:
    """Divides as the user said, over nodes in turn; nothing is measured and nothing predicted."""

    def __init__(
        self, dims: Dims, split: Split, nodes: Callable[[], list[Node]], security: str
    ) -> None:
        self.security = security
        self.nodes = nodes
        self._dims = dims
        self._split = split

    def place(self, nodes: Collection[str]) -> Placed:
        if not nodes:
            raise PlacementError("no node is left to run the model on")
        present = [node.name for node in self.nodes() if node.name in nodes]
        return Placed(placement=divide(self._dims, self._split, present))

    def predict(self, placement: Placement, num_streams: int) -> float | None:
        del placement, num_streams
        return None


class MeasuredSite:
    """Has the planner divide the model by what was measured of the nodes."""

    def __init__(
        self,
        cost: ModelCost,
        goal: Goal,
        cluster: Callable[[Collection[str]], Cluster],
        nodes: Callable[[], list[Node]],
        security: str,
    ) -> None:
        """`cluster` gives what was measured of some nodes, measuring those it does not know."""
        self.security = security
        self.nodes = nodes
        self._cost = cost
        self._goal = goal
        self._cluster = cluster

    def place(self, nodes: Collection[str]) -> Placed:
        proposal = propose(self._cluster(nodes), self._cost, self._goal)
        rejected = (f"{other.what}: {other.why}" for other in proposal.rejected)
        return Placed(placement=proposal.placement, reasons=(*proposal.reasons, *rejected))

    def predict(self, placement: Placement, num_streams: int) -> float | None:
        names = {seat.node for replica in placement.replicas for seat in replica.seats}
        clockwork = Clockwork(
            self._cluster(names), self._cost, stream_tokens=self._goal.stream_tokens
        )
        return predict(placement, clockwork, num_streams=num_streams).many_streams


def speeds_of(cluster: Cluster, precision: str) -> Mapping[str, float]:
    """How fast nodes go through weights for one row."""
    return {node.name: node.matrix_rates[precision][0].weights_per_s for node in cluster.nodes}
