"""From what a client asked to the requests the scheduler runs: checked, every default filled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoal.compute.sampler import sample_seed
from shoal.engine.api import ModelInfo
from shoal.errors import ContextTooLong, InternalError, InvalidRequest, UnsupportedByModel
from shoal.request import Request, SamplingParams


def generation_requests(
    prompt_tokens: list[int],
    params: SamplingParams,
    *,
    info: ModelInfo,
    eos_ids: frozenset[int],
    first_id: int,
    seed: int,
    priority: int,
    arrival_s: float,
    emitted: Sequence[list[int] | None] = (),
) -> dict[int, Request]:
    """One request per sample, by its index, in a group that shares the prompt.

    `emitted` is as in `AsyncEngine.submit`: a sample that has ended gets no request.

    Raises InvalidRequest, ContextTooLong, UnsupportedByModel.
    """
    if not info.can_generate:
        raise UnsupportedByModel(
            f"{info.name} is an encoder: it makes embeddings and cannot generate text",
            param="model",
        )
    _check_prompt(prompt_tokens, info, num_answer=1)
    _check_ids("logit_bias", params.logit_bias, info)
    _check_ids("stop_token_ids", params.stop_token_ids, info)
    stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
    if params.min_tokens and len(stop_ids) >= info.vocab_size:
        raise InvalidRequest(
            f"min_tokens={params.min_tokens} cannot be kept: all {info.vocab_size} tokens of "
            f"{info.name} would stop the answer",
            param="min_tokens",
        )
    max_tokens = params.max_tokens or info.max_context - len(prompt_tokens)
    if max_tokens < params.min_tokens:
        raise ContextTooLong(
            f"min_tokens={params.min_tokens} after {len(prompt_tokens)} prompt tokens do not fit "
            f"the context of {info.max_context} tokens",
            param="min_tokens",
            code="context_length_exceeded",
        )
    return {
        index: Request(
            request_id=first_id + index,
            prompt_tokens=prompt_tokens,
            params=params,
            max_tokens=max_tokens,
            seed=sample_seed(seed, index),
            stop_ids=stop_ids,
            priority=priority,
            arrival_s=arrival_s,
            group=first_id if params.n > 1 else None,
            emitted_tokens=tokens,
        )
        for index, tokens in enumerate(_emitted(emitted, params.n, info))
        if tokens is not None
    }


def pooling_request(
    prompt_tokens: list[int],
    *,
    info: ModelInfo,
    request_id: int,
    priority: int,
    arrival_s: float,
) -> Request:
    """Raises InvalidRequest for an empty prompt or unknown tokens, ContextTooLong."""
    _check_prompt(prompt_tokens, info, num_answer=0)
    return Request(
        request_id=request_id,
        prompt_tokens=prompt_tokens,
        params=SamplingParams(max_tokens=1),
        max_tokens=1,
        seed=0,
        priority=priority,
        arrival_s=arrival_s,
        pooling=True,
        splittable=info.can_generate,
    )


def _emitted(
    emitted: Sequence[list[int] | None], num_samples: int, info: ModelInfo
) -> Sequence[list[int] | None]:
    if not emitted:
        return [[] for _ in range(num_samples)]
    if len(emitted) != num_samples:
        raise InternalError(
            f"tokens emitted by {len(emitted)} samples came with a request for {num_samples}"
        )
    for tokens in emitted:
        _check_ids("emitted", tokens or (), info)
    return emitted


def _check_prompt(prompt_tokens: list[int], info: ModelInfo, *, num_answer: int) -> None:
    if not prompt_tokens:
        raise InvalidRequest("the prompt is empty: it needs at least one token", param="prompt")
    if len(prompt_tokens) + num_answer > info.max_context:
        raise ContextTooLong(
            f"the prompt has {len(prompt_tokens)} tokens and the context {info.max_context}"
            f"{', which must hold an answer too' if num_answer else ''}: shorten the prompt",
            param="prompt",
            code="context_length_exceeded",
        )
    _check_ids("prompt", prompt_tokens, info)


def _check_ids(param: str, token_ids: Iterable[int], info: ModelInfo) -> None:
    outside = next((i for i in token_ids if not 0 <= i < info.vocab_size), None)
    if outside is not None:
        raise InvalidRequest(
            f"{param} names token {outside}; {info.name} has tokens 0 to {info.vocab_size - 1}",
            param=param,
        )
