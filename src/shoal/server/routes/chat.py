"""POST /v1/chat/completions."""

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
from shoal.server.logprobs import chat_logprobs, prompt_logprobs
from shoal.server.prompts import tokenize_chat
from shoal.server.schema import request_body
from shoal.server.schema_chat import ChatRequest
from shoal.server.service import service_of
from shoal.server.streaming import EventStream, collect, event
from shoal.weights.tokenizer import Tokenizer

PATH = "/v1/chat/completions"

router = APIRouter()


@router.post(PATH, openapi_extra=request_body(ChatRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, with the model's own chat template."""
    service = service_of(request)
    asked = await service.read(request, ChatRequest)
    params = asked.params()
    engine = service.engine
    prompt = await tokenize_chat(engine, asked.messages, asked.chat_template_kwargs)
    generation = Generation(engine, service.metrics, PATH, [prompt], params, asked.priority)
    answer = ChatAnswer(asked, engine.info.name, engine.tokenizer, generation)
    if asked.stream:
        return EventStream(generation, answer.events())
    return json_response(answer.body(await collect(request.receive, generation)))


class ChatAnswer:
    """Puts the samples of one generation into OpenAI's form, whole or chunk by chunk."""

    def __init__(
        self, asked: ChatRequest, model: str, tokenizer: Tokenizer, generation: Generation
    ) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        self._generation = generation
        self._base = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if asked.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
        }

    def body(self, samples: list[Sample]) -> dict[str, Any]:
        choices = [self._choice(index, sample) for index, sample in enumerate(samples)]
        body: dict[str, Any] = {**self._base, "choices": choices, "usage": self._generation.usage()}
        prompt = self._generation.prompts[0]
        if self._asked.prompt_logprobs is not None:
            scores = self._generation.prompt_logprobs[0] or []
            body["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, prompt, scores, self._asked.prompt_logprobs
            )
        if self._asked.return_token_ids:
            body["prompt_token_ids"] = prompt
        return body

    async def events(self) -> AsyncGenerator[bytes, None]:
        usage = {"usage": None} if self._asked.wants_stream_usage else {}
        begun: set[int] = set()
        async with aclosing(self._generation.deltas()) as deltas:
            async for index, delta in deltas:
                if index not in begun:
                    yield event({**self._base, **self._opening(index, first=not begun), **usage})
                    begun.add(index)
                choice = self._chunk(index, delta)
                if choice is not None:
                    yield event({**self._base, "choices": [choice], **usage})
        if usage:
            yield event({**self._base, "choices": [], "usage": self._generation.usage()})

    def _choice(self, index: int, sample: Sample) -> dict[str, Any]:
        assert sample.finish_reason is not None
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": sample.text, "refusal": None},
            "logprobs": self._logprobs(sample.token_ids, sample.logprobs),
            "finish_reason": sample.finish_reason.value,
            "stop_reason": sample.stop_match,
        }
        if self._asked.return_token_ids:
            choice["token_ids"] = sample.token_ids
        return choice

    def _opening(self, index: int, *, first: bool) -> dict[str, Any]:
        """What a choice's stream starts with: who speaks, before a word is said."""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        opening: dict[str, Any] = {"choices": [choice]}
        if first and self._asked.return_token_ids:
            opening["prompt_token_ids"] = self._generation.prompts[0]
        return opening

    def _chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """None for a step that shows the client nothing new."""
        asked = self._asked
        ended = delta.finish_reason is not None
        shows_tokens = bool(delta.token_ids) and (asked.logprobs or asked.return_token_ids)
        if not (delta.text or ended or shows_tokens):
            return None
        chunk: dict[str, Any] = {
            "index": index,
            "delta": {"content": delta.text} if delta.text or shows_tokens else {},
            "logprobs": self._logprobs(delta.token_ids, delta.logprobs or []),
            "finish_reason": delta.finish_reason.value if delta.finish_reason else None,
        }
        if ended:
            chunk["stop_reason"] = delta.stop_match
        if asked.return_token_ids:
            chunk["token_ids"] = delta.token_ids
        return chunk

    def _logprobs(self, token_ids: list[int], scores: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        return chat_logprobs(self._tokenizer, token_ids, scores)
