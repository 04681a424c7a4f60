"""KV blocks of sequences: taken for all known tokens at once, shared by prefix, given back."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.schedule.blocks import BlockId, BlockPool
from shoal.schedule.prefix import HashChain, PrefixIndex
from shoal.schedule.sequence import Sequence


class BlockCache:
    """The blocks of one replica. Every worker of it uses the same ids for its own layers."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool) -> None:
        self._index = PrefixIndex()
        self._block_size = block_size
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(num_blocks, on_evict=self._index.remove)

    def new_chain(self, prompt_tokens: list[int]) -> HashChain:
        """A prompt's hash chain: made on arrival, so that no step pays for a long prompt."""
        chain = HashChain(self._block_size)
        if self.prefix_caching:
            chain.extend(prompt_tokens)
        return chain

    def shares_prefix(self, sequence: Sequence) -> bool:
        return self.prefix_caching and sequence.may_skip_prefix

    def fits(self, sequence: Sequence) -> bool:
        """Whether `open` would succeed."""
        return self._fits(sequence, self._cached_prefix(sequence))

    def open(self, sequence: Sequence) -> bool:
        """Give a sequence blocks for all tokens known, shared where its prefix is cached.

        Of those in shared blocks the last one still counts as missing if it is the last of all:
        its logits are wanted. Sets `block_ids`, `num_shared`, `num_computed` and
        `num_planned`; False, and no change, if too few blocks are free.
        """
        hits = self._cached_prefix(sequence)
        if not self._fits(sequence, hits):
            return False
        for block_id in hits:
            self.pool.share(block_id)
        sequence.num_shared = len(hits) * self._block_size
        num_computed = min(sequence.num_shared, len(sequence.tokens) - 1)
        sequence.num_computed = sequence.num_planned = num_computed
        sequence.block_ids = hits + (self.pool.allocate(self._num_new(sequence, hits)) or [])
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Add the blocks that the tokens known by now lack; False, and no change, if too few."""
        num_lacking = self._num_blocks(sequence) - len(sequence.block_ids)
        if num_lacking <= 0:
            return True
        block_ids = self.pool.allocate(num_lacking)
        if block_ids is None:
            return False
        sequence.block_ids.extend(block_ids)
        return True

    def stretch(self, sequence: Sequence, num_tokens: int, *, num_reserved: int) -> int:
        """Add the blocks for so many guessed tokens, or fewer, so that `num_reserved` stay free.

        How many tokens there is room for.
        """
        room = len(sequence.block_ids) * self._block_size - len(sequence.tokens)
        num_lacking = -(-(num_tokens - room) // self._block_size)
        num_new = min(num_lacking, self.pool.num_free - num_reserved)
        if num_new > 0:
            sequence.block_ids += self.pool.allocate(num_new) or []
            room += num_new * self._block_size
        return min(num_tokens, room)

    def trim(self, sequence: Sequence) -> None:
        """Give back the blocks that only wrong guesses needed."""
        surplus = sequence.block_ids[self._num_blocks(sequence) :]
        if surplus:
            self.pool.release(surplus)
            del sequence.block_ids[-len(surplus) :]

    def publish(self, sequence: Sequence, start: int) -> None:
        """Let others share the blocks that became full since token `start` was computed.

        Content that is already in the index stays with the block that was first. Without causal
        attention (an unsplittable prompt) a block depends on what follows it: never shared.
        """
        first, end = start // self._block_size, sequence.num_computed // self._block_size
        if first == end or not self.prefix_caching or not sequence.request.splittable:
            return
        sequence.chain.extend(sequence.tokens)
        for i in range(first, end):
            if self._index.insert(sequence.chain.digests[i], sequence.block_ids[i]):
                self.pool.keep(sequence.block_ids[i])

    def release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []

    def forget_content(self) -> None:
        """What the blocks held is lost (a worker died): nothing may be shared any more."""
        self._index.clear()
        self.pool.forget_content()

    def check(self, holders: Iterable[Sequence]) -> None:
        """Assert that exactly `holders` hold blocks, and that the index names kept blocks only."""
        self.pool.check([sequence.block_ids for sequence in holders])
        kept = {i for i in range(self.pool.num_blocks) if self.pool.has_content(i)}
        assert kept == set(self._index), f"blocks kept {kept}, blocks indexed {set(self._index)}"

    def _cached_prefix(self, sequence: Sequence) -> list[BlockId]:
        if not self.shares_prefix(sequence):
            return []
        sequence.chain.extend(sequence.tokens)
        # Who draws nothing may not have the room for one token more, see `_num_new`.
        num_useful = len(sequence.tokens) - (not sequence.generates)
        return self._index.match(sequence.chain.digests[: num_useful // self._block_size])

    def _fits(self, sequence: Sequence, hits: list[BlockId]) -> bool:
        num_free = self.pool.num_free - sum(map(self.pool.is_free, hits))
        return self._num_new(sequence, hits) <= num_free

    def _num_new(self, sequence: Sequence, hits: list[BlockId]) -> int:
        """One at least: what is computed may not be stored in a shared block."""
        return max(self._num_blocks(sequence) - len(hits), 1)

    def _num_blocks(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self._block_size)
