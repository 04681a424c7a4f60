"""Which block holds the KV of which token prefix: a hash chain over full blocks, and its index."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b

DIGEST_BYTES = 16


class HashChain:
    """Digests of a growing sequence's full blocks.

    Each digest covers its block's tokens and the digest before it, so that equal digests mean
    equal tokens from the start of the sequence. Chains with different roots never meet.
    """

    __slots__ = ("_block_size", "_root", "digests")

    def __init__(self, block_size: int, root: bytes = b"") -> None:
        self._block_size = block_size
        self._root = blake2b(root, digest_size=DIGEST_BYTES).digest()
        self.digests: list[bytes] = []

    def extend(self, tokens: list[int]) -> None:
        """Add the digests of the full blocks of `tokens` that have none yet.

        `tokens` is the whole sequence: those seen before, unchanged, then new ones.
        """
        first = len(self.digests) * self._block_size
        end = len(tokens) - len(tokens) % self._block_size
        if first >= end:
            return
        data = array("I", tokens[first:end])
        block_bytes = self._block_size * data.itemsize
        view = memoryview(data).cast("B")
        digest = self.digests[-1] if self.digests else self._root
        for offset in range(0, len(view), block_bytes):
            hasher = blake2b(digest, digest_size=DIGEST_BYTES)
            hasher.update(view[offset : offset + block_bytes])
            digest = hasher.digest()
            self.digests.append(digest)

    def copy(self) -> HashChain:
        """A chain that shares what is hashed so far and grows on its own."""
        twin = HashChain(self._block_size)
        twin._root = self._root
        twin.digests = self.digests.copy()
        return twin


class PrefixIndex:
    """Digest of a prefix → the one block that holds the KV of its last `block_size` tokens."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __iter__(self) -> Iterator[int]:
        """The blocks that are indexed."""
        return iter(self._digest_of)

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of a chain."""
        block_ids: list[int] = []
        for digest in digests:
            block_id = self._block_of.get(digest)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def insert(self, digest: bytes, block_id: int) -> bool:
        """Enter a full, computed block; False if another block already holds the same content."""
        if digest in self._block_of:
            return False
        assert block_id not in self._digest_of, f"block {block_id} is entered twice"
        self._block_of[digest] = block_id
        self._digest_of[block_id] = digest
        return True

    def remove(self, block_id: int) -> None:
        del self._block_of[self._digest_of.pop(block_id)]

    def clear(self) -> None:
        self._block_of.clear()
        self._digest_of.clear()
