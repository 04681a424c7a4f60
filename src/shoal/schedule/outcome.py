"""What a step's result means for one sequence: new tokens, collected values, the end."""

from __future__ import annotations

from array import array

from shoal.errors import InternalError
from shoal.messages import Chunk, ChunkResult, Event
from shoal.request import FinishReason
from shoal.schedule.sequence import Sequence


def check_result(chunk: Chunk, result: ChunkResult) -> None:
    """Raise InternalError unless the result holds exactly what the chunk asked for."""
    who = f"the result for request {chunk.request_id} at token {chunk.start}"
    if (result.token_id is None) != (chunk.sampling is None):
        raise InternalError(f"{who} should {'' if chunk.sampling else 'not '}hold a drawn token")
    if len(result.prompt_logprobs) != len(chunk.score_targets):
        got, asked = len(result.prompt_logprobs), len(chunk.score_targets)
        raise InternalError(f"{who} holds {got} prompt log-probabilities, {asked} were asked for")
    if bool(result.pooled) != chunk.pooling:
        raise InternalError(f"{who} should {'' if chunk.pooling else 'not '}hold pooled states")


def apply_result(sequence: Sequence, chunk: Chunk, result: ChunkResult) -> Event | None:
    """Move a sequence forward by a computed chunk; None when there is nothing to tell yet."""
    if chunk.score_targets:
        # After a preemption, prompt positions scored before are scored again: keep the first.
        num_known = max(len(sequence.prompt_logprobs) - chunk.start, 0)
        sequence.prompt_logprobs.extend(result.prompt_logprobs[num_known:])
    if chunk.pooling:
        sequence.pooled = _add_float32(sequence.pooled, result.pooled)
    sequence.num_computed = chunk.start + len(chunk.tokens)
    if result.token_id is not None:
        sequence.tokens.append(result.token_id)

    prompt_done = not sequence.prompt_computed and sequence.num_computed >= sequence.num_prompt
    sequence.prompt_computed |= prompt_done
    if result.token_id is None and (not prompt_done or sequence.request.emitted_tokens):
        return None
    scored = sequence.reports_prompt_logprobs
    return Event(
        request_id=sequence.request_id,
        token_id=result.token_id,
        logprobs=result.logprobs,
        finish_reason=_finish_reason(sequence, result.token_id),
        prompt_logprobs=sequence.prompt_logprobs if prompt_done and scored else None,
        pooled=sequence.pooled if prompt_done and chunk.pooling else None,
        num_cached_tokens=sequence.num_cached_tokens or 0,
    )


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
