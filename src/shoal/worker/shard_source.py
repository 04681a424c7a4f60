"""Where a worker gets a model's tensors from: files on its node, or the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shoal.parallel.channel import Channel
from shoal.parallel.partition import Shard
from shoal.weights.cache import Progress, cache_root
from shoal.weights.fetch_shard import fetch_shard, model_version
from shoal.weights.source import ModelFiles, resolve
from shoal.weights.stamp import stamp_of


class ShardSource:
    """`call_for_weights` opens a call of the head's service for them; `report` hears how far
    fetching has come. A `path` is that of a Load; "" stands for the head.
    """

    def __init__(
        self, call_for_weights: Callable[[], tuple[Channel, Channel]], report: Progress
    ) -> None:
        self._call_for_weights = call_for_weights
        self._report = report

    def version(self, path: str) -> str:
        """Another one if the model has changed. Raises SourceError, PeerLost."""
        if path:
            return stamp_of(resolve(path).path)
        with self._call() as (down, up):
            return model_version(down, up, self._report)

    def files(self, path: str, shard: Shard) -> ModelFiles:
        """With all that the shard reads. Raises SourceError, UnsupportedModel, PeerLost."""
        if path:
            return resolve(path)
        with self._call() as (down, up):
            return fetch_shard(down, up, shard, cache_root(), self._report)

    @contextmanager
    def _call(self) -> Iterator[tuple[Channel, Channel]]:
        down, up = self._call_for_weights()
        try:
            yield down, up
        finally:
            down.close()
            up.close()
