"""Adds guessed tokens to a plan: a right one saves a step, a wrong one costs a row of arithmetic.

Nothing gives way to them: they take what a step has left once everything else is planned.
"""

from __future__ import annotations

from msgspec import structs

from shoal.messages import Chunk, ChunkResult
from shoal.schedule.cache import BlockCache
from shoal.schedule.flight import Flight
from shoal.schedule.sequence import Sequence

MOST_ROWS = 8
"""Beyond, a step is bound by arithmetic: a guess costs as much as another request's token."""


def add_drafts(flight: Flight, cache: BlockCache, *, num_reserved: int) -> None:
    """Lengthen the decodes of a flight by guesses, as far as its tokens and the blocks reach.

    `num_reserved` blocks stay free, for what running sequences draw next.
    """
    decodes = [i for i, (s, c) in enumerate(flight.parts) if s.drafting and _draws_one(c)]
    if not decodes:
        return
    num_rows = sum(len(chunk.tokens) for _, chunk in flight.parts)
    room = min(flight.budget_tokens, MOST_ROWS - num_rows)
    if room <= 0:
        return
    for num_before, index in enumerate(decodes):
        sequence, chunk = flight.parts[index]
        # A second guess is right less often than a first: all have their share.
        share = -(-room // (len(decodes) - num_before))
        draft = _draft(sequence, share, cache, num_reserved)
        if draft:
            flight.parts[index] = (sequence, _lengthened(chunk, draft, sequence))
            flight.budget_tokens -= len(draft)
            room -= len(draft)


def _draws_one(chunk: Chunk) -> bool:
    """A guess would take the place in which a cached token is stored."""
    return chunk.sampling is not None and len(chunk.tokens) == 1 and not chunk.is_cached


def _draft(sequence: Sequence, at_most: int, cache: BlockCache, num_reserved: int) -> list[int]:
    """What is guessed, as far as there are blocks for it: these are the sequence's then."""
    assert sequence.drafting is not None, f"nobody drafts for {sequence.request_id}"
    draft = sequence.drafting.propose(sequence.tokens, min(at_most, most_useful(sequence)))
    return draft[: cache.stretch(sequence, len(draft), num_reserved=num_reserved)]


def land_draft(sequence: Sequence, chunk: Chunk, result: ChunkResult, cache: BlockCache) -> None:
    """Give back what wrong guesses took; what became of them decides on the next."""
    assert sequence.drafting is not None, f"nobody drafts for {sequence.request_id}"
    sequence.drafting.judge(chunk.num_drafted, len(result.token_ids) - 1)
    cache.trim(sequence)


def most_useful(sequence: Sequence) -> int:
    """What follows the last token is not drawn, so the last needs no guess.

    Until `min_tokens` stop tokens are banned, and a chunk draws all its tokens under one rule.
    """
    request, num_emitted = sequence.request, sequence.num_emitted
    num_left = request.max_tokens - num_emitted
    num_banned = request.params.min_tokens - num_emitted
    return (min(num_left, num_banned) if num_banned > 0 else num_left) - 1


def _lengthened(chunk: Chunk, draft: list[int], sequence: Sequence) -> Chunk:
    return structs.replace(
        chunk,
        tokens=chunk.tokens + draft,
        block_ids=sequence.block_ids.copy(),
        num_drafted=len(draft),
    )
