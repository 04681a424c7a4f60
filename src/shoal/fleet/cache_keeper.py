"""Keeps the KV caches of workers on the head's own machine, so that a killed one's is not lost."""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import psutil

from shoal.parallel.control import Formed, KeptCache
from shoal.parallel.partition import Shard

log = logging.getLogger(__name__)

# A process that was killed takes a moment to be gone.
_END_S = 0.1
_POLL_S = 0.001


class FormedCache(msgspec.Struct, frozen=True):
    """What a worker has formed with; `pid` is None where its memory is another machine's."""

    shard: Shard
    identity: str
    dtype: str
    descriptor: int
    pid: int | None

    @classmethod
    def of(cls, shard: Shard, formed: Formed, pid: int | None) -> FormedCache:
        return cls(shard, formed.cache, formed.cache_dtype, formed.cache_descriptor, pid)


class CacheKeeper:
    """Of one crew, whose seats are numbered. Close it."""

    def __init__(self) -> None:
        self._formed: list[FormedCache] = []
        self._num_blocks = 0
        self._descriptors: dict[int, int] = {}
        self._writers: defaultdict[int, list[int]] = defaultdict(list)
        """The processes that may have mapped a seat's cache."""

    def offer(
        self, seat: int, shard: Shard, num_blocks: int | None, *, pid: int
    ) -> KeptCache | None:
        """For a worker that is about to take this seat; None if it begins with an empty one.

        Nobody else may write to it any more: its former workers must have ended.
        """
        descriptor = self._descriptors.get(seat)
        if descriptor is None or num_blocks != self._num_blocks:
            return None
        before = self._formed[seat]
        others = [writer for writer in self._writers[seat] if writer != pid]
        if before.shard != shard or not all(map(_has_ended, others)):
            return None
        self._writers[seat].append(pid)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        return KeptCache(path=path, identity=before.identity, dtype=before.dtype)

    def note(self, formed: Sequence[FormedCache], num_blocks: int) -> bool:
        """All have formed: whether each cache holds what it held at the last formation."""
        before = self._formed
        if num_blocks == self._num_blocks and _identities(formed) == _identities(before):
            return True
        self.close()
        self._formed, self._num_blocks = list(formed), num_blocks
        for seat, cache in enumerate(formed):
            self._hold(seat, cache)
        return False

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._writers.clear()

    def _hold(self, seat: int, cache: FormedCache) -> None:
        if cache.pid is None or cache.descriptor < 0:
            return
        try:
            path = f"/proc/{cache.pid}/fd/{cache.descriptor}"
            self._descriptors[seat] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            log.info("the cache of seat %d would be lost with its worker: %s", seat, error)
            return
        self._writers[seat].append(cache.pid)


def _identities(formed: Sequence[FormedCache]) -> list[tuple[Shard, str]]:
    return [(cache.shard, cache.identity) for cache in formed]


def _has_ended(pid: int) -> bool:
    deadline_s = time.monotonic() + _END_S
    while True:
        try:
            if psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return True
        except psutil.NoSuchProcess:
            return True
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(_POLL_S)
