"""The router: whatever comes and goes, loads are conserved and each route keeps its promise."""

from __future__ import annotations

from collections import Counter
from itertools import count
from statistics import mean
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.cluster.loads import Member
from shoal.cluster.prefix_map import PrefixMap
from shoal.cluster.router import Router, Ticket
from shoal.config import Route
from shoal.schedule.prefix import HashChain

ROUTES: tuple[Route, ...] = get_args(Route)
BLOCK = 4
PROMPTS = st.lists(st.integers(0, 1), max_size=40)
seeds = st.integers(0, 2**64)


def make_router(route: Route, num_replicas: int, *, seed: int = 0, blocks: int = 64) -> Router:
    router = Router(route, seed=seed, block_size=BLOCK, neighbour_tokens=8)
    for number in range(num_replicas):
        router.join(f"r{number}", cache_blocks=blocks)
    return router


def start(router: Router, prompt: list[int] | None = None) -> Ticket:
    ticket = router.start([] if prompt is None else prompt)
    assert ticket is not None
    return ticket


def own_prompt(number: int, num_tokens: int = 8) -> list[int]:
    return [1000 + number] * num_tokens


class AnyInterleaving(RuleBasedStateMachine):
    """Replicas and requests come and go; a dictionary is what the router must agree with."""

    route: Route

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(self.route, seed=5, block_size=BLOCK, neighbour_tokens=8)
        self.available: dict[str, bool] = {}
        self.loads: dict[str, int] = {}
        self.open: list[tuple[Ticket, bool]] = []
        self.names = count()

    @rule(blocks=st.integers(0, 6), again=st.booleans())
    def join(self, blocks: int, again: bool) -> None:
        name = "again" if again and "again" not in self.loads else f"r{next(self.names)}"
        self.router.join(name, cache_blocks=blocks)
        self.available[name], self.loads[name] = True, 0

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.loads)))
        self.router.leave(name)
        del self.available[name], self.loads[name]
        self.open = [(ticket, here and ticket.replica != name) for ticket, here in self.open]

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), is_available=st.booleans())
    def mark(self, data: st.DataObject, is_available: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.loads)))
        self.router.set_available(name, is_available)
        self.available[name] = is_available

    @rule(prompt=PROMPTS, weight=st.integers(1, 3), data=st.data())
    def start(self, prompt: list[int], weight: int, data: st.DataObject) -> None:
        besides = data.draw(
            st.sets(st.sampled_from(sorted(self.loads))) if self.loads else st.just(set())
        )
        allowed = {name for name, here in self.available.items() if here} - besides
        ticket = self.router.start(prompt, weight=weight, besides=besides)
        if not allowed:
            assert ticket is None
            return
        assert ticket is not None
        assert ticket.replica in allowed
        least = min(self.loads[name] for name in allowed)
        if besides or self.route == "least-loaded":
            assert self.loads[ticket.replica] == least
        self.loads[ticket.replica] += weight
        self.open.append((ticket, True))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ticket, here = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.router.finish(ticket)
        if here:
            self.loads[ticket.replica] -= ticket.weight

    @invariant()
    def agrees(self) -> None:
        assert self.router.loads == self.loads
        assert self.router.available == [name for name, here in self.available.items() if here]


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_goes_to_the_unavailable_and_loads_are_conserved(route: Route) -> None:
    machine = type("Machine", (AnyInterleaving,), {"route": route})
    TestCase = machine.TestCase
    TestCase.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
    TestCase().runTest()


@given(
    route=st.sampled_from(ROUTES),
    seed=seeds,
    prompts=st.lists(PROMPTS, max_size=60),
    num_replicas=st.integers(1, 6),
)
@settings(max_examples=60)
def test_the_same_seed_and_calls_give_the_same_decisions(
    route: Route, seed: int, prompts: list[list[int]], num_replicas: int
) -> None:
    def run() -> list[str]:
        router = make_router(route, num_replicas, seed=seed)
        tickets = []
        for number, prompt in enumerate(prompts):
            tickets.append(start(router, prompt))
            if number % 3 == 2:
                router.finish(tickets[number - 2])
        return [ticket.replica for ticket in tickets]

    assert run() == run()


def test_other_seeds_give_other_decisions() -> None:
    def run(seed: int) -> list[str]:
        router = make_router("random", 8, seed=seed)
        return [start(router).replica for _ in range(20)]

    assert len({tuple(run(seed)) for seed in range(20)}) == 20


@given(changes=st.lists(st.sampled_from(["join", "leave", "request"]), max_size=200))
def test_round_robin_is_fair_to_within_one_among_those_that_stay(changes: list[str]) -> None:
    router = make_router("round-robin", 3)
    stayers = ("r0", "r1", "r2")
    guests: list[str] = []
    served: Counter[str] = Counter()
    for number, change in enumerate(changes):
        if change == "join":
            guests.append(f"guest{number}")
            router.join(guests[-1])
        elif change == "leave" and guests:
            router.leave(guests.pop(number % len(guests)))
        else:
            served[start(router).replica] += 1
        assert max(served[name] for name in stayers) - min(served[name] for name in stayers) <= 1


@given(seed=seeds)
@settings(max_examples=10)
def test_two_choices_pile_up_far_less_than_one(seed: int) -> None:
    """n balls into n bins: about ln n / ln ln n in the fullest for one choice, ln ln n for two."""

    def fullest(route: Route) -> int:
        router = make_router(route, 500, seed=seed)
        for _ in range(2000):
            router.start([])
        return max(router.loads.values())

    one, two = fullest("random"), fullest("two-choices")
    assert two <= 7 < 9 <= one
    assert fullest("least-loaded") == 4


@given(seed=seeds)
@settings(max_examples=10)
def test_random_is_uniform(seed: int) -> None:
    router = make_router("random", 10, seed=seed)
    served = Counter(start(router).replica for _ in range(5000))
    # Chi-squared with 9 degrees of freedom exceeds 45 once in a million.
    assert sum((served[f"r{i}"] - 500) ** 2 / 500 for i in range(10)) < 45


@given(
    route=st.sampled_from(ROUTES),
    seed=seeds,
    num_replicas=st.integers(1, 8),
    num_open=st.integers(0, 20),
)
@settings(max_examples=60)
def test_nobody_starves_under_uniform_load(
    route: Route, seed: int, num_replicas: int, num_open: int
) -> None:
    """Prompts of their own, as many open at a time as there may be: all replicas get some."""
    router = make_router(route, num_replicas, seed=seed)
    served: Counter[str] = Counter()
    tickets: list[Ticket] = []
    for number in range(60 * num_replicas):
        tickets.append(start(router, own_prompt(number)))
        served[tickets[-1].replica] += 1
        if len(tickets) > num_open:
            router.finish(tickets.pop(0))
    assert set(served) == set(router.loads)
    assert min(served.values()) >= mean(served.values()) / 4


# ---- prefix -------------------------------------------------------------------------------


@given(num_replicas=st.integers(2, 8), conversations=st.integers(1, 12), turns=st.integers(2, 6))
def test_conversations_stay_where_their_cache_is(
    num_replicas: int, conversations: int, turns: int
) -> None:
    router = make_router("prefix", num_replicas, blocks=10_000)
    home: dict[int, str] = {}
    for turn in range(1, turns + 1):
        for number in range(conversations):
            ticket = start(router, own_prompt(number, 12 * turn))
            assert home.setdefault(number, ticket.replica) == ticket.replica
            router.finish(ticket)


def test_a_long_match_outweighs_some_neighbours_but_not_any_number() -> None:
    router = make_router("prefix", 2)
    first = start(router, own_prompt(1, 40))
    # 40 tokens are worth five neighbours at 8 each, and the sixth is one too many.
    served = [start(router, own_prompt(1, 40)).replica for _ in range(5)]
    assert served.count(first.replica) == 4
    assert router.loads[first.replica] == 5


@given(num_hot=st.integers(1, 300))
@settings(max_examples=20)
def test_a_prefix_that_everyone_wants_spreads_as_far_as_the_load_asks(num_hot: int) -> None:
    router = make_router("prefix", 6)
    for _ in range(num_hot):
        start(router, own_prompt(1, 40))
    loads = router.loads.values()
    assert max(loads) - min(loads) <= 40 / 8


def test_a_short_common_beginning_attracts_nobody() -> None:
    router = make_router("prefix", 4)
    template = [7] * BLOCK
    served = Counter()
    for number in range(40):
        ticket = start(router, template + own_prompt(number, 16))
        served[ticket.replica] += 1
        router.finish(ticket)
    assert set(served.values()) == {10}


def test_when_the_best_holder_is_busy_a_part_of_the_prefix_is_taken_elsewhere() -> None:
    router = make_router("prefix", 3)
    best = start(router, own_prompt(1, 80)).replica
    part = router.start(own_prompt(1, 48), besides={best})
    assert part is not None
    idle = ({"r0", "r1", "r2"} - {best, part.replica}).pop()
    assert start(router, own_prompt(1, 88)).replica == best
    router.start([], weight=7, besides={part.replica, idle})
    assert router.loads == {best: 9, part.replica: 1, idle: 0}
    # 80 tokens less nine neighbours at 8, against 48 less one, against nothing.
    assert start(router, own_prompt(1, 88)).replica == part.replica


def test_an_unavailable_holder_is_passed_over_and_found_again() -> None:
    router = make_router("prefix", 2)
    prompt = own_prompt(1, 40)
    home = start(router, prompt)
    router.finish(home)
    router.set_available(home.replica, False)
    assert start(router, own_prompt(1, 36)).replica != home.replica
    router.set_available(home.replica, True)
    assert start(router, prompt).replica == home.replica


def test_who_leaves_and_returns_returns_with_an_empty_cache() -> None:
    router = make_router("prefix", 2)
    home = start(router, own_prompt(1, 40)).replica
    router.leave(home)
    router.join(home)
    others = {start(router, own_prompt(number)).replica for number in (2, 3)}
    assert home in others
    assert router.loads[home] == 1


@given(
    chains=st.lists(st.tuples(st.integers(0, 2), PROMPTS), max_size=80),
    capacity=st.integers(0, 8),
    leaver=st.integers(0, 2),
)
def test_the_map_is_bounded_and_holds_whole_prefixes_only(
    chains: list[tuple[int, list[int]]], capacity: int, leaver: int
) -> None:
    prefixes = PrefixMap()
    members = [Member(f"r{i}", turn=i, cache_blocks=capacity) for i in range(3)]
    all_digests = []
    for number, tokens in chains:
        chain = HashChain(BLOCK)
        chain.extend(tokens)
        prefixes.record(members[number], chain.digests)
        all_digests.append(chain.digests)
        kept = min(capacity, len(chain.digests))
        assert prefixes.num_matched(members[number], chain.digests) == kept
    for digests in all_digests:
        held_by_any = [bool(prefixes.holders(digest)) for digest in digests]
        assert held_by_any == sorted(held_by_any, reverse=True)
        assert prefixes.num_known(digests) == sum(held_by_any)
        for member in members:
            held = [member in prefixes.holders(digest) for digest in digests]
            assert held == sorted(held, reverse=True)
            assert prefixes.num_matched(member, digests) == sum(held)
    assert all(prefixes.num_held(member) <= capacity for member in members)
    for member in (members[leaver], *members):
        prefixes.forget(member)
    assert len(prefixes) == 0
