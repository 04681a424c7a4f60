"""Chooses who holds what, from what was measured and from what a model costs."""

from __future__ import annotations

from shoal.cluster.costs import ModelCost
from shoal.cluster.exact_search import MOST_CHAINS, ExactSearch, kinds_of, num_chains
from shoal.cluster.explain import does_not_fit, reasons_for, rejected_by
from shoal.cluster.goal import Goal
from shoal.cluster.hardware import Cluster
from shoal.cluster.local_search import LocalSearch
from shoal.cluster.options import CutChain, Option, Options, together
from shoal.cluster.placement import Placement, ReplicaPlacement, Seat
from shoal.cluster.prediction import predict
from shoal.cluster.proposal import Proposal, node_uses
from shoal.errors import PlacementError
from shoal.parallel.partition import Span, shards_of

# So many nodes may be of few kinds; beyond, nobody looks at every placement.
_MOST_NODES_COMPARED = 16


def propose(cluster: Cluster, cost: ModelCost, goal: Goal) -> Proposal:
    """The placement that serves the goal best, as far as was searched.

    Up to six nodes, and more if some are alike, every placement is looked at: all sets of
    nodes, orders of stages, tensor-parallel teams, cuts of the layers and sets of replicas, with
    one worker a node and slices in proportion to speed. Beyond, and for fewer streams than
    nodes, a good placement is searched for. Raises PlacementError, with the figures, when the
    nodes cannot hold the model or none is given.
    """
    if not cluster.nodes:
        raise PlacementError("the cluster has no nodes: profile at least one")
    options = Options(cluster, cost, goal)
    search = _search(cluster, options)
    found = search.best()
    if found is None:
        raise does_not_fit(options)
    best = _quickest_first(_refined(found, options), options)
    placement = as_placement(best, options)
    return Proposal(
        goal=goal,
        placement=placement,
        prediction=predict(placement, options.clockwork, num_streams=goal.num_streams),
        nodes=node_uses(placement, options.clockwork, goal.kv_tokens),
        reasons=tuple(reasons_for(best, options)),
        rejected=tuple(rejected_by(best, search, options)),
        is_optimal=isinstance(search, ExactSearch) and goal.num_streams >= len(cluster.nodes),
    )


def as_placement(option: Option, options: Options) -> Placement:
    replicas = tuple(_replica(place, cut, options) for place, cut in enumerate(option.replicas))
    return Placement(replicas=replicas)


def _search(cluster: Cluster, options: Options) -> ExactSearch | LocalSearch:
    if len(cluster.nodes) <= _MOST_NODES_COMPARED:
        kinds = kinds_of(cluster)
        if num_chains(kinds) <= MOST_CHAINS:
            return ExactSearch(options, kinds)
    return LocalSearch(options)


def _refined(found: Option, options: Options) -> Option:
    """Cuts equal in the objective may differ in the other thing."""
    if options.goal.objective == "balanced":
        return found
    return together(option for cut in found.replicas if (option := options.best(cut.chain)))


def _quickest_first(option: Option, options: Options) -> Option:
    order = options.names_by_speed
    replicas = sorted(
        option.replicas, key=lambda cut: min(order.index(n) for team in cut.chain for n in team)
    )
    return Option(option.one, option.many, tuple(replicas))


def _replica(number: int, cut: CutChain, options: Options) -> ReplicaPlacement:
    stages, start = [], 0
    for stage, (nodes, count) in enumerate(zip(cut.chain, cut.num_layers, strict=True)):
        shares = [options.speed(node) for node in nodes]
        shards = shards_of(options.cost.dims, Span(start, start + count), shares)
        start += count
        stages.append(
            tuple(
                Seat(worker=f"r{number}s{stage}t{shard.rank}", node=node, shard=shard)
                for node, shard in zip(nodes, shards, strict=True)
            )
        )
    return ReplicaPlacement(stages=tuple(stages))
