"""What a step asks of one sequence: its next tokens, their blocks, and what to make of them."""

from __future__ import annotations

from shoal.messages import Chunk, Sampling
from shoal.schedule.sequence import Sequence


def make_chunk(sequence: Sequence, num_tokens: int, block_size: int) -> Chunk:
    """The next `num_tokens` of a sequence; its blocks must cover them."""
    start = sequence.num_planned
    end = start + num_tokens
    is_cached = end <= sequence.num_shared
    reaches_end = end == len(sequence.tokens)
    return Chunk(
        request_id=sequence.request_id,
        start=start,
        tokens=sequence.tokens[start:end],
        block_ids=sequence.block_ids[: -(-(end + is_cached) // block_size)],
        sampling=sampling_of(sequence) if reaches_end and sequence.generates else None,
        score_targets=_score_targets(sequence, start, end),
        num_prompt_logprobs=sequence.request.params.prompt_logprobs or 0,
        pooling=sequence.request.pooling,
        is_cached=is_cached,
    )


def sampling_of(sequence: Sequence) -> Sampling:
    """How its next token is drawn."""
    request = sequence.request
    params = request.params
    return Sampling(
        seed=request.seed,
        position=len(sequence.tokens),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        banned_ids=sequence.banned_ids if sequence.num_emitted < params.min_tokens else (),
        prompt_history=request.prompt_tokens if params.needs_history else [],
        output_history=sequence.tokens[sequence.num_prompt :] if params.needs_history else [],
        num_logprobs=params.logprobs,
    )


def _score_targets(sequence: Sequence, start: int, end: int) -> list[int]:
    """The prompt tokens that follow those at [start, end), while prompt scores are missing."""
    if not sequence.needs_prompt_logprobs:
        return []
    return sequence.request.prompt_tokens[start + 1 : end + 1]
