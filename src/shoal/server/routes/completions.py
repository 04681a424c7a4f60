"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.api import Delta
from shoal.messages import TokenLogprobs
from shoal.server.errors import json_response
from shoal.server.generation import Generation, Sample
from shoal.server.logprobs import CompletionLogprobs, mean_logprob, prompt_logprobs
from shoal.server.prompts import decode, tokenize_prompts
from shoal.server.schema import request_body
from shoal.server.schema_completions import CompletionRequest
from shoal.server.service import Service, service_of
from shoal.server.streaming import EventStream, collect, event
from shoal.weights.tokenizer import Tokenizer

PATH = "/v1/completions"

router = APIRouter()


@router.post(PATH, openapi_extra=request_body(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue one prompt or many, as text or token ids."""
    service = service_of(request)
    asked = await service.read(request, CompletionRequest)
    params = asked.params()
    engine = service.engine
    prompts = await tokenize_prompts(engine, asked.prompt, add_special=asked.add_special_tokens)
    echoes = await _echoes(service, asked)
    generation = Generation(engine, service.metrics, PATH, prompts, params, asked.priority)
    answer = CompletionAnswer(asked, engine.info.name, engine.tokenizer, generation, echoes)
    if asked.stream:
        return EventStream(generation, answer.events())
    return json_response(answer.body(await collect(request.receive, generation)))


async def _echoes(service: Service, asked: CompletionRequest) -> list[str]:
    """The text each prompt is echoed as: its own, or that of its token ids."""
    if not asked.echo:
        return [""] * len(asked.prompt)
    skip_special = asked.skip_special_tokens
    return [
        prompt
        if isinstance(prompt, str)
        else await decode(service.engine, prompt, skip_special=skip_special)
        for prompt in asked.prompt
    ]


class CompletionAnswer:
    """Puts the samples of one generation into OpenAI's form, whole or chunk by chunk."""

    def __init__(
        self,
        asked: CompletionRequest,
        model: str,
        tokenizer: Tokenizer,
        generation: Generation,
        echoes: list[str],
    ) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        self._generation = generation
        self._echoes = echoes
        self._base = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def body(self, samples: list[Sample]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for position in range(len(self._generation.prompts)):
            for sample in self._best(position, samples):
                choices.append(self._choice(len(choices), position, sample))
        return {**self._base, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        usage = {"usage": None} if self._asked.wants_stream_usage else {}
        forms = [self._logprobs_form() for _ in range(self._generation.num_choices)]
        begun: set[int] = set()
        async with aclosing(self._generation.deltas()) as deltas:
            async for index, delta in deltas:
                choice = self._chunk(index, delta, forms[index], first=index not in begun)
                begun.add(index)
                if choice is not None:
                    yield event({**self._base, "choices": [choice], **usage})
        if usage:
            yield event({**self._base, "choices": [], "usage": self._usage()})

    def _best(self, position: int, samples: list[Sample]) -> list[Sample]:
        num_drawn = self._generation.n
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
        prompt = self._generation.prompts[position]
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
        position = index // self._generation.n
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
                chunk["prompt_token_ids"] = self._generation.prompts[position]
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
            token_ids = self._generation.prompts[position] + token_ids
            scores = [None, *self._prompt_scores(position), *scores]
        return form.form(token_ids, scores)

    def _prompt_scores(self, position: int) -> list[TokenLogprobs]:
        return self._generation.prompt_logprobs[position] or []

    def _finish_reason(self, ended: Sample | Delta) -> str | None:
        if ended.finish_reason is None:
            return None
        return "length" if self._asked.scores_only else ended.finish_reason.value

    def _usage(self) -> dict[str, Any]:
        return self._generation.usage(0 if self._asked.scores_only else None)
