"""How many layers each stage of a chain gets, when layers are equal and stages are not."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shoal.cluster.prediction import Objective

# Thresholds are sums of the very terms they are compared with; this is for their rounding.
_SLACK = 1e-9


class Line(NamedTuple):
    """A stage of k layers, 1 <= k <= `most`, adds `one_s * k` to a lone stream's step and takes
    `many_s * k + rest_s` for a batch."""

    most: int
    one_s: float
    many_s: float
    rest_s: float


def layer_cuts(lines: Sequence[Line], num_layers: int, objective: Objective) -> Iterator[list[int]]:
    """The cuts among which the objective's best is, from the fastest for many to that for one.

    For latency and throughput that is one cut. For both together, every cut that is not worse in
    one of them without being better in the other. There must be room for all layers, and a layer
    for each stage.
    """
    slowest_s = math.inf if objective == "latency" else bottleneck_s(lines, num_layers)
    while True:
        caps = [_cap(line, slowest_s) for line in lines]
        counts = _fill(lines, caps, num_layers)
        yield counts
        if objective != "balanced":
            return
        slowest_s = _next_threshold(lines, counts, caps)
        if slowest_s == math.inf:
            return


def bottleneck_s(lines: Sequence[Line], num_layers: int) -> float:
    """The least that the slowest stage must take.

    Greedy: the next layer goes where it ends soonest. It starts from what every cut must give,
    by the bound of divisible layers.
    """
    pace = sum(1 / line.many_s for line in lines)
    bound_s = (num_layers + sum(line.rest_s / line.many_s for line in lines)) / pace
    counts = [_cap(line, bound_s) for line in lines]
    if sum(counts) > num_layers:
        counts = [1] * len(lines)
    ends = [
        (line.many_s * (count + 1) + line.rest_s, place)
        for place, (line, count) in enumerate(zip(lines, counts, strict=True))
        if count < line.most
    ]
    heapq.heapify(ends)
    for _ in range(num_layers - sum(counts)):
        end_s, place = ends[0]
        line = lines[place]
        counts[place] += 1
        if counts[place] < line.most:
            heapq.heapreplace(ends, (end_s + line.many_s, place))
        else:
            heapq.heappop(ends)
    return max(line.many_s * count + line.rest_s for line, count in zip(lines, counts, strict=True))


def _cap(line: Line, slowest_s: float) -> int:
    """The most layers with which a stage stays within `slowest_s`, at least the one it needs."""
    if slowest_s == math.inf:
        return line.most
    within = int((slowest_s - line.rest_s) / line.many_s * (1 + _SLACK) + _SLACK)
    return max(1, min(line.most, within))


def _fill(lines: Sequence[Line], caps: Sequence[int], num_layers: int) -> list[int]:
    """The least sum of `one_s` under the caps: the quickest stages first."""
    counts = [1] * len(lines)
    left = num_layers - len(lines)
    for place in sorted(range(len(lines)), key=lambda place: (lines[place].one_s, place)):
        more = min(left, caps[place] - 1)
        counts[place] += more
        left -= more
    return counts


def _next_threshold(lines: Sequence[Line], counts: Sequence[int], caps: Sequence[int]) -> float:
    """The next slower batch that lets a quicker stage take a layer from a slower one."""
    givers = [line.one_s for line, count in zip(lines, counts, strict=True) if count > 1]
    slowest_giver_s = max(givers, default=0.0)
    return min(
        (
            line.many_s * (cap + 1) + line.rest_s
            for line, cap in zip(lines, caps, strict=True)
            if cap < line.most and line.one_s < slowest_giver_s
        ),
        default=math.inf,
    )
