"""Small changes of a placement, which local search tries one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shoal.cluster.options import Chain, Options

State = tuple[Chain, ...]
"""The replicas' chains."""

# Unused nodes that a move may bring in: the quickest ones.
_MOST_NEWCOMERS = 6


class Move(NamedTuple):
    """Chains that go, by their place in the state, and chains that come."""

    without: tuple[int, ...]
    added: tuple[Chain, ...]

    def applied(self, state: State) -> State:
        kept = (chain for place, chain in enumerate(state) if place not in self.without)
        return (*kept, *self.added)


def moves(state: State, names: Sequence[str], options: Options) -> Iterator[Move]:
    """`names` are all nodes, the quickest first."""
    used = {name for chain in state for team in chain for name in team}
    newcomers = [name for name in names if name not in used][:_MOST_NEWCOMERS]
    for place, chain in enumerate(state):
        for changed in _within(chain, options):
            yield Move((place,), (changed,))
        for node in newcomers:
            for changed in _replaced(chain, node, options):
                yield Move((place,), (changed,))
        yield Move((place,), ())
    for node in newcomers:
        yield from moves_with(state, node, options)
    yield from _between(state)


def moves_with(state: State, node: str, options: Options) -> Iterator[Move]:
    """The node as one more stage, as one more rank of a stage, or as a replica of its own."""
    yield Move((), (((node,),),))
    for place, chain in enumerate(state):
        for stage in range(len(chain) + 1):
            yield Move((place,), ((*chain[:stage], (node,), *chain[stage:]),))
        for stage, team in enumerate(chain):
            if len(team) < options.max_ranks:
                longer = options.team_order((*team, node))
                yield Move((place,), ((*chain[:stage], longer, *chain[stage + 1 :]),))


def _within(chain: Chain, options: Options) -> Iterator[Chain]:
    """Fewer nodes, two stages as one team, a team as stages, neighbours swapped."""
    for stage, team in enumerate(chain):
        before, after = chain[:stage], chain[stage + 1 :]
        if before or after:
            yield before + after
        if len(team) > 1:
            for rank in range(len(team)):
                yield (*before, team[:rank] + team[rank + 1 :], *after)
            yield (*before, *((node,) for node in team), *after)
        if after:
            yield (*before, after[0], team, *after[1:])
            if len(team) + len(after[0]) <= options.max_ranks:
                yield (*before, options.team_order(team + after[0]), *after[1:])


def _replaced(chain: Chain, node: str, options: Options) -> Iterator[Chain]:
    for stage, team in enumerate(chain):
        for other in team:
            changed = options.team_order(node if name == other else name for name in team)
            yield (*chain[:stage], changed, *chain[stage + 1 :])


def _between(state: State) -> Iterator[Move]:
    """A stage moves to the end of another chain, or changes places with one there; or two chains
    become one, or one becomes two."""
    for source, chain in enumerate(state):
        for stage in range(1, len(chain)):
            yield Move((source,), (chain[:stage], chain[stage:]))
        for target, other in enumerate(state):
            if source == target:
                continue
            both = (source, target)
            for stage, team in enumerate(chain):
                before, after = chain[:stage], chain[stage + 1 :]
                if before or after:
                    yield Move(both, (before + after, (*other, team)))
                for place, swapped in enumerate(other if source < target else ()):
                    swap = (*other[:place], team, *other[place + 1 :])
                    yield Move(both, ((*before, swapped, *after), swap))
            yield Move(both, (chain + other,))
