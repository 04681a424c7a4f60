"""What a step's result means for one sequence: new tokens, collected values, the end."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import zip_longest

from shoal.errors import InternalError
from shoal.messages import Chunk, ChunkResult, Event, TokenLogprobs
from shoal.request import FinishReason
from shoal.schedule.sequence import Sequence

_Taken = tuple[bool, int | None, TokenLogprobs | None, FinishReason | None]
"""(is it the first, token, its log-probabilities, what it ends with)"""


def check_result(chunk: Chunk, result: ChunkResult) -> None:
    """Raise InternalError unless the result holds exactly what the chunk asked for."""
    who = f"the result for request {chunk.request_id} at token {chunk.start}"
    if bool(result.token_ids) != bool(chunk.sampling):
        raise InternalError(f"{who} should {'' if chunk.sampling else 'not '}hold a drawn token")
    guessed, draft = result.token_ids[:-1], chunk.draft
    if guessed != draft[: len(guessed)]:
        raise InternalError(f"{who} holds {guessed} as guessed rightly, and drafted was {draft}")
    is_scored = chunk.sampling is not None and chunk.sampling.num_logprobs is not None
    if len(result.logprobs) != len(result.token_ids) * is_scored:
        raise InternalError(f"{who} holds {len(result.logprobs)} log-probabilities")
    if len(result.prompt_logprobs) != len(chunk.score_targets):
        got, asked = len(result.prompt_logprobs), len(chunk.score_targets)
        raise InternalError(f"{who} holds {got} prompt log-probabilities, {asked} were asked for")
    if bool(result.pooled) != chunk.pooling:
        raise InternalError(f"{who} should {'' if chunk.pooling else 'not '}hold pooled states")


def apply_result(sequence: Sequence, chunk: Chunk, result: ChunkResult) -> list[Event]:
    """Move a sequence forward by a computed chunk; what there is to tell, token by token.

    Tokens drawn behind the one that ends it are dropped.
    """
    if chunk.score_targets:
        # After a preemption, prompt positions scored before are scored again: keep the first.
        num_known = max(len(sequence.prompt_logprobs) - chunk.start, 0)
        sequence.prompt_logprobs.extend(result.prompt_logprobs[num_known:])
    if chunk.pooling:
        sequence.pooled = _add_float32(sequence.pooled, result.pooled)
    sequence.num_computed = chunk.start + len(chunk.tokens) - chunk.num_drafted
    prompt_done = not sequence.prompt_computed and sequence.num_computed >= sequence.num_prompt
    sequence.prompt_computed |= prompt_done
    if not result.token_ids and (not prompt_done or sequence.request.emitted_tokens):
        return []
    scores = sequence.prompt_logprobs if sequence.reports_prompt_logprobs else None
    return [
        Event(
            request_id=sequence.request_id,
            token_id=token_id,
            logprobs=logprobs,
            finish_reason=reason,
            prompt_logprobs=scores if is_first and prompt_done else None,
            pooled=sequence.pooled if is_first and prompt_done and chunk.pooling else None,
            num_cached_tokens=sequence.num_cached_tokens or 0,
        )
        for is_first, token_id, logprobs, reason in _take_tokens(sequence, result)
    ]


def _take_tokens(sequence: Sequence, result: ChunkResult) -> Iterator[_Taken]:
    """Append what was drawn, up to the end of the request; nothing is taken once, as None."""
    drawn: list[int | None] = [*result.token_ids] or [None]
    for index, (token_id, logprobs) in enumerate(zip_longest(drawn, result.logprobs)):
        if token_id is not None:
            sequence.tokens.append(token_id)
        if index > 0:  # the token before was guessed rightly: it is computed already
            sequence.num_computed += 1
            sequence.num_planned += 1
        reason = _finish_reason(sequence, token_id)
        yield index == 0, token_id, logprobs, reason
        if reason is not None:
            return


def _finish_reason(sequence: Sequence, token_id: int | None) -> FinishReason | None:
    request = sequence.request
    if request.pooling:
        return FinishReason.STOP
    num_emitted = sequence.num_emitted
    if token_id in request.stop_ids and num_emitted > request.params.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if num_emitted >= request.max_tokens else None


def _add_float32(total: bytes, part: bytes) -> bytes:
    """Elementwise sum, rounded to float32 after each addition as a float32 machine would."""
    if not total:
        return part
    if len(total) != len(part):
        raise InternalError(f"pooled states of {len(part)} bytes follow some of {len(total)}")
    sums = map(float.__add__, array("f", total), array("f", part))
    return array("f", sums).tobytes()
