"""The `prefix` route: what a replica has cached, weighed against what it has to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shoal.cluster.dice import Dice
from shoal.cluster.loads import LeastFirst, Member
from shoal.cluster.prefix_map import PrefixMap


class Prefix:
    """The best of: tokens found in the cache, less `neighbour_tokens` for each unit of load above
    the least loaded replica.

    A match of less than `min_share` of the prompt does not count: what every prompt begins with
    must not draw all of them to one replica. Of many holders, `num_looked_at` are looked at.
    """

    def __init__(
        self,
        dice: Dice,
        *,
        block_size: int,
        neighbour_tokens: int,
        min_share: float = 0.3,
        num_looked_at: int = 4,
    ) -> None:
        self._dice = dice
        self._block_size = block_size
        self._neighbour_tokens = neighbour_tokens
        self._min_share = min_share
        self._num_looked_at = num_looked_at
        self._least = LeastFirst()
        self._map = PrefixMap()

    def add(self, member: Member) -> None:
        self._least.add(member)

    def remove(self, member: Member) -> None:
        self._least.remove(member)

    def started(self, member: Member, digests: list[bytes]) -> None:
        self._least.update(member)
        self._map.record(member, digests)

    def finished(self, member: Member) -> None:
        self._least.update(member)

    def forget(self, member: Member) -> None:
        self._map.forget(member)

    def pick(self, digests: list[bytes]) -> Member:
        idlest = self._least.first()
        best, best_score = idlest, self._map.num_matched(idlest, digests) * self._block_size
        shallowest = max(1, round(self._min_share * len(digests)))
        num_seen = 0
        for depth in range(self._map.num_known(digests), shallowest - 1, -1):
            matched_tokens = depth * self._block_size
            if matched_tokens <= best_score:
                break  # nor can any shorter match be better
            holders = self._map.holders(digests[depth - 1])
            if len(holders) == num_seen:
                continue  # the same ones as a block further on
            num_seen = len(holders)
            for member in self._some(holders):
                score = matched_tokens - self._neighbour_tokens * (member.load - idlest.load)
                if score > best_score and member.is_available:
                    best, best_score = member, score
        return best

    def _some(self, holders: Sequence[Member]) -> Iterator[Member]:
        number = len(holders)
        if number <= self._num_looked_at:
            yield from holders
            return
        start = self._dice.roll()
        for offset in range(self._num_looked_at):
            yield holders[(start + offset) % number]
