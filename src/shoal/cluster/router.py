"""Which replica serves a request: events in, decisions out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from shoal.cluster.loads import Member
from shoal.cluster.policies import make_policy
from shoal.config import Route
from shoal.schedule.prefix import HashChain

MAX_CACHE_BLOCKS = 2**14
"""The most blocks of one replica's cache that a router remembers: a few megabytes."""

NEIGHBOUR_TOKENS = 64
"""Cached tokens that are worth one more neighbour in the batch; bench/results has the sweep."""


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """A request's place at a replica, from `start` to `finish`."""

    member: Member
    weight: int

    @property
    def replica(self) -> str:
        return self.member.name


class Router:
    """Replicas join and leave; requests start and finish, once each.

    An unavailable replica (draining, or thought sick) keeps what it has open and gets nothing new.
    `block_size` is that of the replicas' KV caches. Decisions depend on the seed and the calls
    made, and on nothing else.
    """

    def __init__(
        self,
        route: Route,
        *,
        seed: int = 0,
        block_size: int = 16,
        neighbour_tokens: int = NEIGHBOUR_TOKENS,
    ) -> None:
        self._policy = make_policy(
            route, seed=seed, block_size=block_size, neighbour_tokens=neighbour_tokens
        )
        self._block_size = block_size
        self._looks_at_prompts = route == "prefix"
        self._members: dict[str, Member] = {}
        self._num_available = 0
        self._num_turns = 0

    def join(self, replica: str, *, cache_blocks: int = MAX_CACHE_BLOCKS) -> None:
        """A replica with an empty cache of that many blocks. Its name must be new."""
        assert replica not in self._members, f"{replica} has joined already"
        capacity = min(cache_blocks, MAX_CACHE_BLOCKS)
        member = Member(replica, turn=self._next_turn(), cache_blocks=capacity)
        self._members[replica] = member
        self._num_available += 1
        self._policy.add(member)

    def leave(self, replica: str) -> None:
        """What it has open may still finish, and then changes nothing."""
        self.set_available(replica, False)
        self._policy.forget(self._members.pop(replica))

    def set_available(self, replica: str, is_available: bool) -> None:
        member = self._members[replica]
        if member.is_available is is_available:
            return
        member.is_available = is_available
        self._num_available += 1 if is_available else -1
        (self._policy.add if is_available else self._policy.remove)(member)

    def start(
        self, prompt_tokens: list[int], *, weight: int = 1, besides: Collection[str] = ()
    ) -> Ticket | None:
        """Choose a replica and count `weight` more as open there; None if none is available.

        `besides` names replicas that have refused the request. With it, the least loaded of the
        others is chosen, whatever the route: it has most room.
        """
        digests = self._digests(prompt_tokens)
        member = self._least_loaded(besides) if besides else self._pick(digests)
        return None if member is None else self._started(member, digests, weight)

    def start_among(
        self, replicas: Collection[str], prompt_tokens: list[int], *, weight: int = 1
    ) -> Ticket:
        """At the least loaded of these, available or not; there must be one."""
        members = [self._members[name] for name in replicas]
        member = min(members, key=lambda member: (member.load, member.turn))
        return self._started(member, self._digests(prompt_tokens), weight)

    def finish(self, ticket: Ticket) -> None:
        """The request has ended, in whatever way, or was refused."""
        ticket.member.load -= ticket.weight
        assert ticket.member.load >= 0, f"{ticket.replica} finished more than it had started"
        self._policy.finished(ticket.member)

    @property
    def loads(self) -> dict[str, int]:
        """What is open at each replica, available or not."""
        return {name: member.load for name, member in self._members.items()}

    @property
    def available(self) -> list[str]:
        return [name for name, member in self._members.items() if member.is_available]

    def _started(self, member: Member, digests: list[bytes], weight: int) -> Ticket:
        member.load += weight
        member.turn = self._next_turn()
        self._policy.started(member, digests)
        return Ticket(member, weight)

    def _pick(self, digests: list[bytes]) -> Member | None:
        return self._policy.pick(digests) if self._num_available else None

    def _least_loaded(self, besides: Collection[str]) -> Member | None:
        others = (m for m in self._members.values() if m.is_available and m.name not in besides)
        return min(others, key=lambda member: (member.load, member.turn), default=None)

    def _digests(self, prompt_tokens: list[int]) -> list[bytes]:
        if not self._looks_at_prompts:
            return []
        chain = HashChain(self._block_size)
        chain.extend(prompt_tokens)
        return chain.digests

    def _next_turn(self) -> int:
        self._num_turns += 1
        return self._num_turns
