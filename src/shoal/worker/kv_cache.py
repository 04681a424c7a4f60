"""The paged KV cache of one shard: room for blocks of tokens, for each of its layers."""

from __future__ import annotations

import psutil
import torch

from shoal.compute import native
from shoal.compute.kv_types import head_bytes, held_width, narrow
from shoal.compute.native_layer import NativeStep
from shoal.compute.zeroed_memory import take, zeroed
from shoal.errors import OutOfMemory
from shoal.models.config import DecoderConfig
from shoal.parallel.partition import Shard
from shoal.worker.batch import Batch
from shoal.worker.cache_memory import CacheMemory
from shoal.worker.node_memory import usable_memory_bytes

# The default takes this share of the memory that is free, and no more than the cap: enough for
# tens of thousands of tokens of a small model, and touched in full at the start.
_FREE_SHARE = 0.4
_DEFAULT_CAP_BYTES = 2 * 2**30


class KVCache:
    """keys and values: one tensor [num_slots, G, W] per layer of the shard, see `kv_types`.

    Memory is taken as slots are first written, or all of it by `take_memory`. OutOfMemory.
    """

    def __init__(
        self,
        config: DecoderConfig,
        shard: Shard,
        *,
        num_slots: int,
        dtype: torch.dtype,
        memory: CacheMemory | None = None,
    ) -> None:
        """In `memory`, which has the size that `slot_bytes` says, or else in its own."""
        self.first_layer = shard.layers.start
        self.num_slots = num_slots
        self.dtype = dtype
        self.memory = memory
        shape = (num_slots, len(shard.slice.kv_heads), held_width(dtype, config.head_dim))
        tensors = [
            zeroed(shape, dtype) if memory is None else memory.tensor(shape, dtype, index=index)
            for index in range(2 * len(shard.layers))
        ]
        self.keys, self.values = tensors[::2], tensors[1::2]
        self._native = (
            list(map(native.cache_of, self.keys, self.values))
            if all(map(native.can_hold, self.keys))
            else None
        )

    def native_step(self, batch: Batch) -> NativeStep | None:
        """For kernels that do half a layer at once; None if they do not know such caches."""
        if self._native is None:
            return None
        return NativeStep(self._native, self.first_layer, batch.native_places())

    def take_memory(self) -> None:
        """At the start: so that a lack of it shows there and use stays flat. Raises OutOfMemory.

        Takes about a second for a GiB; the cache may be used meanwhile.
        """
        for tensor in (*self.keys, *self.values):
            take(tensor)

    def write(
        self, layer: int, slots_T: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a step's keys and values; returns the layer's cache (keys, values)."""
        keys, values = self.keys[layer - self.first_layer], self.values[layer - self.first_layer]
        if native.can_store(k_TGD, keys):
            native.store(keys, values, k_TGD, v_TGD, slots_T)
            return keys, values
        keys.index_copy_(0, slots_T, narrow(k_TGD, self.dtype))
        values.index_copy_(0, slots_T, narrow(v_TGD, self.dtype))
        return keys, values


def slot_bytes(config: DecoderConfig, shard: Shard, dtype: torch.dtype) -> int:
    """Bytes that one token takes in this shard's cache."""
    num_heads = 2 * len(shard.layers) * len(shard.slice.kv_heads)
    return num_heads * head_bytes(dtype, config.head_dim)


def num_blocks_for(
    config: DecoderConfig,
    shard: Shard,
    dtype: torch.dtype,
    *,
    block_size: int,
    kv_memory_bytes: int | None,
    memory_share: float = 1.0,
    wanted: int | None = None,
) -> int:
    """How many blocks the given memory holds, or a share of what is free now.

    `memory_share` is this worker's part of either, when several share a machine. `wanted` is how
    many the others of the replica have: it is kept if memory allows, whatever was given; if not,
    the worker's part of all that can be used holds fewer. Raises OutOfMemory when that is not even
    one block.
    """
    block_bytes = block_size * slot_bytes(config, shard, dtype)
    if wanted is not None:
        return _as_wanted(wanted, block_bytes, memory_share)
    available = psutil.virtual_memory().available
    budget = kv_memory_bytes or min(int(available * _FREE_SHARE), _DEFAULT_CAP_BYTES)
    budget = int(budget * memory_share)
    if budget > available:
        raise OutOfMemory(
            f"the KV cache was to have {budget / 2**20:,.0f} MiB but only "
            f"{available / 2**20:,.0f} MiB are free; lower --kv-memory"
        )
    if budget < block_bytes:
        raise OutOfMemory(
            f"{budget:,} bytes of KV cache hold no block of {block_size} tokens, which takes "
            f"{block_bytes:,} bytes; raise --kv-memory"
        )
    return budget // block_bytes


def _as_wanted(wanted: int, block_bytes: int, memory_share: float) -> int:
    usable = usable_memory_bytes()
    if wanted * block_bytes <= usable:
        return wanted
    held = int(usable * memory_share) // block_bytes
    if held == 0:
        raise OutOfMemory(
            f"no block of KV cache, which takes {block_bytes:,} bytes, fits this worker's part "
            f"({memory_share:.0%}) of the {usable / 2**20:,.0f} MiB that can be used; free memory "
            "on this machine"
        )
    return min(held, wanted)
