"""Who holds which KV block: reference counts, and the order in which unheld content is given up."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

BlockId = int


class BlockPool:
    """A fixed number of KV blocks, each in one of three states.

    held    one or more sequences use it
    cached  nobody uses it, but its content may be wanted again; given up least recently used first
    empty   nobody uses it and its content means nothing

    A block is free when it is cached or empty: free + held = all. `on_evict` is told of each
    cached block that is about to be overwritten.
    """

    def __init__(
        self, num_blocks: int, on_evict: Callable[[BlockId], object] = lambda _block_id: None
    ) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._num_holders = [0] * num_blocks
        self._has_content = [False] * num_blocks
        self._empty = list(reversed(range(num_blocks)))
        self._cached: OrderedDict[BlockId, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Free blocks whose content is kept in case it is wanted again."""
        return len(self._cached)

    def is_free(self, block_id: BlockId) -> bool:
        return self._num_holders[block_id] == 0

    def has_content(self, block_id: BlockId) -> bool:
        return self._has_content[block_id]

    def allocate(self, num_blocks: int) -> list[BlockId] | None:
        """Blocks to write to, each with one holder; None, and no change, if too few are free."""
        if num_blocks > self.num_free:
            return None
        return [self._take_one() for _ in range(num_blocks)]

    def share(self, block_id: BlockId) -> None:
        """Add a holder to a held or cached block."""
        assert not self.is_free(block_id) or block_id in self._cached, f"block {block_id} is empty"
        if self.is_free(block_id):
            del self._cached[block_id]
        self._num_holders[block_id] += 1

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """Take one holder off each block of a sequence.

        From its tail to its head, because a prefix is worth nothing without its head: the tail
        has to be evicted first.
        """
        for block_id in reversed(block_ids):
            assert self._num_holders[block_id] > 0, f"block {block_id} is released but not held"
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] > 0:
                continue
            if self._has_content[block_id]:
                self._cached[block_id] = None
            else:
                self._empty.append(block_id)

    def keep(self, block_id: BlockId) -> None:
        """Note that a held block's content is worth keeping once nobody holds it."""
        assert not self.is_free(block_id), f"block {block_id} is not held"
        self._has_content[block_id] = True

    def forget_content(self) -> None:
        """Every content is lost; holders keep their blocks. `on_evict` is not called."""
        self._has_content = [False] * self.num_blocks
        self._empty.extend(self._cached)
        self._cached.clear()

    def check(self, holdings: Iterable[Sequence[BlockId]]) -> None:
        """Assert that `holdings`, the block ids of every holder, is exactly what is held."""
        expected = Counter(block_id for block_ids in holdings for block_id in block_ids)
        actual = {block_id: n for block_id, n in enumerate(self._num_holders) if n}
        assert actual == dict(expected), f"held blocks {actual}, holders claim {dict(expected)}"
        free = [*self._empty, *self._cached]
        assert len(set(free)) == len(free), "a block is free twice"
        assert sorted([*free, *actual]) == list(range(self.num_blocks)), "a block is lost"
        assert all(self._has_content[block_id] for block_id in self._cached)
        assert not any(self._has_content[block_id] for block_id in self._empty)

    def _take_one(self) -> BlockId:
        if self._empty:
            block_id = self._empty.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._has_content[block_id] = False
            self._on_evict(block_id)
        self._num_holders[block_id] = 1
        return block_id
