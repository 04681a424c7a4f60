"""What the planner expected of a running fleet, beside what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoal.cluster.placement import Placement
from shoal.cluster.prediction import compare
from shoal.engine.api import EngineStats
from shoal.fleet.remote_executor import RemoteExecutor
from shoal.fleet.site import Site

# Less tells more of the start than of the speed.
_MIN_ACTIVE_S = 2.0


class Forecast:
    """Compares since the start, or since `start_anew`."""

    def __init__(
        self,
        site: Site,
        executors: Sequence[RemoteExecutor],
        stats: Callable[[], EngineStats],
    ) -> None:
        self._site = site
        self._executors = executors
        self._stats = stats
        self._base_tokens = 0
        self._base_guessed = 0
        self._base_steps = 0
        self._base_active_s = 0.0

    def start_anew(self) -> None:
        stats = self._stats()
        self._base_tokens, self._base_steps = stats.generated_tokens, stats.steps
        self._base_guessed = stats.accepted_tokens
        self._base_active_s = self._active_s()

    def text(self) -> str:
        """`predicted 41 tokens/s, measured 38: 7 % less (1.0 streams)`; "" without a prediction.

        Measured over the time with work. How many streams there were on each replica follows from
        the tokens of a step, without those guessed, and the steps under way at a time.
        """
        placements = tuple(executor.crew.placement for executor in self._executors)
        placement = Placement(replicas=placements)
        stats, active_s = self._stats(), self._active_s() - self._base_active_s
        num_tokens = stats.generated_tokens - self._base_tokens
        num_steps = stats.steps - self._base_steps
        if active_s < _MIN_ACTIVE_S or not num_steps:
            return self._expected(placement)
        depth = sum(len(each.stages) for each in placements) / len(placements)
        num_drawn_alone = num_tokens - (stats.accepted_tokens - self._base_guessed)
        num_streams = max(1.0, num_drawn_alone / num_steps * depth)
        predicted = self._site.predict(placement, round(num_streams))
        if predicted is None:
            return ""
        measured = num_tokens / active_s * len(placements)
        return f"{compare(predicted, measured)} ({num_streams:.1f} streams)"

    def _expected(self, placement: Placement) -> str:
        one = self._site.predict(placement, 1)
        many = self._site.predict(placement, 32)
        if one is None or many is None:
            return ""
        return f"predicted {one:,.1f} tokens/s for one stream, {many:,.0f} for 32"

    def _active_s(self) -> float:
        return sum(executor.active_s() for executor in self._executors)
