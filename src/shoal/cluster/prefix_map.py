"""Which replicas have computed which prefixes: what the router believes of their caches."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Container, Sequence

from shoal.cluster.loads import Member


class PrefixMap:
    """Block digests (`HashChain`) → the replicas that hold them.

    A replica holds its `cache_blocks` most recent digests, as its own cache would; that bounds the
    memory. A prefix is always more recent than what continues it, so that whoever holds a digest
    holds the whole chain before it.
    """

    def __init__(self) -> None:
        self._holders: dict[bytes, list[Member]] = {}
        self._held: dict[Member, OrderedDict[bytes, None]] = {}

    def __len__(self) -> int:
        """How many digests are known of at least one replica."""
        return len(self._holders)

    def num_held(self, member: Member) -> int:
        return len(self._held.get(member, ()))

    def holders(self, digest: bytes) -> Sequence[Member]:
        return self._holders.get(digest, ())

    def num_known(self, digests: list[bytes]) -> int:
        """The length in blocks of the longest prefix that any replica holds."""
        return bisect_left(digests, True, key=lambda digest: digest not in self._holders)

    def num_matched(self, member: Member, digests: list[bytes]) -> int:
        """The length in blocks of the longest prefix that this replica holds."""
        held: Container[bytes] = self._held.get(member, ())
        return bisect_left(digests, True, key=lambda digest: digest not in held)

    def record(self, member: Member, digests: list[bytes]) -> None:
        """The replica computes this chain now; as much of its start as fits is remembered."""
        held = self._held.setdefault(member, OrderedDict())
        for digest in reversed(digests[: member.cache_blocks]):
            if digest in held:
                held.move_to_end(digest)
            else:
                held[digest] = None
                self._holders.setdefault(digest, []).append(member)
        while len(held) > member.cache_blocks:
            self._drop(member, held.popitem(last=False)[0])

    def forget(self, member: Member) -> None:
        """The replica has gone, and its cache with it."""
        for digest in self._held.pop(member, {}):
            self._drop(member, digest)

    def _drop(self, member: Member, digest: bytes) -> None:
        holders = self._holders[digest]
        holders.remove(member)
        if not holders:
            del self._holders[digest]
