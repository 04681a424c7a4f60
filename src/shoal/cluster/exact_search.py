"""The best of all placements, for clusters small enough to look at every one.

Every set of nodes, every order of stages, every way to group nodes into tensor-parallel teams,
every cut of the layers, and every set of such chains side by side as replicas. Nodes that are
alike in all that was measured count as one kind, of which only the number matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product

from shoal.cluster.hardware import Cluster, NodeProfile
from shoal.cluster.options import (
    ENDS,
    Chain,
    CutChain,
    Names,
    Option,
    Options,
    TimedChain,
    together,
)
from shoal.cluster.prediction import Objective
from shoal.cluster.rates import Wires

Counts = tuple[int, ...]
"""How many nodes of each kind."""

MOST_CHAINS = 10_000
"""Six nodes that all differ make 9 365 chains; looking at them takes about a second."""

_MOST_COUNTS = 256


class ExactSearch:
    """`best_of[counts]` are the options that use exactly so many nodes of each kind, and
    `chains_of[counts]` those that are one replica."""

    def __init__(self, options: Options, kinds: list[list[str]]) -> None:
        self._options = options
        self._objective = options.goal.objective
        self._kinds = kinds
        self._all = tuple(len(kind) for kind in kinds)
        self.chains_of: dict[Counts, list[Option]] = {}
        self.best_of: dict[Counts, list[Option]] = {}
        for chain, counts in self._chains((), (0,) * len(kinds)):
            self._look_at(chain, counts)
        self._combine()

    def _look_at(self, chain: Chain, counts: Counts) -> None:
        timed = self._options.timed(chain)
        if timed is None:
            return
        known = self.chains_of.get(counts, [])
        if self._objective == "balanced" and self._is_outdone(timed, known):
            return
        found = self._options.cuts(timed, self._objective)
        self.chains_of[counts] = keep_best([*known, *found], self._objective)

    def _is_outdone(self, timed: TimedChain, known: list[Option]) -> bool:
        """A known option is as good in both as the chain's cuts are in either."""
        ideal = [next(self._options.cuts(timed, end)) for end in ENDS]
        return any(option.one >= ideal[0].one and option.many >= ideal[1].many for option in known)

    def _chains(self, chain: Chain, used: Counts) -> Iterator[tuple[Chain, Counts]]:
        """All chains of up to as many stages as layers, with their nodes by kind."""
        left = [total - count for total, count in zip(self._all, used, strict=True)]
        if len(chain) == self._options.cost.dims.num_layers:
            return
        for counts in product(*(range(number + 1) for number in left)):
            if not 0 < sum(counts) <= self._options.max_ranks:
                continue
            names = [
                name
                for kind, first, count in zip(self._kinds, used, counts, strict=True)
                for name in kind[first : first + count]
            ]
            longer = (*chain, self._options.team_order(names))
            after = _plus(used, counts)
            yield longer, after
            yield from self._chains(longer, after)

    def _combine(self) -> None:
        """Replicas side by side, by the number of nodes they use together."""
        for counts in product(*(range(number + 1) for number in self._all)):
            found = list(self.chains_of.get(counts, []))
            for part in product(*(range(number + 1) for number in counts)):
                rest = tuple(a - b for a, b in zip(counts, part, strict=True))
                if not any(part) or not any(rest):
                    continue
                found += [
                    together((one, others))
                    for one in self.chains_of.get(part, [])
                    for others in self.best_of.get(rest, [])
                ]
            if found:
                self.best_of[counts] = keep_best(found, self._objective)

    def best(self) -> Option | None:
        return self._best_of(self.best_of)

    def best_with(self, node: str) -> Option | None:
        """The best that uses exactly the nodes of the best and `node`."""
        best = self.best()
        wanted = [node, *(best.nodes if best else [])]
        return self._best_of([tuple(sum(name in wanted for name in kind) for kind in self._kinds)])

    def best_split(self) -> Option | None:
        """The best single replica of several nodes."""
        several = [counts for counts in self.chains_of if sum(counts) > 1]
        return self._best_of(several, self.chains_of)

    def _best_of(
        self, among: Iterable[Counts], table: Mapping[Counts, list[Option]] | None = None
    ) -> Option | None:
        options = self.best_of if table is None else table
        found = [option for counts in among for option in options.get(counts, [])]
        best = max(found, key=lambda option: option.worth(self._objective), default=None)
        return best and self._named(best)

    def _named(self, option: Option) -> Option:
        """Each replica was timed with the first nodes of each kind: give them different ones."""
        kind_of = {name: place for place, kind in enumerate(self._kinds) for name in kind}
        names = [iter(kind) for kind in self._kinds]
        replicas = []
        for cut in option.replicas:
            teams: list[Names] = []
            for team in cut.chain:
                teams.append(self._options.team_order(next(names[kind_of[n]]) for n in team))
            replicas.append(CutChain(tuple(teams), cut.num_layers))
        return Option(option.one, option.many, tuple(replicas))


def keep_best(options: Iterable[Option], objective: Objective) -> list[Option]:
    """Those that may be part of a best placement: for both objectives, who is not outdone."""
    ranked = sorted(options, key=lambda option: (option.one, option.many), reverse=True)
    if objective != "balanced":
        return [max(ranked, key=lambda option: option.worth(objective))] if ranked else []
    kept: list[Option] = []
    for option in ranked:
        if not kept or option.many > kept[-1].many:
            kept.append(option)
    return kept


def kinds_of(cluster: Cluster) -> list[list[str]]:
    """Nodes that may be exchanged for each other, by name, in the cluster's order."""
    wires = Wires(cluster)
    kinds: list[list[NodeProfile]] = []
    for node in cluster.nodes:
        for kind in kinds:
            if _are_alike(kind[0], node, cluster, wires):
                kind.append(node)
                break
        else:
            kinds.append([node])
    return [[node.name for node in kind] for kind in kinds]


def num_chains(kinds: list[list[str]]) -> int:
    """How many chains there are to look at; more than MOST_CHAINS may be cut short there."""
    totals = tuple(len(kind) for kind in kinds)
    ways: dict[Counts, int] = {}
    size = 1
    for total in totals:
        size *= total + 1
    if size > _MOST_COUNTS:
        return MOST_CHAINS + 1
    for counts in product(*(range(total + 1) for total in totals)):
        ways[counts] = 1 if not any(counts) else 0
        for team in product(*(range(number + 1) for number in counts)):
            if any(team):
                ways[counts] += ways[tuple(a - b for a, b in zip(counts, team, strict=True))]
    return sum(ways.values()) - 1


def _are_alike(one: NodeProfile, other: NodeProfile, cluster: Cluster, wires: Wires) -> bool:
    """The same measurements, and nothing changes if they swap their places."""
    if _unnamed(one) != _unnamed(other):
        return False
    a, b = one.name, other.name
    rest = [node.name for node in cluster.nodes if node.name not in (a, b)]
    return wires.link(a, b) == wires.link(b, a) and all(
        wires.link(a, name) == wires.link(b, name) and wires.link(name, a) == wires.link(name, b)
        for name in rest
    )


def _unnamed(node: NodeProfile) -> tuple[object, ...]:
    return tuple(getattr(node, field) for field in node.__struct_fields__ if field != "name")


def _plus(one: Counts, other: Counts) -> Counts:
    return tuple(a + b for a, b in zip(one, other, strict=True))
