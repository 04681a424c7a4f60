"""What `bench.sweep` has found, to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from rich.table import Table

from bench.extrapolation import Extrapolated
from bench.roofline import Rates, limit_of
from bench.sweep_points import Point


def points_table(title: str, points: Sequence[Point], rates: Rates) -> Table:
    table = Table("model", "layers", "", "streams", "context", "ms of a step", "range", title=title)
    for name in ("tokens/s", "limit", "of the limit"):
        table.add_column(name)
    for column in table.columns[3:]:
        column.justify = "right"
    for point in points:
        table.add_row(
            point.model,
            str(point.num_layers),
            point.figure,
            str(point.num_streams),
            f"{point.context:,}",
            point.ms.text(2),
            point.ms.range_text(2),
            *_beside_limit(point, rates),
        )
    return table


def wholes_table(wholes: Sequence[Extrapolated], rates: Rates) -> Table:
    parts = ("ms a layer", "head ms", "rest ms", "misfit", "ms of a step")
    rates_of = ("tokens/s", "limit", "of the limit")
    title = "extrapolated to all layers and all the vocabulary: not measured"
    table = Table("model", "layers", "work", *parts, *rates_of, title=title)
    for column in table.columns[3:]:
        column.justify = "right"
    for one in wholes:
        whole = one.whole
        table.add_row(
            one.model,
            str(whole.num_layers),
            one.work,
            f"{whole.layer_ms:.2f}",
            f"{whole.head_ms:.2f}",
            f"{whole.rest_ms:.2f}",
            f"{whole.misfit:.0%}",
            f"{whole.ms:.1f}",
            *_beside_limit(one, rates),
        )
    return table


def record_of(one: Point | Extrapolated, rates: Rates) -> dict[str, Any]:
    limit = limit_of(one.shape, one.load, rates)
    told = {
        **msgspec.to_builtins(one),
        "tokens_per_s": one.tokens_per_s,
        "limit_tokens_per_s": one.load.rows / limit.ms * 1e3,
        "limit_of": limit.binds,
    }
    if isinstance(one, Point):
        return told | {"context": one.context}
    return told | {"ms": one.whole.ms}


def _beside_limit(one: Point | Extrapolated, rates: Rates) -> tuple[str, str, str]:
    limit = limit_of(one.shape, one.load, rates)
    most = one.load.rows / limit.ms * 1e3
    share = f"{one.tokens_per_s / most:.0%} ({limit.binds})"
    return f"{one.tokens_per_s:,.1f}", f"{most:,.1f}", share
