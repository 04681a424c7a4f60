"""What a worker holds of a model. It outlives epochs, and heads."""

from __future__ import annotations

import time

from shoal.parallel.communicator import CurrentCommunicator
from shoal.parallel.control import Load, Prepare, Prepared
from shoal.parallel.partition import Shard
from shoal.worker.shard_holder import ShardHolder
from shoal.worker.shard_source import ShardSource
from shoal.worker.shard_weights import Origin, ShardWeights, lack_of_memory, read_weights


class Holdings:
    """`hold_s` is how long to keep it all without a head, as the last order said."""

    def __init__(self) -> None:
        self.hold_s = 0.0
        self._weights: list[ShardWeights] = []
        self._seat: ShardHolder | None = None
        # One for each, since layers are shared between shards.
        self._communicators: dict[tuple[int, int], CurrentCommunicator] = {}

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(weights.shard for weights in self._weights)

    def prepare(self, order: Prepare, source: ShardSource) -> Prepared:
        """Read a shard beside what is held. Raises SourceError, UnsupportedModel, PeerLost."""
        self.hold_s = order.config.hold_s
        origin = _origin(order, source)
        # What was read of files that have changed since is of no use to anybody.
        self._weights = [each for each in self._weights if each.origin == origin]
        if self._find(origin, order.shard) is None:
            files = source.files(order.path, order.shard)
            reason = lack_of_memory(files, order.shard, order.config)
            if reason:
                return Prepared(shard=order.shard, held=False, reason=reason)
            communicator = self._communicator(order.shard)
            weights = read_weights(
                files, origin, order.shard, order.config, communicator, self._weights
            )
            self._weights.append(weights)
        return Prepared(shard=order.shard, held=True)

    def take_seat(self, order: Load, source: ShardSource) -> ShardHolder:
        """Hold this shard and no other; only what is missing of it is read.

        Raises SourceError, UnsupportedModel, ConfigError, PeerLost. What was held stays then.
        """
        start_s = time.perf_counter()
        self.hold_s = order.config.hold_s
        origin = _origin(order, source)
        before, self._seat = self._seat, None
        weights = self._find(origin, order.shard)
        num_read_bytes, cache = 0, None
        if weights is None:
            del before  # its cache's memory may be needed for the weights
            weights = read_weights(
                source.files(order.path, order.shard),
                origin,
                order.shard,
                order.config,
                self._communicator(order.shard),
                self._weights,
            )
            num_read_bytes = weights.num_read_bytes
        elif before is not None and before.weights is weights:
            cache = before.cache_for(order)
        self._weights = [weights]
        self._seat = ShardHolder(
            order,
            weights,
            cache,
            num_read_bytes=num_read_bytes,
            load_s=time.perf_counter() - start_s,
        )
        return self._seat

    def _find(self, origin: Origin, shard: Shard) -> ShardWeights | None:
        alike = (each for each in self._weights if (each.origin, each.shard) == (origin, shard))
        return next(alike, None)

    def _communicator(self, shard: Shard) -> CurrentCommunicator:
        ranks = (shard.rank, shard.num_ranks)
        return self._communicators.setdefault(ranks, CurrentCommunicator(*ranks))


def _origin(order: Load | Prepare, source: ShardSource) -> Origin:
    config = order.config
    return Origin(
        model=config.model,
        dtype=config.dtype,
        quantize=config.quantize,
        path=order.path,
        version=source.version(order.path),
    )
