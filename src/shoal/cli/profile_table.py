"""How `shoal profile` shows a node and its links."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from shoal.cluster.hardware import Link, NodeProfile

# Beyond this, what else runs on the machine decided the figures.
NOISY_SPREAD = 0.25


def node_table(node: NodeProfile) -> Table:
    table = _table("figure", "value", "spread", title=f"{node.name}: {node.device}")
    threads = "thread" if node.num_cores == 1 else "threads"
    table.title = f"{escape(node.name)}: {node.device}, {node.num_cores} {threads}"
    overhead_us = node.layer_overhead_s * 1e6
    for label, value, field in (
        ("usable memory", f"{node.memory_bytes / 2**30:.1f} GiB", ""),
        ("reading memory", _giga(node.read_bytes_per_s, "GB/s"), "read_bytes_per_s"),
        ("a layer beside its matrices", f"{overhead_us:,.0f} µs", "layer_overhead_s"),
        ("activations beside matrices", _giga(node.activations_per_s, "G/s"), "activations_per_s"),
        (
            "attending to keys and values",
            _giga(node.cache_bytes_per_s, "GB/s"),
            "cache_bytes_per_s",
        ),
    ):
        spread = node.spreads.get(field)
        table.add_row(label, value, "" if spread is None else _percent(spread))
    return table


def rates_table(node: NodeProfile) -> Table:
    rows = sorted({rate.rows for rates in node.matrix_rates.values() for rate in rates})
    table = _table("precision", *map(str, rows), title="billion weights per second, by rows")
    for precision, rates in node.matrix_rates.items():
        cells = {rate.rows: f"{rate.weights_per_s / 1e9:.2f}" for rate in rates}
        table.add_row(precision, *(cells.get(count, "") for count in rows))
    return table


def links_table(links: tuple[Link, ...]) -> Table:
    table = _table("from", "to", "latency", "rate", title="links")
    table.columns[1].justify = "left"
    for link in links:
        latency, rate = f"{link.latency_s * 1e6:,.0f} µs", f"{link.bytes_per_s / 1e6:,.1f} MB/s"
        table.add_row(escape(link.source), escape(link.target), latency, rate)
    return table


def noisy_figures(node: NodeProfile) -> list[str]:
    """Figures whose calls differed too much to be trusted."""
    noisy = [name for name, spread in node.spreads.items() if spread > NOISY_SPREAD]
    return noisy + [
        f"{precision} at {rate.rows} rows"
        for precision, rates in node.matrix_rates.items()
        for rate in rates
        if rate.spread > NOISY_SPREAD
    ]


def _table(first: str, *others: str, title: str) -> Table:
    table = Table(first, *others, title=title, title_justify="left", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _giga(value: float, unit: str) -> str:
    return f"{value / 1e9:.2f} {unit}" if value else "too quick to tell"


def _percent(spread: float) -> str:
    return f"± {spread / 2:.0%}"
