"""Reads a cluster file, and says in which node what is wrong with it. Bytes in, values out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isfinite
from typing import Any

import msgspec

from shoal.cluster.hardware import Cluster, Link, NodeProfile
from shoal.errors import ConfigError

_NODE_PLACE = re.compile(r"\$\.nodes\[(\d+)\]")


def decode_cluster(data: bytes, origin: str) -> Cluster:
    """`origin` names the file in errors. Raises ConfigError listing everything out of range."""
    try:
        cluster = msgspec.json.decode(data, type=Cluster)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{origin} is no cluster file: {_located(str(error), data)}") from error
    problems = list(_problems(cluster))
    if problems:
        raise ConfigError(f"{origin}: {'; '.join(problems)}")
    return cluster


def _located(message: str, data: bytes) -> str:
    """msgspec names a node by its place; add its name, if it has one."""
    place = _NODE_PLACE.search(message)
    if not place:
        return message
    raw: Any = msgspec.json.decode(data)
    node = raw["nodes"][int(place[1])]
    name = node.get("name") if isinstance(node, dict) else None
    return f"{message} (node {name})" if name else message


def _problems(cluster: Cluster) -> Iterator[str]:
    names = [node.name for node in cluster.nodes]
    if not names:
        yield "there are no nodes in it"
    for name in sorted(set(names)):
        if names.count(name) > 1:
            yield f"{names.count(name)} nodes are named '{name}'"
    for node in cluster.nodes:
        yield from _problems_of_node(node)
    for link in cluster.links:
        yield from _problems_of_link(link, names)
    yield from _wrong("the cluster", "default_latency_s", cluster.default_latency_s, least=0)
    yield from _wrong("the cluster", "default_bytes_per_s", cluster.default_bytes_per_s)


def _problems_of_node(node: NodeProfile) -> Iterator[str]:
    where = f"node {node.name}"
    for field in ("memory_bytes", "read_bytes_per_s"):
        yield from _wrong(where, field, getattr(node, field))
    for field in ("layer_overhead_s", "activations_per_s", "cache_bytes_per_s"):
        yield from _wrong(where, field, getattr(node, field), least=0)
    for precision, rates in node.matrix_rates.items():
        rows = [rate.rows for rate in rates]
        field = f"matrix_rates.{precision}"
        if not rows:
            yield f"{where}: {field} is empty"
        elif rows[0] < 1 or rows != sorted(set(rows)):
            yield f"{where}: rows of {field} must rise from 1 or more, they are {rows}"
        for rate in rates:
            yield from _wrong(where, f"{field}.weights_per_s", rate.weights_per_s)


def _problems_of_link(link: Link, names: list[str]) -> Iterator[str]:
    where = f"link {link.source} to {link.target}"
    for end in (link.source, link.target):
        if end not in names:
            yield f"{where}: there is no node '{end}'"
    yield from _wrong(where, "latency_s", link.latency_s, least=0)
    yield from _wrong(where, "bytes_per_s", link.bytes_per_s)


def _wrong(where: str, field: str, value: float, *, least: float | None = None) -> Iterator[str]:
    if not isfinite(value) or (value <= 0 if least is None else value < least):
        wanted = "positive" if least is None else f"{least} or more"
        yield f"{where}: {field} must be {wanted}, it is {value}"
