"""BlockPool: reference counts, conservation, and the order of eviction."""

from __future__ import annotations

import pytest

from shoal.schedule.blocks import BlockPool


def allocate(pool: BlockPool, num_blocks: int) -> list[int]:
    block_ids = pool.allocate(num_blocks)
    assert block_ids is not None
    return block_ids


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    held = allocate(pool, 3)
    assert pool.allocate(2) is None
    assert (pool.num_free, pool.num_used) == (1, 3)
    assert len({*held, *allocate(pool, 1)}) == 4


def test_a_shared_block_is_free_only_after_its_last_holder() -> None:
    pool = BlockPool(1)
    (block_id,) = allocate(pool, 1)
    pool.share(block_id)
    pool.release([block_id])
    assert pool.num_free == 0
    pool.release([block_id])
    assert pool.num_free == 1


def test_content_is_evicted_last_and_least_recently_used_first() -> None:
    evicted: list[int] = []
    pool = BlockPool(4, on_evict=evicted.append)
    a, b, c, d = allocate(pool, 4)
    for block_id in (a, b, c):
        pool.keep(block_id)
    for block_id in (a, b, c, d):
        pool.release([block_id])
    assert (pool.num_free, pool.num_cached) == (4, 3)
    pool.share(a)
    pool.release([a])  # used again: now the most recent
    assert allocate(pool, 1) == [d]
    assert evicted == []
    assert allocate(pool, 3) == [b, c, a]
    assert evicted == [b, c, a]


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    pool = BlockPool(3)
    prefix = allocate(pool, 3)
    for block_id in prefix:
        pool.keep(block_id)
    pool.release(prefix)
    assert allocate(pool, 3) == prefix[::-1]


def test_content_is_gone_once_its_block_was_evicted() -> None:
    pool = BlockPool(1)
    (block_id,) = allocate(pool, 1)
    pool.keep(block_id)
    pool.release([block_id])
    pool.release(allocate(pool, 1))
    assert pool.num_cached == 0


def test_forgotten_content_frees_its_blocks_and_leaves_holders_alone() -> None:
    evicted: list[int] = []
    pool = BlockPool(2, on_evict=evicted.append)
    a, b = allocate(pool, 2)
    pool.keep(a)
    pool.keep(b)
    pool.release([a])
    pool.forget_content()
    assert (pool.num_cached, pool.num_used) == (0, 1)
    pool.release([b])
    assert (pool.num_cached, pool.num_free) == (0, 2)
    assert evicted == []


def test_misuse_is_caught() -> None:
    pool = BlockPool(2)
    (block_id,) = allocate(pool, 1)
    pool.release([block_id])
    with pytest.raises(AssertionError, match="not held"):
        pool.release([block_id])
    with pytest.raises(AssertionError, match="empty"):
        pool.share(block_id)


def test_check_sees_a_leak_and_a_missing_holder() -> None:
    pool = BlockPool(4)
    held = allocate(pool, 2)
    pool.check([held])
    with pytest.raises(AssertionError):
        pool.check([])
    with pytest.raises(AssertionError):
        pool.check([held, held])
