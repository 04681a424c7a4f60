"""The ways to pick a replica, one class per word of `config.Route`.

`random`, `round-robin`, `least-loaded`, `two-choices` (Mitzenmacher's power of two choices) and
`prefix`, which weighs what a replica has cached against what it has to do, as SGLang's, vLLM's and
Dynamo's routers do. A pick costs about the same for ten replicas and for a thousand.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from shoal.cluster.dice import Dice
from shoal.cluster.loads import LeastFirst, Member
from shoal.cluster.prefix_policy import Prefix
from shoal.config import Route


class Policy(Protocol):
    """Is told of every change, and picks one of the available members; there must be one."""

    def add(self, member: Member) -> None: ...

    def remove(self, member: Member) -> None: ...

    def pick(self, digests: list[bytes], /) -> Member: ...

    def started(self, member: Member, digests: list[bytes], /) -> None:
        """Load and turn have changed: a prompt with these blocks is computed there."""
        ...

    def finished(self, member: Member) -> None:
        """The load has changed."""
        ...

    def forget(self, member: Member) -> None:
        """It will not come back."""
        ...


class Indifferent:
    """What policies share that look neither at loads nor at prompts."""

    def started(self, member: Member, _: list[bytes]) -> None:
        pass

    def finished(self, member: Member) -> None:
        pass

    def forget(self, member: Member) -> None:
        pass


class Random(Indifferent):
    def __init__(self, dice: Dice) -> None:
        self._dice = dice
        self._members: list[Member] = []
        self._place: dict[Member, int] = {}

    def add(self, member: Member) -> None:
        self._place[member] = len(self._members)
        self._members.append(member)

    def remove(self, member: Member) -> None:
        """The last one takes its place."""
        place, last = self._place.pop(member), self._members.pop()
        if last is not member:
            self._members[place] = last
            self._place[last] = place

    def pick(self, _: list[bytes]) -> Member:
        return self._members[self._dice.roll() % len(self._members)]


class TwoChoices(Random):
    """The less loaded of two at random."""

    def pick(self, _: list[bytes]) -> Member:
        number = len(self._members)
        if number == 1:
            return self._members[0]
        bits = self._dice.roll()
        first = (bits >> 32) % number
        second = (first + 1 + (bits & 0xFFFFFFFF) % (number - 1)) % number
        one, other = self._members[first], self._members[second]
        return other if other.load < one.load else one


class RoundRobin(Indifferent):
    def __init__(self) -> None:
        self._rota: OrderedDict[Member, None] = OrderedDict()

    def add(self, member: Member) -> None:
        self._rota[member] = None

    def remove(self, member: Member) -> None:
        del self._rota[member]

    def pick(self, _: list[bytes]) -> Member:
        member = next(iter(self._rota))
        self._rota.move_to_end(member)
        return member


class LeastLoaded(Indifferent):
    def __init__(self) -> None:
        self._least = LeastFirst()

    def add(self, member: Member) -> None:
        self._least.add(member)

    def remove(self, member: Member) -> None:
        self._least.remove(member)

    def pick(self, _: list[bytes]) -> Member:
        return self._least.first()

    def started(self, member: Member, _: list[bytes]) -> None:
        self._least.update(member)

    def finished(self, member: Member) -> None:
        self._least.update(member)


def make_policy(route: Route, *, seed: int, block_size: int, neighbour_tokens: int) -> Policy:
    dice = Dice(seed)
    match route:
        case "random":
            return Random(dice)
        case "two-choices":
            return TwoChoices(dice)
        case "round-robin":
            return RoundRobin()
        case "least-loaded":
            return LeastLoaded()
        case "prefix":
            return Prefix(dice, block_size=block_size, neighbour_tokens=neighbour_tokens)
