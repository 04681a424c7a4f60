"""Placements to start from: nodes dealt greedily to a number of chains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

from shoal.cluster.moves import State
from shoal.cluster.options import Chain, Options

# Numbers of chains and of nodes to try rise by this factor.
_GROWTH = 1.3
_TEAM_SIZES = (2, 3, 4, 8)
# Beyond, timing teams and trying all ends takes seconds; small moves still find some.
_FEW_NODES = 24


def deals(options: Options, names: Sequence[str]) -> Iterator[State]:
    """For rising numbers of chains: from when each has room for the model until no node is left."""
    dealer = _Dealer(options, names)
    num_chains = 1
    while num_chains <= dealer.most_chains:
        for prefer_room in (False, True):
            yield from dealer.deal(num_chains, prefer_room=prefer_room)
        num_chains = max(num_chains + 1, int(num_chains * _GROWTH))
    if len(names) <= _FEW_NODES:
        yield from _with_ends(names)


def _with_ends(names: Sequence[str]) -> Iterator[State]:
    """Every choice of first and last stage: where memory is short, few hold embedding and head."""
    for first, last in permutations(names, 2):
        between = ((name,) for name in names if name not in (first, last))
        yield (((first,), *between, (last,)),)


class _Dealer:
    """Room is in layers; `needed` counts embedding and head as the layers they take the room of."""

    def __init__(self, options: Options, names: Sequence[str]) -> None:
        goal, cost, clockwork = options.goal, options.cost, options.clockwork
        self._options = options
        is_small = len(names) <= _FEW_NODES
        self._team_sizes = [s for s in _TEAM_SIZES if s <= options.max_ranks and is_small]
        self._num_layers = cost.dims.num_layers
        rows = 1 if goal.objective == "latency" else max(1.0, goal.num_streams / 4)
        whole = options.team((names[0],)).slices[0]
        layer_bytes = cost.layer_bytes(whole, goal.kv_tokens)
        tables = cost.table_bytes(whole, is_first=True, is_last=True)
        self._needed = self._num_layers + tables / layer_bytes
        self._room = {
            name: min(self._needed, clockwork.nodes[name].memory_bytes / layer_bytes)
            for name in names
            if options.most_layers((name,), is_first=False, is_last=False)
        }
        self._layer_s = {
            name: clockwork.stage(options.team((name,)), rows).layer_s for name in self._room
        }
        self._hop_s = {
            source: {target: clockwork.hop_s(source, target, rows) for target in self._room}
            for source in self._room
        }
        self.most_chains = int(sum(self._room.values()) / self._needed)

    def deal(self, num_chains: int, *, prefer_room: bool) -> Iterator[State]:
        """The next node goes to the chain with the least room: the one that adds the least time
        per layer, or the least for the room it has."""
        chains: list[list[str]] = [[] for _ in range(num_chains)]
        filled = [0.0] * num_chains
        left = list(self._room)
        next_yield = 0.0
        while left:
            open_chains = [i for i in range(num_chains) if len(chains[i]) < self._num_layers]
            if not open_chains:
                break
            target = min(open_chains, key=filled.__getitem__)
            name = self._next(chains[target], left, prefer_room)
            left.remove(name)
            chains[target].append(name)
            filled[target] += self._room[name]
            num_dealt = len(self._room) - len(left)
            if min(filled) >= self._needed and (num_dealt >= next_yield or not left):
                yield from self._as_states(chains)
                next_yield = num_dealt * _GROWTH

    def _next(self, chain: Sequence[str], left: Sequence[str], prefer_room: bool) -> str:
        hops = self._hop_s[chain[-1]] if chain else {}
        room, layer_s = self._room, self._layer_s

        def added_s(name: str) -> float:
            seconds = layer_s[name] + hops.get(name, 0.0) / room[name]
            return seconds / room[name] if prefer_room else seconds

        return min(left, key=added_s)

    def _as_states(self, chains: Sequence[Sequence[str]]) -> Iterator[State]:
        """As dealt; with the most room last, where the head must fit; and in teams."""
        by_room = [sorted(chain, key=self._room.__getitem__) for chain in chains]
        for team_size in (1, *self._team_sizes):
            if team_size <= max(map(len, chains)):
                yield tuple(self._in_teams(chain, team_size) for chain in chains)
                yield tuple(self._in_teams(chain, team_size) for chain in by_room)

    def _in_teams(self, chain: Sequence[str], size: int) -> Chain:
        firsts = range(0, len(chain), size)
        return tuple(self._options.team_order(chain[i : i + size]) for i in firsts)
