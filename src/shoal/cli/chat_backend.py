"""The two places a chat's answers come from: a model in this process, or a running server."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from shoal.cli.client import TIMEOUT, event_of, network_errors, raise_for_error, served_model
from shoal.cli.conversation import Message
from shoal.request import SamplingParams

if TYPE_CHECKING:
    from shoal.llm import LLM

HTTP_NOT_FOUND = 404


class ChatBackend(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def max_context(self) -> int | None:
        """In tokens; None when it is not known."""
        ...

    def num_tokens(self, messages: list[Message]) -> int | None:
        """Of the prompt these messages make; None when nobody can tell."""
        ...

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        """Pieces of the answer; closing the iterator stops it. Raises ShoalError."""
        ...


class LocalBackend:
    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm = llm
        self._params = params

    @property
    def name(self) -> str:
        return self._llm.info.name

    @property
    def max_context(self) -> int | None:
        return self._llm.info.max_context

    def num_tokens(self, messages: list[Message]) -> int | None:
        return len(self._tokens(messages))

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        deltas = self._llm.stream_sync(self._tokens(messages), self._params)
        with closing(deltas):  # type: ignore[type-var]
            for delta in deltas:
                yield delta.text

    def _tokens(self, messages: list[Message]) -> list[int]:
        text = self._llm.tokenizer.apply_chat_template(messages)
        return self._llm.tokenizer.encode(text, add_special=False)


class RemoteBackend:
    """Close it with the client it was given. Raises ConfigError when nothing answers."""

    def __init__(self, client: httpx.Client, model: str | None, params: SamplingParams) -> None:
        self._client = client
        self._url = str(client.base_url)
        with network_errors(self._url):
            self._model = served_model(client, model)
        self._options = {
            "model": self._model.name,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
            "max_tokens": params.max_tokens,
        }

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def max_context(self) -> int | None:
        return self._model.max_context

    def num_tokens(self, messages: list[Message]) -> int | None:
        with network_errors(self._url):
            response = self._client.post("/v1/tokenize", json={"messages": messages})
        if response.status_code == HTTP_NOT_FOUND:
            return None
        raise_for_error(response)
        return int(response.json()["count"])

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        body: dict[str, Any] = {**self._options, "messages": messages, "stream": True}
        with (
            network_errors(self._url),
            self._client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if not response.is_success:
                response.read()
                raise_for_error(response)
            for line in response.iter_lines():
                event = event_of(line)
                for choice in event["choices"] if event else ():
                    yield choice["delta"].get("content") or ""


def http_client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=TIMEOUT)
