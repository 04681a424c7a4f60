"""The two things `shoal bench` measures: a model in this process, and a running server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx

from shoal.cli.client import TIMEOUT, event_of, network_errors, raise_for_error
from shoal.errors import ConfigError
from shoal.evaluate.load import Piece, Prompt
from shoal.request import SamplingParams

if TYPE_CHECKING:
    from shoal.llm import LLM

HTTP_NOT_FOUND = 404


class EngineTarget:
    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    async def tokenize(self, text: str) -> list[int]:
        return self._llm.tokenizer.encode(text, add_special=False)

    async def answer(self, prompt: Prompt, max_tokens: int) -> AsyncIterator[Piece]:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        num_tokens, num_cached = 0, 0
        async for delta in self._llm.stream(prompt, params):
            num_tokens += len(delta.token_ids)
            num_cached = num_cached or delta.num_cached_tokens
            yield Piece(has_tokens=bool(delta.token_ids))
        yield Piece(has_tokens=False, num_output_tokens=num_tokens, num_cached_tokens=num_cached)


class ServerTarget:
    """Token ids in, so that prompts have exact lengths; the server counts what came out."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._url = str(client.base_url)
        self._model = model

    async def tokenize(self, text: str) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        with network_errors(self._url):
            response = await self._client.post("/v1/tokenize", json=body)
        if response.status_code == HTTP_NOT_FOUND:
            raise ConfigError(
                f"{self._url} has no /v1/tokenize, so prompts of exact lengths cannot be made: "
                "'shoal bench' measures Shoal's own server"
            )
        raise_for_error(response)
        return [int(token) for token in response.json()["tokens"]]

    async def answer(self, prompt: Prompt, max_tokens: int) -> AsyncIterator[Piece]:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            # Tokens without text (special ones, halves of a character) come as events too.
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        with network_errors(self._url):
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if not response.is_success:
                    await response.aread()
                    raise_for_error(response)
                async for line in response.aiter_lines():
                    event = event_of(line)
                    if event is not None:
                        yield _piece(event)


def async_client(url: str) -> httpx.AsyncClient:
    # httpx's own limit of 100 connections would queue requests where nobody sees it.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits)


def _piece(event: dict[str, Any]) -> Piece:
    usage = event.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    token_ids = [token for choice in event["choices"] for token in choice.get("token_ids") or []]
    return Piece(
        has_tokens=bool(token_ids),
        token_ids=token_ids,
        num_prompt_tokens=usage.get("prompt_tokens"),
        num_cached_tokens=details.get("cached_tokens"),
        num_output_tokens=usage.get("completion_tokens"),
    )
