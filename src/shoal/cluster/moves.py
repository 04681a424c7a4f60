"""Small changes of a placement, which local search tries one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shoal.cluster.options import Chain, Options

State = tuple[Chain, ...]
"""The replicas' chains."""

# Unused nodes that a move may bring in: the quickest ones.
_MOST_NEWCOMERS = 6


def moves(state: State, names: Sequence[str], options: Options) -> Iterator[State]:
    """`names` are all nodes, the quickest first."""
    for place, chain in enumerate(state):
        for changed in _within(chain, options):
            yield _with_chain(state, place, changed)
        yield _without(state, place)
    yield from _between(state)
    used = {name for chain in state for team in chain for name in team}
    newcomers = [name for name in names if name not in used][:_MOST_NEWCOMERS]
    for node in newcomers:
        yield from moves_with(state, node, options)
        for place, chain in enumerate(state):
            for changed in _replaced(chain, node, options):
                yield _with_chain(state, place, changed)


def moves_with(state: State, node: str, options: Options) -> Iterator[State]:
    """The node as one more stage, as one more rank of a stage, or as a replica of its own."""
    yield (*state, ((node,),))
    for place, chain in enumerate(state):
        for stage in range(len(chain) + 1):
            yield _with_chain(state, place, (*chain[:stage], (node,), *chain[stage:]))
        for stage, team in enumerate(chain):
            if len(team) < options.max_ranks:
                longer = options.team_order((*team, node))
                yield _with_chain(state, place, (*chain[:stage], longer, *chain[stage + 1 :]))


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


def _between(state: State) -> Iterator[State]:
    """A stage moves to the end of another chain; two chains become one."""
    for source, chain in enumerate(state):
        for target, other in enumerate(state):
            if source == target:
                continue
            for stage, team in enumerate(chain):
                if len(chain) > 1:
                    moved = _with_chain(state, target, (*other, team))
                    yield _with_chain(moved, source, chain[:stage] + chain[stage + 1 :])
            yield _without(_with_chain(state, target, other + chain), source)


def _with_chain(state: State, place: int, chain: Chain) -> State:
    return (*state[:place], chain, *state[place + 1 :])


def _without(state: State, place: int) -> State:
    return state[:place] + state[place + 1 :]
