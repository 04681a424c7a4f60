"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.api import AsyncEngine, Delta
from shoal.journal.api import Accepted
from shoal.messages import TokenLogprobs
from shoal.server.answering import Endpoint, come_back, create
from shoal.server.gathered import Gathered, Sample
from shoal.server.logprobs import CompletionLogprobs, mean_logprob, prompt_logprobs
from shoal.server.prompts import decode, tokenize_prompts
from shoal.server.schema import request_body
from shoal.server.schema_completions import CompletionRequest

PATH = "/v1/completions"

router = APIRouter()


@router.post(PATH, openapi_extra=request_body(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue one prompt or many, as text or token ids."""
    return await create(request, ENDPOINT)


@router.get(PATH + "/{response_id}")
async def get_completion(request: Request, response_id: str) -> Response:
    """A completion begun before, whole or the rest of its stream."""
    return await come_back(request, ENDPOINT, response_id)


async def _tokenize(engine: AsyncEngine, asked: CompletionRequest) -> list[list[int]]:
    return await tokenize_prompts(engine, asked.prompt, add_special=asked.add_special_tokens)


async def _echoes(engine: AsyncEngine, asked: CompletionRequest) -> list[str]:
    """The text each prompt is echoed as: its own, or that of its token ids."""
    if not asked.echo:
        return [""] * len(asked.prompt)
    skip_special = asked.skip_special_tokens
    return [
        prompt
        if isinstance(prompt, str)
        else await decode(engine, prompt, skip_special=skip_special)
        for prompt in asked.prompt
    ]


class CompletionAnswer:
    """Puts the samples of one generation into OpenAI's form, whole or chunk by chunk."""

    def __init__(
        self,
        asked: CompletionRequest,
        engine: AsyncEngine,
        accepted: Accepted,
        echoes: list[str],
    ) -> None:
        self._asked = asked
        self._tokenizer = engine.tokenizer
        self._gathered = Gathered(accepted)
        self._echoes = echoes
        self._forms = [self._logprobs_form() for _ in range(accepted.num_choices)]
        self._begun: set[int] = set()
        self._no_usage = {"usage": None} if asked.wants_stream_usage else {}
        self._base = {
            "id": accepted.response_id,
            "object": "text_completion",
            "created": accepted.created_s,
            "model": engine.info.name,
        }

    @classmethod
    async def of(
        cls, engine: AsyncEngine, asked: CompletionRequest, accepted: Accepted
    ) -> CompletionAnswer:
        return cls(asked, engine, accepted, await _echoes(engine, asked))

    def body(self, gathered: Gathered) -> dict[str, Any]:
        self._gathered = gathered
        choices: list[dict[str, Any]] = []
        for position in range(len(gathered.prompts)):
            for sample in self._best(position, gathered.samples):
                choices.append(self._choice(len(choices), position, sample))
        return {**self._base, "choices": choices, "usage": self._usage()}

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any] | None]:
        self._gathered.add(index, delta)
        choice = self._chunk(index, delta, self._forms[index], first=index not in self._begun)
        self._begun.add(index)
        return [choice and {**self._base, "choices": [choice], **self._no_usage}]

    def closing(self) -> list[dict[str, Any]]:
        if not self._no_usage:
            return []
        return [{**self._base, "choices": [], "usage": self._usage()}]

    def _best(self, position: int, samples: list[Sample]) -> list[Sample]:
        num_drawn = self._gathered.num_samples
        drawn = samples[position * num_drawn : (position + 1) * num_drawn]
        if num_drawn > self._asked.n:
            drawn.sort(key=lambda sample: mean_logprob(sample.logprobs), reverse=True)
        return drawn[: self._asked.n]

    def _choice(self, index: int, position: int, sample: Sample) -> dict[str, Any]:
        asked = self._asked
        if asked.scores_only:
            sample = Sample(finish_reason=sample.finish_reason)
        choice: dict[str, Any] = {
            "index": index,
            "text": self._echoes[position] + sample.text,
            "logprobs": self._logprobs(position, sample),
            "finish_reason": self._finish_reason(sample),
            "stop_reason": sample.stop_match,
        }
        prompt = self._gathered.prompts[position]
        if asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, prompt, self._prompt_scores(position), asked.prompt_logprobs
            )
        if asked.return_token_ids:
            choice |= {"token_ids": sample.token_ids, "prompt_token_ids": prompt}
        return choice

    def _chunk(
        self, index: int, delta: Delta, form: CompletionLogprobs | None, *, first: bool
    ) -> dict[str, Any] | None:
        """None for a step that shows the client nothing new."""
        asked = self._asked
        if asked.scores_only:
            delta = Delta(index=delta.index, finish_reason=delta.finish_reason)
        position = index // self._gathered.num_samples
        echo = self._echoes[position] if first else ""
        chunk: dict[str, Any] = {
            "index": index,
            "text": echo + delta.text,
            "logprobs": form and form.form(delta.token_ids, delta.logprobs or []),
            "finish_reason": self._finish_reason(delta),
        }
        if delta.finish_reason is not None:
            chunk["stop_reason"] = delta.stop_match
        if asked.return_token_ids:
            chunk["token_ids"] = delta.token_ids
            if first:
                chunk["prompt_token_ids"] = self._gathered.prompts[position]
        shows_tokens = bool(delta.token_ids) and (form is not None or asked.return_token_ids)
        shows = chunk["text"] or delta.finish_reason is not None or shows_tokens
        return chunk if shows else None

    def _logprobs_form(self) -> CompletionLogprobs | None:
        if self._asked.logprobs is None:
            return None
        return CompletionLogprobs(
            self._tokenizer, self._asked.logprobs, skip_special=self._asked.skip_special_tokens
        )

    def _logprobs(self, position: int, sample: Sample) -> dict[str, Any] | None:
        form = self._logprobs_form()
        if form is None:
            return None
        token_ids, scores = list(sample.token_ids), list[TokenLogprobs | None](sample.logprobs)
        if self._asked.echo:
            token_ids = self._gathered.prompts[position] + token_ids
            scores = [None, *self._prompt_scores(position), *scores]
        return form.form(token_ids, scores)

    def _prompt_scores(self, position: int) -> list[TokenLogprobs]:
        return self._gathered.prompt_logprobs[position]

    def _finish_reason(self, ended: Sample | Delta) -> str | None:
        if ended.finish_reason is None:
            return None
        return "length" if self._asked.scores_only else ended.finish_reason.value

    def _usage(self) -> dict[str, Any]:
        return self._gathered.usage(0 if self._asked.scores_only else None)


ENDPOINT = Endpoint(
    path=PATH,
    prefix="cmpl",
    schema=CompletionRequest,
    params=CompletionRequest.params,
    tokenize=_tokenize,
    answer=CompletionAnswer.of,
)
