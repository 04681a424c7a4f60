"""Over real sockets: the openai client, clients that leave, many streams at once, shutting down."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from threading import Thread
from typing import Any

import httpx
import openai
import pytest
from server_fakes import MODEL, FakeEngine, eventually, running_server

from shoal.errors import ConfigError, QueueFull
from shoal.server.run import bind, url_of

MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine("Hallo")


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with running_server(engine) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_openai_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=1, n=2
    )
    assert [choice.message.content for choice in answer.choices] == ["Hallo"] * 2
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    completion = client.completions.create(model=MODEL, prompt=["a", "b"], logprobs=1)
    assert [choice.text for choice in completion.choices] == ["Hallo"] * 2
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "shoal"


def test_the_openai_client_reads_its_base64(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input="abcd")
    assert answer.data[0].embedding == pytest.approx([4, 0.1, -2.5])


def test_the_openai_client_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ) as chunks:
        received = list(chunks)
    assert "".join(c.choices[0].delta.content or "" for c in received if c.choices) == "Hallo"
    assert received[-1].usage is not None
    with client.completions.create(model=MODEL, prompt="a", stream=True) as pieces:
        assert "".join(piece.choices[0].text for piece in pieces) == "Hallo"


def test_the_openai_client_raises_its_own_errors(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-9", prompt="a")
    assert unknown.value.code == "model_not_found"
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=MODEL, prompt="a", temperature=-1)
    engine.refusals = {0: QueueFull("too many wait")}
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt="a")


def test_the_openai_client_comes_back_to_a_full_queue(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.refusals = {0: QueueFull("too many wait", retry_after_s=1)}
    answer = client.with_options(max_retries=1).completions.create(model=MODEL, prompt="a")
    assert answer.choices[0].text == "Hallo"


def test_an_error_in_a_stream_reaches_the_openai_client(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.breaks = ZeroDivisionError()
    with (
        pytest.raises(openai.APIError, match="its log tells more"),
        client.completions.create(model=MODEL, prompt="a", stream=True) as pieces,
    ):
        list(pieces)


def test_the_asynchronous_openai_client(url: str) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
            assert answer.choices[0].message.content == "Hallo"
            async with await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True
            ) as chunks:
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    assert asyncio.run(ask()) == "Hallo"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_a_client_that_leaves_cancels_its_requests(
    url: str, engine: FakeEngine, stream: bool, prompt: Any
) -> None:
    engine.answers = ("x" * 150,)
    engine.delay_s = 0.02

    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 150, "stream": stream}
            asking = asyncio.create_task(client.post(f"{url}/v1/completions", json=body))
            await eventually(lambda: any(stream.num_read > 2 for stream in engine.streams))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await eventually(lambda: all(stream.cancelled for stream in engine.streams))

    asyncio.run(leave())
    assert all(stream.num_read < 100 for stream in engine.streams)
    text = httpx.get(f"{url}/metrics").text
    count = 2 if isinstance(prompt, list) else 1
    assert f'finish_reason="cancelled"}} {count}.0' in text


def test_a_client_that_leaves_cancels_its_embeddings(url: str, engine: FakeEngine) -> None:
    engine.delay_s = 30

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=0.2) as client:
            with pytest.raises(httpx.ReadTimeout):
                body = {"model": MODEL, "input": ["a", "b"]}
                await client.post(f"{url}/v1/embeddings", json=body)
        await eventually(lambda: engine.embeds_cancelled == 2)

    asyncio.run(leave())


def test_a_client_that_leaves_in_the_middle_of_its_body(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b'content-length: 100\r\n\r\n{"model"'
        )
    time.sleep(0.05)
    counted = 'endpoint="/v1/completions",status="499"} 1.0'
    assert counted in httpx.get(f"{url}/metrics").text


def test_a_body_too_large_is_refused_while_it_arrives() -> None:
    with running_server(FakeEngine(), max_body_bytes=100_000) as url:
        answer = httpx.post(
            f"{url}/v1/completions",
            content=(b"x" * 10_000 for _ in range(30)),
            headers={"content-type": "application/json"},
        )
    assert answer.status_code == 413


def test_a_client_that_asks_first_need_not_send_a_body_too_large(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"expect: 100-continue\r\ncontent-length: 9000000\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_two_hundred_streams_at_once_are_not_mixed_up(url: str, engine: FakeEngine) -> None:
    engine.delay_s = 0.005
    engine.answers = ("0123456789",)

    async def one(client: httpx.AsyncClient, number: int) -> tuple[int, str]:
        body = {
            "model": MODEL,
            "prompt": f"p{number}",
            "stream": True,
            "echo": True,
            "max_tokens": number % 10 + 1,
        }
        answer = await client.post(f"{url}/v1/completions", json=body)
        pieces = answer.text.split('"text":"')[1:]
        return answer.status_code, "".join(piece.split('"')[0] for piece in pieces)

    async def all_of_them() -> list[tuple[int, str]]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(limits=limits, timeout=30) as client:
            return await asyncio.gather(*(one(client, number) for number in range(200)))

    expected = [(200, f"p{n}" + "0123456789"[: n % 10 + 1]) for n in range(200)]
    assert asyncio.run(all_of_them()) == expected


def test_shutting_down_lets_open_streams_finish(engine: FakeEngine) -> None:
    engine.answers = ("x" * 20,)
    engine.delay_s = 0.02
    body = {"model": MODEL, "prompt": "a", "stream": True, "max_tokens": 50}
    with ExitStack() as server, httpx.Client() as client:
        url = server.enter_context(running_server(engine))
        with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            stopping = Thread(target=server.close)
            stopping.start()
            received = answer.read().decode()
        stopping.join()
    assert received.count('"text":"x"') == 20
    assert received.endswith("data: [DONE]\n\n")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_a_port_that_is_taken_is_named() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*--port"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 80), ("127.0.0.1", 70_000)])
def test_an_address_that_cannot_be(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=str(port)):
        bind(host, port)


def test_the_url_is_one_a_client_can_use() -> None:
    with bind("0.0.0.0", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
