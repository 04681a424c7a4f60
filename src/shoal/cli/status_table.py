"""How `shoal status` shows a served model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Group, JustifyMethod, RenderableType
from rich.markup import escape
from rich.table import Table

from shoal.cli.console import human_bytes
from shoal.cli.status_rates import Rates, WorkerRates

if TYPE_CHECKING:
    from shoal.engine.api import WorkerStats
    from shoal.fleet.serving_file import Serving
    from shoal.fleet.status import FleetStatus, NodeStatus, ReplicaStatus

UNKNOWN = "–"

_NODE_COLUMNS: dict[str, JustifyMethod] = {
    "device": "left",
    "memory": "right",
    "state": "left",
    "workers": "right",
}


def fleet_view(serving: Serving, status: FleetStatus, rates: Rates) -> RenderableType:
    return Group(
        _summary(serving, status, rates),
        "",
        _nodes_table(status.nodes),
        *(
            part
            for replica in status.replicas
            for part in ("", _replica_line(replica, rates), _workers_table(replica, rates))
        ),
    )


def whole_view(serving: Serving, *, ok: bool, reason: str, load: str) -> RenderableType:
    """Of a server without workers."""
    return _facts(
        *_identity(serving),
        ("placed", "whole in this one process"),
        ("health", _health(ok, reason)),
        ("load", load),
    )


def _summary(serving: Serving, status: FleetStatus, rates: Rates) -> Table:
    ill = [each for each in status.replicas if not each.ok]
    health = "; ".join(f"{each.name}: {each.reason}" for each in ill) or _reason(status)
    speed = sum(rates.tokens_per_s.values()) if rates.tokens_per_s else None
    return _facts(
        *_identity(serving),
        ("placed", escape(status.description)),
        ("between", escape(status.security)),
        ("health", _health(not ill, health)),
        ("load", load_text(*_load(status))),
        ("speed", UNKNOWN if speed is None else f"[bold]{speed:,.0f}[/] tokens/s now"),
        *([("planner", escape(status.predicted))] if status.predicted else []),
    )


def load_text(num_running: int, num_waiting: int) -> str:
    return f"{num_running:,} running, {num_waiting:,} waiting"


def _load(status: FleetStatus) -> tuple[int, int]:
    counts = [each.stats for each in status.replicas]
    return sum(one.num_running for one in counts), sum(one.num_waiting for one in counts)


def _reason(status: FleetStatus) -> str:
    notable = [f"{each.name}: {each.reason}" for each in status.replicas if _is_notable(each)]
    if notable:
        return "; ".join(notable)
    return "working" if any(each.reason == "working" for each in status.replicas) else "idle"


def _is_notable(replica: ReplicaStatus) -> bool:
    return replica.reason not in ("working", "idle")


def _identity(serving: Serving) -> tuple[tuple[str, str], ...]:
    up = _up_time(max(time.time() - serving.started_s, 0.0))
    return (
        ("model", f"[bold]{escape(serving.model)}[/] at {serving.url}"),
        ("server", f"process {serving.pid}, up for {up}"),
    )


def _up_time(seconds: float) -> str:
    """In two units: `3 m 20 s`, `2 d 5 h`."""
    amounts = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    parts: list[str] = []
    for unit, unit_s in amounts:
        count, seconds = divmod(seconds, unit_s)
        if count or parts or unit == "s":
            parts.append(f"{count:.0f} {unit}")
    return " ".join(parts[:2])


def _health(ok: bool, reason: str) -> str:
    return f"[green]ok[/], {escape(reason)}" if ok else f"[bold red]not ok[/]: {escape(reason)}"


def _facts(*facts: tuple[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for label, value in facts:
        grid.add_row(f"[dim]{label}[/]", value)
    return grid


def _nodes_table(nodes: list[NodeStatus]) -> Table:
    table = _table("node", "address")
    for name, justify in _NODE_COLUMNS.items():
        table.add_column(name, justify=justify, no_wrap=True)
    for each in nodes:
        table.add_row(
            escape(each.name),
            escape(each.address),
            escape(each.device),
            f"{each.memory_bytes / 2**30:.1f} GiB",
            _state(each),
            str(each.num_workers),
        )
    return table


def _state(node: NodeStatus) -> str:
    if not node.alive:
        return "[red]down[/]"
    return "[yellow]drained[/]" if node.drained else "[green]up[/]"


def _replica_line(replica: ReplicaStatus, rates: Rates) -> str:
    stats = replica.stats
    speed = rates.tokens_per_s.get(replica.name)
    cache = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
    colour = "yellow" if replica.ok else "bold red"
    health = f" [{colour}]{escape(replica.reason)}[/];" if _is_notable(replica) else ""
    return (
        f"[bold]{escape(replica.name)}[/]:{health} epoch {stats.epoch}; "
        f"{load_text(stats.num_running, stats.num_waiting)}; "
        f"{UNKNOWN if speed is None else f'{speed:,.0f}'} tokens/s; cache {cache:.0%} in use"
    )


def _workers_table(replica: ReplicaStatus, rates: Rates) -> Table:
    table = _table("worker", "node")
    for name in ("stage", "rank", "layers", "busy", "bubble", "sends"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in replica.stats.workers:
        now = rates.workers.get((replica.name, each.stage, each.rank))
        table.add_row(
            escape(each.worker),
            escape(each.node),
            str(each.stage),
            str(each.rank),
            _layers(each),
            *_rate_cells(now),
        )
    return table


def _layers(worker: WorkerStats) -> str:
    first, stop = worker.layers
    return f"{first}–{stop - 1}" if stop - first > 1 else str(first)


def _rate_cells(now: WorkerRates | None) -> tuple[str, str, str]:
    if now is None:
        return (UNKNOWN,) * 3
    sent = human_bytes(round(now.sent_bytes_per_s))
    return f"{now.busy:.0%}", f"{now.bubble:.0%}", f"{sent}/s"


def _table(*names: str) -> Table:
    """Its first columns hold names, which are cut short where the terminal is narrow."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name, overflow="ellipsis")
    return table
