"""Rounds become figures: medians with their ranges, and ratios taken within one round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """Of the rounds."""

    median: float
    lowest: float
    highest: float

    def text(self, digits: int) -> str:
        return f"{self.median:,.{digits}f}"

    def range_text(self, digits: int) -> str:
        return f"{self.lowest:,.{digits}f} to {self.highest:,.{digits}f}"


def spread_of(values: Sequence[float]) -> Spread:
    """Raises ValueError for no rounds."""
    if not values:
        raise ValueError("no rounds were measured")
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, round by round: what slowed a whole round cancels out.

    Raises ValueError unless both have the same number of rounds, one at least.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rounds cannot be set beside {len(theirs)}")
    return spread_of([our / their for our, their in zip(ours, theirs, strict=True)])


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """All of them, beginning with another one each turn: nobody always follows the same one."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]
