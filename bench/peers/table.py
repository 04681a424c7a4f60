"""What rounds of several engines say: the table, and the records of the JSON line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from bench.ratios import Spread, ratios, spread_of
from bench.works import WORKS, Work

OURS = "shoal"

Rounds = Mapping[str, Mapping[str, Sequence[float]]]
"""Figures by work, then by engine; one per round."""


def gain(work: Work, ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times better ours is, whether the figure is a rate or a time."""
    return ratios(theirs, ours) if work.is_better_lower else ratios(ours, theirs)


def results_table(rounds: Rounds, weights: Mapping[str, str]) -> Table:
    table = Table("work", "engine", "weights", "median", "range", "Shoal is better by", "range")
    for name, by_engine in rounds.items():
        work = WORKS[name]
        digits = 0 if max(by_engine[OURS]) >= 100 else 1
        for engine, values in by_engine.items():
            spread = spread_of(values)
            by = gain(work, by_engine[OURS], values)
            told = ("", "") if engine == OURS else (f"{by.text(2)}x", by.range_text(2))
            table.add_row(
                f"{name}, {work.unit}" if engine == OURS else "",
                engine,
                weights[engine],
                spread.text(digits),
                spread.range_text(digits),
                *told,
            )
        table.add_section()
    return table


def steps_to_cached_token(rounds: Rounds) -> float | None:
    """Shoal's first token of a cached prompt, in steps of one stream; None if not measured."""
    if not {"decode-1", "cached-512"} <= rounds.keys():
        return None
    step_ms = 1e3 / spread_of(rounds["decode-1"][OURS]).median
    return spread_of(rounds["cached-512"][OURS]).median / step_ms


def records(rounds: Rounds) -> list[dict[str, Any]]:
    return [
        {
            "work": name,
            "engine": engine,
            "unit": WORKS[name].unit,
            "rounds": [round(value, 3) for value in values],
            "gain": round(gain(WORKS[name], by_engine[OURS], values).median, 3),
        }
        for name, by_engine in rounds.items()
        for engine, values in by_engine.items()
    ]
