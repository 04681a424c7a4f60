"""A worker's seat: its shard's weights, and what is rebuilt around them for each epoch."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from shoal.compute.kernels import choose_kv_dtype
from shoal.compute.kv_types import name_of
from shoal.compute.threads import leave_cores_to_layers
from shoal.parallel.control import Form, Formed, Load, Loaded
from shoal.parallel.endpoint import Security
from shoal.worker.cache_memory import CacheMemory
from shoal.worker.kv_cache import KVCache, num_blocks_for, slot_bytes
from shoal.worker.neighbours import Neighbours
from shoal.worker.peers import Peers
from shoal.worker.shard_weights import ShardWeights
from shoal.worker.stage import Stage
from shoal.worker.worker import describe, max_context_of


class ShardHolder:
    """`cache` is one that the worker has for this seat already."""

    def __init__(
        self,
        load: Load,
        weights: ShardWeights,
        cache: KVCache | None,
        *,
        num_read_bytes: int,
        load_s: float,
    ) -> None:
        self.weights = weights
        self._load = load
        self._kept = load.cache
        self._cache = cache
        self._kv_dtype = _kv_dtype_of(load, weights)
        self._num_read_bytes = num_read_bytes
        self._load_s = load_s

    def loaded(self) -> Loaded:
        """Raises OutOfMemory when no cache can be had, ConfigError."""
        config, model, scheme = self._load.config, self.weights.model, self.weights.scheme
        return Loaded(
            num_blocks=self._num_blocks(),
            max_context=max_context_of(config, model.max_context),
            vocab_size=model.vocab_size,
            num_read_bytes=self._num_read_bytes,
            load_s=self._load_s,
            description=f"{model.family}, {describe(scheme)}, {name_of(self._kv_dtype)} KV cache",
        )

    def form(self, form: Form, peers: Peers, security: Security) -> Stage:
        """Raises PeerLost when a neighbour does not come."""
        config, weights = self._load.config, self.weights
        patience_s = config.stall_s
        neighbours = Neighbours(form, weights.shard, peers, security, patience_s=patience_s)
        cache = self._open_cache(form.num_blocks)
        with ExitStack() as opened:
            outlet = neighbours.outlet()
            if outlet is not None:
                opened.callback(outlet.close)
            communicator = neighbours.communicator(own_cores=self._load.own_cores)
            opened.callback(communicator.close)
            inlet = neighbours.inlet(width=weights.model.hidden_size)
            opened.pop_all()
        weights.communicator.current = communicator
        leave_cores_to_layers(weights.scheme)
        return Stage(
            weights.decoder,
            cache,
            communicator=communicator,
            block_size=config.block_size,
            inlet=inlet,
            outlet=outlet,
            timeout_s=patience_s,
        )

    def take_cache_memory(self, num_blocks: int) -> None:
        """For a start. When a worker is replaced streams do not wait for that: whether there is
        room was checked when it loaded."""
        if not self._has_cache(num_blocks):
            self._open_cache(num_blocks).take_memory()

    def _has_cache(self, num_blocks: int) -> bool:
        num_slots = num_blocks * self._load.config.block_size
        return self._cache is not None and self._cache.num_slots == num_slots

    def _open_cache(self, num_blocks: int) -> KVCache:
        """The old one if it has the size: what it holds is written before it is read."""
        cache = self._cache if self._has_cache(num_blocks) else None
        if cache is None:
            self._cache = None  # given back before the new one is taken
            weights = self.weights
            num_slots = num_blocks * self._load.config.block_size
            cache = KVCache(
                weights.model,
                weights.shard,
                num_slots=num_slots,
                dtype=self._kv_dtype,
                memory=self._memory(num_slots),
            )
            self._cache = cache
        return cache

    def _memory(self, num_slots: int) -> CacheMemory:
        """What the last worker of this seat has left, if that can be had."""
        # Once: later the path may lead to another file.
        weights, kept, self._kept = self.weights, self._kept, None
        num_bytes = num_slots * slot_bytes(weights.model, weights.shard, self._kv_dtype)
        memory = CacheMemory.of(kept, num_bytes, self._kv_dtype) if kept is not None else None
        return memory or CacheMemory(num_bytes)

    def formed(self, epoch: int) -> Formed:
        cache = self._cache
        assert cache is not None and cache.memory is not None, "a stage forms with its cache"
        return Formed(
            epoch=epoch,
            cache=cache.memory.identity,
            cache_dtype=name_of(cache.dtype),
            cache_descriptor=cache.memory.descriptor,
        )

    def cache_for(self, load: Load) -> KVCache | None:
        """The one that is open, if it has the type that another order for this shard wants, and as
        many blocks."""
        if self._cache is None or load.num_blocks is None:
            return None
        num_slots = load.num_blocks * load.config.block_size
        dtype = _kv_dtype_of(load, self.weights)
        is_fitting = (self._cache.num_slots, self._cache.dtype) == (num_slots, dtype)
        return self._cache if is_fitting else None

    def _num_blocks(self) -> int:
        has_cache = self._cache is not None or self._load.cache is not None
        if has_cache and self._load.num_blocks is not None:
            return self._load.num_blocks
        config = self._load.config
        return num_blocks_for(
            self.weights.model,
            self.weights.shard,
            self._kv_dtype,
            block_size=config.block_size,
            kv_memory_bytes=config.kv_memory_bytes,
            memory_share=self._load.memory_share,
            wanted=self._load.num_blocks,
        )


def _kv_dtype_of(load: Load, weights: ShardWeights) -> torch.dtype:
    return choose_kv_dtype(load.config.kv_dtype, load.config.dtype, weights.scheme)
