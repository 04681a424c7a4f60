"""A shard's weights, which outlive epochs, and what is rebuilt around them for each."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from shoal.compute.kernels import choose_scheme
from shoal.models.config import decoder_config
from shoal.parallel.channel import Channel
from shoal.parallel.communicator import CurrentCommunicator
from shoal.parallel.control import Form, Load, Loaded
from shoal.parallel.endpoint import Security
from shoal.parallel.partition import Shard
from shoal.weights.cache import Progress, cache_root
from shoal.weights.fetch_shard import fetch_shard
from shoal.weights.loader import load_decoder
from shoal.weights.source import ModelFiles, open_source, resolve
from shoal.worker.kv_cache import KVCache, num_blocks_for
from shoal.worker.neighbours import Neighbours
from shoal.worker.peers import Peers
from shoal.worker.stage import Stage
from shoal.worker.worker import describe, max_context_of


class ShardHolder:
    """Loads on creation. `call_for_weights` opens a call of the head's service for them, and
    `report` hears how far that has come.

    Raises SourceError, UnsupportedModel, ConfigError, OutOfMemory, PeerLost.
    """

    def __init__(
        self,
        load: Load,
        call_for_weights: Callable[[], tuple[Channel, Channel]],
        report: Progress,
    ) -> None:
        start_s = time.perf_counter()
        self._load = load
        self._scheme = choose_scheme(load.config.dtype, load.config.quantize)
        self._communicator = CurrentCommunicator(load.shard.rank, load.shard.num_ranks)
        self._cache: KVCache | None = None
        source = open_source(
            resolve(load.path) if load.path else _fetch(load.shard, call_for_weights, report)
        )
        try:
            self._model = decoder_config(source.config)
            self._decoder = load_decoder(
                source, load.shard, scheme=self._scheme, communicator=self._communicator
            )
            self._num_read_bytes = source.bytes_read
        finally:
            source.close()
        self._load_s = time.perf_counter() - start_s

    @property
    def shard(self) -> Shard:
        return self._load.shard

    def loaded(self) -> Loaded:
        config = self._load.config
        num_blocks = num_blocks_for(
            self._model,
            self.shard,
            self._scheme.dtype,
            block_size=config.block_size,
            kv_memory_bytes=config.kv_memory_bytes,
            memory_share=self._load.memory_share,
        )
        return Loaded(
            num_blocks=num_blocks,
            max_context=max_context_of(config, self._model.max_context),
            vocab_size=self._model.vocab_size,
            num_read_bytes=self._num_read_bytes,
            load_s=self._load_s,
            description=f"{self._model.family}, {describe(self._scheme)}",
        )

    def form(self, form: Form, peers: Peers, security: Security) -> Stage:
        """Raises PeerLost when a neighbour does not come."""
        config = self._load.config
        patience_s = config.stall_s
        neighbours = Neighbours(form, self.shard, peers, security, patience_s=patience_s)
        cache = self.open_cache(form.num_blocks)
        with ExitStack() as opened:
            outlet = neighbours.outlet()
            if outlet is not None:
                opened.callback(outlet.close)
            communicator = neighbours.communicator(own_cores=self._load.own_cores)
            opened.callback(communicator.close)
            inlet = neighbours.inlet(width=self._model.hidden_size)
            opened.pop_all()
        self._communicator.current = communicator
        return Stage(
            self._decoder,
            cache,
            communicator=communicator,
            block_size=config.block_size,
            inlet=inlet,
            outlet=outlet,
            timeout_s=patience_s,
        )

    def open_cache(self, num_blocks: int) -> KVCache:
        """The old one if it has the size: what it holds is written before it is read."""
        num_slots = num_blocks * self._load.config.block_size
        cache = self._cache
        if cache is None or cache.num_slots != num_slots:
            self._cache = None  # given back before the new one is taken
            cache = KVCache(self._model, self.shard, num_slots=num_slots, dtype=self._scheme.dtype)
            self._cache = cache
        return cache


def _fetch(
    shard: Shard, call_for_weights: Callable[[], tuple[Channel, Channel]], report: Progress
) -> ModelFiles:
    down, up = call_for_weights()
    try:
        return fetch_shard(down, up, shard, cache_root(), report)
    finally:
        down.close()
        up.close()
