"""Caches that outlive their worker: who may go on with one, and when its content counts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
import torch

from shoal.fleet.cache_keeper import CacheKeeper, FormedCache
from shoal.parallel.control import KeptCache
from shoal.parallel.partition import Dims, Shard, whole_shard
from shoal.worker.cache_memory import CacheMemory

DIMS = Dims(num_layers=4, num_query_heads=4, num_kv_heads=2, num_mlp_columns=64, vocab_size=128)
SHARD = whole_shard(DIMS)
BYTES, BLOCKS = 4096, 8


@pytest.fixture
def keeper() -> Iterator[CacheKeeper]:
    keeper = CacheKeeper()
    yield keeper
    keeper.close()


def formed(memory: CacheMemory, *, pid: int | None, shard: Shard = SHARD) -> FormedCache:
    return FormedCache(shard, memory.identity, "int8", memory.descriptor, pid)


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def numbers(memory: CacheMemory) -> torch.Tensor:
    return memory.tensor((8,), torch.float32, index=1)


def test_a_successor_finds_what_the_last_worker_wrote(keeper: CacheKeeper) -> None:
    memory = CacheMemory(BYTES)
    numbers(memory).copy_(torch.arange(8.0))
    assert keeper.note([formed(memory, pid=os.getpid())], BLOCKS) is False
    keeper._writers[0] = [ended_pid()]
    identity = memory.identity
    del memory
    kept = keeper.offer(0, SHARD, BLOCKS, pid=os.getpid())
    assert kept is not None
    assert CacheMemory.of(kept, BYTES, torch.float16) is None
    again = CacheMemory.of(kept, BYTES, torch.int8)
    assert again is not None
    assert numbers(again).tolist() == list(range(8))
    assert again.identity == identity
    assert keeper.note([formed(again, pid=os.getpid())], BLOCKS) is True


def test_nothing_is_offered_while_a_former_worker_may_still_write(keeper: CacheKeeper) -> None:
    memory = CacheMemory(BYTES)
    keeper.note([formed(memory, pid=os.getpid())], BLOCKS)
    assert keeper.offer(0, SHARD, BLOCKS, pid=1) is None


def test_another_shard_another_size_another_machine_begin_empty(keeper: CacheKeeper) -> None:
    memory = CacheMemory(BYTES)
    keeper.note([formed(memory, pid=os.getpid()), formed(memory, pid=None)], BLOCKS)
    keeper._writers[0] = []
    other = whole_shard(msgspec.structs.replace(DIMS, num_layers=2))
    assert keeper.offer(0, other, BLOCKS, pid=7) is None
    assert keeper.offer(0, SHARD, BLOCKS + 1, pid=7) is None
    assert keeper.offer(0, SHARD, None, pid=7) is None
    assert keeper.offer(1, SHARD, BLOCKS, pid=7) is None
    assert keeper.offer(0, SHARD, BLOCKS, pid=7) is not None


def test_content_counts_only_if_every_cache_is_the_one_of_before(keeper: CacheKeeper) -> None:
    one, other, new = CacheMemory(BYTES), CacheMemory(BYTES), CacheMemory(BYTES)
    pid = os.getpid()
    assert keeper.note([formed(one, pid=pid), formed(other, pid=pid)], BLOCKS) is False
    assert keeper.note([formed(one, pid=pid), formed(other, pid=pid)], BLOCKS) is True
    assert keeper.note([formed(one, pid=pid), formed(new, pid=pid)], BLOCKS) is False
    assert keeper.note([formed(one, pid=pid), formed(new, pid=pid)], BLOCKS + 1) is False


def test_a_path_that_leads_nowhere_or_elsewhere_is_not_taken() -> None:
    memory = CacheMemory(BYTES)
    path = f"/proc/{os.getpid()}/fd/{memory.descriptor}"
    kept = KeptCache(path=path, identity="x", dtype="float16")
    assert CacheMemory.of(kept, BYTES, torch.float16) is not None
    assert CacheMemory.of(kept, 2 * BYTES, torch.float16) is None
    elsewhere = msgspec.structs.replace(kept, path="/proc/0/fd/0")
    assert CacheMemory.of(elsewhere, BYTES, torch.float16) is None
