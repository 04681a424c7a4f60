"""POST /v1/chat/completions."""

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
from shoal.server.logprobs import chat_logprobs, prompt_logprobs
from shoal.server.prompts import tokenize_chat
from shoal.server.schema import request_body
from shoal.server.schema_chat import ChatRequest

PATH = "/v1/chat/completions"

router = APIRouter()


@router.post(PATH, openapi_extra=request_body(ChatRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, with the model's own chat template."""
    return await create(request, ENDPOINT)


@router.get(PATH + "/{response_id}")
async def get_chat_completion(request: Request, response_id: str) -> Response:
    """An answer begun before, whole or the rest of its stream."""
    return await come_back(request, ENDPOINT, response_id)


async def _tokenize(engine: AsyncEngine, asked: ChatRequest) -> list[list[int]]:
    return [await tokenize_chat(engine, asked.messages, asked.chat_template_kwargs)]


class ChatAnswer:
    """Puts the samples of one generation into OpenAI's form, whole or chunk by chunk."""

    def __init__(self, asked: ChatRequest, engine: AsyncEngine, accepted: Accepted) -> None:
        self._asked = asked
        self._tokenizer = engine.tokenizer
        self._gathered = Gathered(accepted)
        self._begun: set[int] = set()
        self._usage = {"usage": None} if asked.wants_stream_usage else {}
        self._base = {
            "id": accepted.response_id,
            "object": "chat.completion.chunk" if asked.stream else "chat.completion",
            "created": accepted.created_s,
            "model": engine.info.name,
        }

    @classmethod
    async def of(cls, engine: AsyncEngine, asked: ChatRequest, accepted: Accepted) -> ChatAnswer:
        return cls(asked, engine, accepted)

    def body(self, gathered: Gathered) -> dict[str, Any]:
        choices = [self._choice(index, sample) for index, sample in enumerate(gathered.samples)]
        body: dict[str, Any] = {**self._base, "choices": choices, "usage": gathered.usage()}
        prompt = gathered.prompts[0]
        if self._asked.prompt_logprobs is not None:
            scores = gathered.prompt_logprobs[0]
            body["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, prompt, scores, self._asked.prompt_logprobs
            )
        if self._asked.return_token_ids:
            body["prompt_token_ids"] = prompt
        return body

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any] | None]:
        self._gathered.add(index, delta)
        chunks: list[dict[str, Any] | None] = []
        if index not in self._begun:
            opening = self._opening(index, first=not self._begun)
            chunks.append({**self._base, **opening, **self._usage})
            self._begun.add(index)
        choice = self._chunk(index, delta)
        chunks.append(choice and {**self._base, "choices": [choice], **self._usage})
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        if not self._usage:
            return []
        return [{**self._base, "choices": [], "usage": self._gathered.usage()}]

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
            opening["prompt_token_ids"] = self._gathered.prompts[0]
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


ENDPOINT = Endpoint(
    path=PATH,
    prefix="chatcmpl",
    schema=ChatRequest,
    params=ChatRequest.params,
    tokenize=_tokenize,
    answer=ChatAnswer.of,
)
