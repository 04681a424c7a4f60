"""Several measurements as one cluster."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal.cluster.hardware import Cluster, NodeProfile
from shoal.errors import ConfigError


def merge_clusters(parts: Sequence[Cluster]) -> Cluster:
    """All nodes and links, in their order; of a link measured twice the last counts.

    Defaults for links that nobody measured are those of the first part. Raises ConfigError for
    two different nodes of one name.
    """
    nodes: dict[str, NodeProfile] = {}
    for node in (node for part in parts for node in part.nodes):
        if nodes.setdefault(node.name, node) != node:
            raise ConfigError(
                f"two different measurements are of a node named '{node.name}': measure one again "
                f"with 'shoal profile --name OTHER', or leave it out"
            )
    links = {(link.source, link.target): link for part in parts for link in part.links}
    return msgspec.structs.replace(
        parts[0], nodes=tuple(nodes.values()), links=tuple(links.values())
    )
