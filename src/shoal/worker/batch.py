"""From a plan's chunks to the rows of one step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from shoal.messages import Chunk
from shoal.worker.places import Places, find_places, native_places

if TYPE_CHECKING:
    from shoal_kernels import Step

# A group of decodes is padded to its longest; a shorter sequence starts a new group when
# padding would more than double its work. Few groups or little padding: one costs calls per
# layer, the other memory traffic.
_MAX_PADDING = 2.0
_MIN_KEYS = 256


class Batch:
    """The tokens of all chunks, one after the other: decodes first, by tokens and by length.

    The order of the batch's chunks is its own. `last_rows[i]` is the row of chunk i's last token.
    `read_rows` are those whose last state somebody wants: of a chunk its last ones, if any;
    `last_reads[i]` says which of them is chunk i's last.
    """

    def __init__(self, chunks: list[Chunk], block_size: int) -> None:
        decodes = sorted(filter(_is_decode, chunks), key=lambda one: (len(one.tokens), one.start))
        others = [[chunk] for chunk in chunks if not _is_decode(chunk)]
        self._together = _alike(decodes) + others
        self._block_size = block_size
        self.chunks = [chunk for some in self._together for chunk in some]
        self.tokens = [token for chunk in self.chunks for token in chunk.tokens]
        self.last_rows = _last_of(len(chunk.tokens) for chunk in self.chunks)
        self.last_reads = _last_of(map(_num_read, self.chunks))

    @property
    def positions(self) -> list[int]:
        return [c.start + number for c in self.chunks for number in range(len(c.tokens))]

    @property
    def read_rows(self) -> list[int]:
        last_rows = zip(self.chunks, self.last_rows, strict=True)
        return [row for c, last in last_rows for row in range(last + 1 - _num_read(c), last + 1)]

    @cached_property
    def places(self) -> Places:
        return find_places(self._together, self._block_size)

    def native_places(self) -> Step:
        return native_places(self._together, self._block_size)


def _last_of(lengths: Iterable[int]) -> list[int]:
    return [end - 1 for end in accumulate(lengths)]


def _num_read(chunk: Chunk) -> int:
    if chunk.score_targets or chunk.pooling:
        return len(chunk.tokens)
    return 0 if chunk.sampling is None else 1 + chunk.num_drafted


def _is_decode(chunk: Chunk) -> bool:
    """One token that is known, and perhaps guesses behind it."""
    return len(chunk.tokens) == 1 + chunk.num_drafted


def _alike(chunks: list[Chunk]) -> list[list[Chunk]]:
    """Of as many tokens each, cut where padding would cost too much."""
    together: list[list[Chunk]] = []
    most_keys = 0
    for chunk in chunks:
        num_tokens, num_keys = len(chunk.tokens), chunk.start + len(chunk.tokens)
        if not together or num_tokens != len(together[-1][0].tokens) or num_keys > most_keys:
            together.append([])
            most_keys = max(_MIN_KEYS, int(num_keys * _MAX_PADDING))
        together[-1].append(chunk)
    return together
