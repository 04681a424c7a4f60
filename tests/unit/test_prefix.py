"""Hash chains and the prefix index."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.schedule.prefix import DIGEST_BYTES, HashChain, PrefixIndex

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def digests(tokens: list[int], block_size: int = 4, root: bytes = b"") -> list[bytes]:
    chain = HashChain(block_size, root)
    chain.extend(tokens)
    return chain.digests


def test_only_full_blocks_have_digests() -> None:
    assert [len(digests(list(range(n)))) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert all(len(digest) == DIGEST_BYTES for digest in digests(list(range(8))))


def test_a_digest_covers_everything_before_its_end() -> None:
    ours, theirs = digests([1, 2, 3, 4, 5, 6, 7, 8]), digests([9, 2, 3, 4, 5, 6, 7, 8])
    assert ours[0] != theirs[0]
    assert ours[1] != theirs[1]


def test_roots_and_block_sizes_keep_chains_apart() -> None:
    tokens = list(range(8))
    assert not set(digests(tokens, root=b"a")) & set(digests(tokens, root=b"b"))
    assert digests(tokens, block_size=8)[0] != digests(tokens, block_size=4)[1]


@given(TOKENS, TOKENS)
def test_growing_by_steps_equals_hashing_at_once(head: list[int], tail: list[int]) -> None:
    chain = HashChain(4)
    chain.extend(head)
    twin = chain.copy()
    chain.extend(head + tail)
    assert chain.digests == digests(head + tail)
    assert twin.digests == digests(head)


@given(TOKENS, TOKENS)
def test_equal_digests_mean_equal_prefixes(ours: list[int], theirs: list[int]) -> None:
    for i, (our, their) in enumerate(zip(digests(ours), digests(theirs), strict=False)):
        assert (our == their) == (ours[: 4 * i + 4] == theirs[: 4 * i + 4])


def test_match_is_the_longest_known_prefix() -> None:
    index = PrefixIndex()
    chain = digests(list(range(12)))
    for digest, block_id in zip(chain, (7, 5, 3), strict=True):
        assert index.insert(digest, block_id)
    assert index.match(chain) == [7, 5, 3]
    assert index.match(digests([*range(8), 0, 0, 0, 0])) == [7, 5]
    assert index.match(digests([0, 0, 0, 0, *range(4, 12)])) == []
    index.remove(5)
    assert index.match(chain) == [7]


def test_the_first_block_of_a_content_keeps_the_entry() -> None:
    index = PrefixIndex()
    chain = digests([1, 2, 3, 4])
    assert index.insert(chain[0], 0)
    assert not index.insert(chain[0], 1)
    assert index.match(chain) == [0]
    assert list(index) == [0]


def test_clear_forgets_all() -> None:
    index = PrefixIndex()
    chain = digests([1, 2, 3, 4])
    index.insert(chain[0], 0)
    index.clear()
    assert index.match(chain) == []
    assert len(index) == 0
    assert index.insert(chain[0], 0)
