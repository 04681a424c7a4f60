"""A good placement for clusters too large to look at every one.

Starts from chains dealt greedily, for several numbers of replicas, and goes on from the best of
them by small moves as long as one helps and the budget lasts. Deterministic: the budget counts
work, not seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

from shoal.cluster.deals import deals
from shoal.cluster.moves import Move, State, moves, moves_with
from shoal.cluster.options import Chain, Option, Options, together

# In moves tried and layers dealt to stages: about a second.
BUDGET = 120_000
# No start may have more than this part of it.
_START_SHARE = 3

_MOVE_WORK = 5


class LocalSearch:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._objective = options.goal.objective
        self._names = options.names_by_speed
        self._work = 0
        self._timed: dict[Chain, Option | None] = {}
        starts = [state for state in deals(options, self._names) if self._value(state)]
        starts.sort(key=lambda state: self._worth(self._value(state)), reverse=True)
        self._work = 0
        self._state: State = ()
        for start in starts:
            if self._work > BUDGET:
                break
            state = self._climb(start)
            if self._worth(self._value(state)) > self._worth(self._value(self._state)):
                self._state = state

    def best(self) -> Option | None:
        chains = (self._options.best(chain) for chain in self._state)
        return together(chain for chain in chains if chain) if self._state else None

    def best_with(self, node: str) -> Option | None:
        """The best found that has everything of the best and `node` as well."""
        found = (
            self._value(move.applied(self._state))
            for move in moves_with(self._state, node, self._options)
        )
        return max(found, key=self._worth, default=None)

    def best_split(self) -> Option | None:
        """The best single replica of several nodes found."""
        several = (
            option for chain, option in self._timed.items() if len(chain) > 1 or len(chain[0]) > 1
        )
        return max(several, key=self._worth, default=None)

    def _climb(self, state: State) -> State:
        """First improvement, over and over."""
        limit = self._work + BUDGET // _START_SHARE
        worth = self._worth(self._value(state))
        while self._work < limit:
            parts = [self._option(chain) for chain in state]
            for move in moves(state, self._names, self._options):
                better = self._worth(self._moved(parts, move))
                if better > worth:
                    state, worth = move.applied(state), better
                    break
                if self._work > limit:
                    return state
            else:
                return state
        return state

    def _moved(self, parts: list[Option | None], move: Move) -> Option | None:
        self._work += _MOVE_WORK + len(parts) // 4
        kept = [part for place, part in enumerate(parts) if place not in move.without]
        return _all_of([*map(self._option, move.added), *kept])

    def _value(self, state: State) -> Option | None:
        return _all_of([self._option(chain) for chain in state])

    def _option(self, chain: Chain) -> Option | None:
        """None if the chain has no room for the model."""
        if chain not in self._timed:
            work = self._options.cost.dims.num_layers + _MOVE_WORK * len(chain)
            self._work += 2 * work if self._objective == "balanced" else work
            self._timed[chain] = self._options.quick_best(chain)
        return self._timed[chain]

    def _worth(self, option: Option | None) -> tuple[float, float]:
        return option.worth(self._objective) if option else (0.0, 0.0)


def _all_of(parts: Iterable[Option | None]) -> Option | None:
    """The replicas together; None if one is missing, or all are."""
    found = []
    for part in parts:
        if part is None:
            return None
        found.append(part)
    return together(found) if found else None
