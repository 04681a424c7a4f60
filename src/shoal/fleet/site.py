"""Where workers can run, and who would hold what there."""

from __future__ import annotations

from collections.abc import Callable, Collection
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
from shoal.fleet.costing import head_in_layers
from shoal.models.config import DecoderConfig


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
    """Divides as the user said, over nodes in turn; nothing is measured and nothing predicted.

    Where the user has not said it, in proportion to the nodes' cores.
    """

    def __init__(
        self, model: DecoderConfig, split: Split, nodes: Callable[[], list[Node]], security: str
    ) -> None:
        self.security = security
        self.nodes = nodes
        self._model = model
        self._split = split

    def place(self, nodes: Collection[str]) -> Placed:
        if not nodes:
            raise PlacementError("no node is left to run the model on")
        cores = {each.name: float(each.num_cores) for each in self.nodes() if each.name in nodes}
        placement = divide(
            self._model.dims,
            self._split,
            list(cores),
            speeds=cores,
            head_layers=head_in_layers(self._model),
        )
        return Placed(placement=placement)

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
