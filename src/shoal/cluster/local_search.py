"""A good placement for clusters too large to look at every one.

Starts from chains dealt greedily, for several numbers of replicas, and goes on from the best of
them by small moves as long as one helps and the budget lasts. Deterministic: the budget counts
timed stages, not seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

from shoal.cluster.deals import deals
from shoal.cluster.moves import State, moves, moves_with
from shoal.cluster.options import Chain, Option, Options, together

BUDGET_STAGES = 40_000


class LocalSearch:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._objective = options.goal.objective
        self._names = options.names_by_speed
        self._timed: dict[Chain, Option | None] = {}
        starts = [state for state in deals(options, self._names) if self.value(state)]
        starts.sort(key=self._worth, reverse=True)
        self._state: State = max(
            (self._climb(state) for state in starts[:3]), key=self._worth, default=()
        )

    def best(self) -> Option | None:
        return self.value(self._state)

    def best_with(self, node: str) -> Option | None:
        """The best found that has everything of the best and `node` as well."""
        return self._best_of(moves_with(self._state, node, self._options))

    def best_split(self) -> Option | None:
        """The best single replica of several nodes found."""
        chains = [chain for chain in self._timed if len(chain) > 1 or len(chain[0]) > 1]
        return self._best_of((chain,) for chain in chains)

    def value(self, state: State) -> Option | None:
        """The replicas of a state together; None if one of them does not fit."""
        parts = []
        for chain in state:
            if chain not in self._timed:
                self._timed[chain] = self._options.best(chain)
            part = self._timed[chain]
            if part is None:
                return None
            parts.append(part)
        return together(parts) if parts else None

    def _climb(self, state: State) -> State:
        """First improvement, over and over."""
        budget = self._options.num_timed_stages + BUDGET_STAGES // 3
        improved = True
        while improved:
            improved = False
            worth = self._worth(state)
            for move in moves(state, self._names, self._options):
                if self._options.num_timed_stages > budget:
                    return state
                if self._worth(move) > worth:
                    state, improved = move, True
                    break
        return state

    def _worth(self, state: State) -> tuple[float, float]:
        option = self.value(state)
        return option.worth(self._objective) if option else (0.0, 0.0)

    def _best_of(self, states: Iterable[State]) -> Option | None:
        return self.value(max(states, key=self._worth, default=()))
