"""The head is killed in mid-stream and started again: every client gets the rest of its answer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m"
SHOAL = Path(sys.executable).parent / "shoal"
COMPLETIONS = "/v1/completions"
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "The capital of France is", "temperature": 0},
    {"prompt": "Once upon a time", "temperature": 0.9, "seed": 7},
    {"prompt": "A list of colours: red,", "temperature": 0.7, "seed": 8, "frequency_penalty": 0.4},
    {"prompt": "1, 2, 3, 4,", "temperature": 0, "logprobs": 1, "stop": ["25,"]},
]
NUM_TOKENS = 60


@dataclass
class Client:
    """What one client has read: the place it has come to, its text, and its tokens if asked."""

    text: str = ""
    place: str | None = None
    tokens: list[str] = field(default_factory=list)
    is_done: bool = False

    def read(self, lines: Iterator[str]) -> None:
        for line in lines:
            if line.startswith("id: "):
                self.place = line.removeprefix("id: ")
            elif line == "data: [DONE]":
                self.is_done = True
            elif line.startswith("data: "):
                self.hear(json.loads(line.removeprefix("data: ")))

    def hear(self, chunk: dict[str, Any]) -> None:
        assert "error" not in chunk, chunk
        [choice] = chunk["choices"]
        self.text += choice["text"]
        if choice.get("logprobs"):
            self.tokens += choice["logprobs"]["tokens"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def head(port: int, state: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`shoal serve`, ready."""
    command = [str(SHOAL), "serve", MODEL, "--port", str(port)]
    options = ["--state", str(state), "--dtype", "float32", "--kv-memory", "256MiB"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command + options, env=environ)
    try:
        wait_until_ready(process, port)
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    limit_s = time.monotonic() + 120
    while time.monotonic() < limit_s:
        assert process.poll() is None, "it ended"
        with suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError("it is not ready after two minutes")


def asked(request: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": NUM_TOKENS, **request, **changes}


def stream(url: str, request: dict[str, Any], client: Client) -> None:
    with suppress(httpx.HTTPError), httpx.Client(timeout=120) as http:
        body = asked(request, stream=True)
        with http.stream("POST", url + COMPLETIONS, json=body) as answer:
            client.read(answer.iter_lines())


def stream_by_openai(url: str, request: dict[str, Any]) -> tuple[str, str]:
    """The response's id and the text so far; that client shows nobody the places it is told."""
    response_id, text = "", ""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
    with client, suppress(openai.APIError, httpx.HTTPError):
        for chunk in client.completions.create(stream=True, **asked(request)):
            response_id, text = chunk.id, text + chunk.choices[0].text
    return response_id, text


def come_back(url: str, client: Client) -> None:
    assert client.place is not None
    headers = {"Last-Event-ID": client.place}
    with httpx.stream("POST", url + COMPLETIONS, headers=headers, timeout=120) as answer:
        assert answer.status_code == 200, answer.read()
        client.read(answer.iter_lines())


def ask_until_answered(url: str, request: dict[str, Any]) -> str:
    """As the openai client does by itself, if it is told a key and enough retries."""
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120) as client:
        for _ in range(600):
            with suppress(openai.APIConnectionError, openai.InternalServerError):
                answer = client.with_options(max_retries=0).completions.create(
                    extra_headers=headers, **asked(request)
                )
                return answer.choices[0].text
            time.sleep(0.1)
    raise AssertionError("no answer in a minute")


def calm_texts(url: str) -> list[Client]:
    calm = [Client() for _ in REQUESTS]
    for client, request in zip(calm, REQUESTS, strict=True):
        stream(url, request, client)
        assert client.is_done
    return calm


def test_a_head_that_dies_in_mid_stream_and_comes_back(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    clients = [Client() for _ in REQUESTS]
    whole = {"prompt": "The opposite of hot is", "temperature": 0}
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(REQUESTS) + 2))
        with head(port, tmp_path) as process:
            calm = calm_texts(url)
            calm_whole = ask_until_answered(url, whole)
            streams = [
                pool.submit(stream, url, request, client)
                for request, client in zip(REQUESTS, clients, strict=True)
            ]
            by_openai = pool.submit(stream_by_openai, url, REQUESTS[0])
            waiting = pool.submit(ask_until_answered, url, whole)
            while not all(len(client.text) > 20 for client in clients):
                time.sleep(0.01)
            assert not any(client.is_done for client in clients)
            process.send_signal(signal.SIGKILL)
            process.wait()
        for future in streams:
            future.result()
        assert not any(client.is_done for client in clients)
        stack.enter_context(head(port, tmp_path))
        for client in clients:
            come_back(url, client)
        assert waiting.result() == calm_whole
        response_id, text = by_openai.result()
        answer = httpx.get(f"{url}{COMPLETIONS}/{response_id}", timeout=120).json()
        assert answer["choices"][0]["text"] == calm[0].text
        assert calm[0].text.startswith(text)
        assert 0 < len(text) < len(calm[0].text)
        assert [client.text for client in clients] == [client.text for client in calm]
        assert [client.tokens for client in clients] == [client.tokens for client in calm]
        assert all(client.is_done for client in clients)
