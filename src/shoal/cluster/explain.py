"""Why a placement is as it is, in sentences for whoever runs the cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from shoal.cluster.options import CutChain, Names, Option, Options
from shoal.cluster.prediction import Objective
from shoal.cluster.proposal import Rejected
from shoal.errors import PlacementError

_MOST_EXPLAINED = 8


class Search(Protocol):
    """What a search knows besides its best option."""

    def best_with(self, node: str) -> Option | None:
        """The best that uses everything the best one does, and `node`."""
        ...

    def best_split(self) -> Option | None:
        """The best single replica of several nodes."""
        ...


def reasons_for(best: Option, options: Options) -> Iterator[str]:
    yield _whether_to_split(best, options)
    for cut in best.replicas:
        yield from _about_memory(cut, options)
        if len(cut.chain) > 1:
            yield _slowest_stage(cut, options)
        yield from (_about_team(team, options) for team in cut.chain if len(team) > 1)


def rejected_by(best: Option, search: Search, options: Options) -> Iterator[Rejected]:
    alone = best_alone(options)
    if alone and len(best.nodes) > 1:
        yield Rejected(what=f"{alone.nodes[0]} alone", why=_instead(alone, best, options))
    split = search.best_split()
    if split and len(best.nodes) == 1:
        what = " → ".join(" + ".join(team) for team in split.replicas[0].chain)
        yield Rejected(what=f"split as {what}", why=_instead(split, best, options))
    used = set(best.nodes)
    left_out = [name for name in options.names_by_speed if name not in used]
    for name in left_out[:_MOST_EXPLAINED]:
        yield Rejected(what=f"node {name}", why=_left_out(name, best, search, options))
    if len(left_out) > _MOST_EXPLAINED:
        rest = left_out[_MOST_EXPLAINED:]
        yield Rejected(what=f"{len(rest)} slower nodes", why=f"left out: {_listed(rest)}")


def best_alone(options: Options) -> Option | None:
    """The best node that holds the whole model."""
    found = [option for name in options.names_by_speed if (option := options.best(((name,),)))]
    objective = options.goal.objective
    return max(found, key=lambda option: option.worth(objective), default=None)


def does_not_fit(options: Options) -> PlacementError:
    cost, goal = options.cost, options.goal
    whole = options.team(options.names_by_speed[:1]).slices[0]
    layers = cost.dims.num_layers
    weights = layers * cost.layer_weights(whole) * cost.weight_bytes
    tables = cost.table_bytes(whole, is_first=True, is_last=True)
    cache = layers * goal.kv_tokens * cost.kv_bytes(whole)
    nodes = options.clockwork.nodes.values()
    offered = sum(node.memory_bytes for node in nodes)
    needed = weights + tables + cache
    largest = max(nodes, key=lambda node: node.memory_bytes)
    layer = cost.layer_bytes(whole, goal.kv_tokens)
    if needed > offered:
        why = f"that is {_amount(needed - offered)} too little"
    else:
        why = (
            f"one layer with its cache takes {_amount(layer)}, embedding and head "
            f"{_amount(tables)}, and no division of them was found; the largest node, "
            f"{largest.name}, has {_amount(largest.memory_bytes)}"
        )
    return PlacementError(
        f"{cost.name} needs {_amount(needed)}: {_amount(weights + tables)} of weights with "
        f"precision '{cost.precision}' and {_amount(cache)} of cache for {goal.kv_tokens:,} "
        f"tokens. The {len(nodes)} nodes offer {_amount(offered)}: {why}. Add a node or memory, "
        f"take fewer bits with --quantize, or, for 'shoal plan', lower --context"
    )


def _whether_to_split(best: Option, options: Options) -> str:
    alone = best_alone(options)
    num_nodes = len(best.nodes)
    if num_nodes == 1:
        return f"the model fits node {best.nodes[0]} alone: not split"
    if len(best.replicas) > 1:
        what = f"{len(best.replicas)} replicas on {num_nodes} nodes: many streams add up"
    else:
        what = f"split over {num_nodes} nodes"
    if alone is None:
        return f"{what}; no node alone has room for the model and its cache"
    gain = _worth(best, options) / _worth(alone, options)
    return f"{what}; {gain:.2f} times what {alone.nodes[0]} alone gives ({_figures(alone)})"


def _about_memory(cut: CutChain, options: Options) -> Iterator[str]:
    last = len(cut.chain) - 1
    for place, (team, count) in enumerate(zip(cut.chain, cut.num_layers, strict=True)):
        most = options.most_layers(team, is_first=place == 0, is_last=place == last)
        if last and count == most:
            yield f"{' + '.join(team)} holds {count} layers because its memory has no room for more"


def _slowest_stage(cut: CutChain, options: Options) -> str:
    seconds = options.stations(cut)
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    idle = 1 - sum(seconds) / (len(seconds) * seconds[slowest])
    return (
        f"stage {slowest + 1} ({' + '.join(cut.chain[slowest])}) sets the pace for many streams: "
        f"{1000 * seconds[slowest]:.1f} ms a step; stages are idle {idle:.0%} of the time"
    )


def _about_team(team: Names, options: Options) -> str:
    shares = [
        f"{node} {len(part.mlp_columns) / options.cost.dims.num_mlp_columns:.0%}"
        for node, part in zip(*options.team(team), strict=True)
    ]
    return f"each layer is shared in proportion to speed: {', '.join(shares)}"


def _left_out(name: str, best: Option, search: Search, options: Options) -> str:
    if not options.most_layers((name,), is_first=False, is_last=False):
        return "left out: its memory holds not one layer with its cache"
    option = search.best_with(name)
    if option is None:
        return "left out: its memory fits no use that was found"
    loss = 1 - _worth(option, options) / _worth(best, options)
    if loss < 0.005:
        return "left out: it would add nothing"
    return f"left out: it would slow the rest by {loss:.0%}"


def _instead(other: Option, best: Option, options: Options) -> str:
    loss = 1 - _worth(other, options) / _worth(best, options)
    return f"would give {_figures(other)}: {loss:.0%} less {_measure(options.goal.objective)}"


def _figures(option: Option) -> str:
    return f"{option.one:,.1f} tokens/s for one stream, {option.many:,.0f} for many"


def _measure(objective: Objective) -> str:
    words = {"latency": "for one stream", "throughput": "for many"}
    return words.get(objective, "for both together")


def _worth(option: Option, options: Options) -> float:
    return option.worth(options.goal.objective)[0]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"


def _amount(num_bytes: float) -> str:
    mib = num_bytes / 2**20
    return f"{mib:,.1f} MiB" if mib < 1024 else f"{mib / 1024:,.2f} GiB"
