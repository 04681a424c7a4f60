"""Asks a running server, over HTTP, what `shoal chaos` wants to know."""

from __future__ import annotations

import time
from typing import Any

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from shoal.cli.client import event_of, network_errors, raise_for_error
from shoal.errors import OperatorError, ShoalError
from shoal.evaluate.answers import Answer, AnsweredSample, Asked
from shoal.evaluate.chaos import OnTokens

# Long enough for what waits while the workers die twice a second.
_SILENCE_S = 300.0
_PATH = "/v1/completions"
_RECOVERIES = "shoal_recoveries_total"


def async_client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(_SILENCE_S, connect=10.0)
    return httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits)


class HttpAsker:
    """An `Asker`."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._url = str(client.base_url)
        self._model = model

    async def ask(self, asked: Asked, on_tokens: OnTokens) -> Answer:
        now_s = time.perf_counter()
        samples = [AnsweredSample() for _ in range(asked.params.n)]
        answer = Answer(sent_s=now_s, ended_s=now_s, samples=samples)
        body = body_of(asked, self._model)
        try:
            with network_errors(self._url):
                await (self._stream if asked.stream else self._whole)(body, answer, on_tokens)
        except ShoalError as error:
            answer.error = error.message
        answer.ended_s = time.perf_counter()
        return answer

    async def _whole(self, body: dict[str, Any], answer: Answer, on_tokens: OnTokens) -> None:
        response = await self._client.post(_PATH, json=body)
        raise_for_error(response)
        _take(response.json(), answer)
        on_tokens(answer.num_tokens)

    async def _stream(self, body: dict[str, Any], answer: Answer, on_tokens: OnTokens) -> None:
        last = ""
        async with self._client.stream("POST", _PATH, json=body) as response:
            if not response.is_success:
                await response.aread()
                raise_for_error(response)
            async for line in response.aiter_lines():
                last = line or last
                event = event_of(line)
                if event is not None:
                    on_tokens(_take(event, answer, arrived_s=time.perf_counter()))
        if last != "data: [DONE]":
            raise OperatorError(f"the stream ended with {last[:80]!r} in place of [DONE]")


def body_of(asked: Asked, model: str) -> dict[str, Any]:
    params = msgspec.to_builtins(asked.params)
    body = {**params, "model": model, "prompt": asked.prompt, "return_token_ids": True}
    body["stop"] = list(asked.params.stop)
    if asked.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def _take(body: dict[str, Any], answer: Answer, *, arrived_s: float | None = None) -> int:
    """Add what a body or an event says; how many tokens that is."""
    num_tokens = 0
    for choice in body["choices"]:
        sample = answer.samples[choice["index"]]
        token_ids = choice.get("token_ids") or []
        num_tokens += len(token_ids)
        sample.token_ids += token_ids
        sample.text += choice["text"]
        sample.logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
        sample.finish_reason = choice["finish_reason"] or sample.finish_reason
        sample.stop_match = choice.get("stop_reason")
        if arrived_s is not None:
            sample.arrivals_s.append(arrived_s)
        answer.prompt_logprobs += [
            entry["logprob"]
            for entries in choice.get("prompt_logprobs") or []
            for entry in (entries or {}).values()
        ]
    answer.num_output_tokens = (body.get("usage") or {}).get(
        "completion_tokens", answer.num_output_tokens
    )
    return num_tokens


async def recoveries(client: httpx.AsyncClient) -> dict[str, int]:
    """By "noticed by, outcome", since the server started."""
    with network_errors(str(client.base_url)):
        response = await client.get("/metrics")
    raise_for_error(response)
    found: dict[str, int] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            if sample.name == _RECOVERIES:
                key = f"{sample.labels['noticed_by']}, {sample.labels['outcome']}"
                found[key] = found.get(key, 0) + int(sample.value)
    return found
