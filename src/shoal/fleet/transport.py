"""How the ranks of a stage add up, by where they are."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.cluster.placement import Seat
from shoal.config import EngineConfig, Transport


def transport_of(stage: Sequence[Seat], config: EngineConfig) -> Transport:
    """Shared memory where all ranks are on one node, sockets between nodes."""
    if config.split.transport != "auto":
        return config.split.transport
    return "shared-memory" if len({seat.node for seat in stage}) == 1 else "sockets"
