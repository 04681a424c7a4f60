"""The real model behind the real server, asked by the real openai client, in float32.

Texts are compared exactly: a request's tokens depend on nothing that runs beside it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from server_fakes import eventually, running_server

from shoal.config import EngineConfig
from shoal.engine.local import start_engine
from shoal.engine.serving import ServingEngine

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m"
NUM_STREAMS = 200
BLOCK_BYTES = 16 * 2 * 30 * 3 * 64 * 4  # tokens, keys and values, layers, heads, width, float32
COUNTING = "1, 2, 3, 4, 5, 6, 7,"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


@contextmanager
def served(model: str = MODEL, **settings: Any) -> Iterator[tuple[ServingEngine, str]]:
    """An engine and the URL of its API."""
    engine = start_engine(EngineConfig(model=model, dtype="float32", **settings))
    try:
        with running_server(engine) as url:
            yield engine, f"{url}/v1"
    finally:
        engine.close()


@pytest.fixture(scope="module")
def main() -> Iterator[tuple[ServingEngine, str]]:
    with served(kv_memory_bytes=1200 * BLOCK_BYTES) as running:
        yield running


@pytest.fixture
def engine(main: tuple[ServingEngine, str]) -> ServingEngine:
    return main[0]


@pytest.fixture
def url(main: tuple[ServingEngine, str]) -> str:
    return main[1]


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def aclient(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


def complete(client: OpenAI, prompt: str | list[int], **options: Any) -> Any:
    options = {"model": MODEL, "temperature": 0, "max_tokens": 12} | options
    return client.completions.create(prompt=prompt, **options)


def text_of(client: OpenAI, prompt: str | list[int], **options: Any) -> str:
    return str(complete(client, prompt, **options).choices[0].text)


async def stream_text(client: AsyncOpenAI, prompt: str, **options: Any) -> tuple[str, int]:
    """A streamed completion's text and its number of tokens, as the stream's usage has it."""
    options = {"model": MODEL, "temperature": 0, "max_tokens": 12} | options
    chunks = await client.completions.create(
        prompt=prompt, stream=True, stream_options={"include_usage": True}, **options
    )
    text = ""
    async for chunk in chunks:
        text += "".join(choice.text for choice in chunk.choices)
    assert chunk.usage is not None
    return text, chunk.usage.completion_tokens


async def stream_all(url: str, prompts: list[str], **options: Any) -> list[tuple[str, int]]:
    async with aclient(url) as client:
        return await asyncio.gather(*(stream_text(client, p, **options) for p in prompts))


# ---- what one client gets -----------------------------------------------------------------


def test_chat_whole_streamed_and_async(client: OpenAI, url: str) -> None:
    asked: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    answer = client.chat.completions.create(**asked)
    text = answer.choices[0].message.content
    assert text is not None and "Paris" in text
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as chunks:
        *deltas, last = list(chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == text
    assert deltas[-1].choices[0].finish_reason == "stop"
    assert len(deltas) > 5
    streamed = last.usage
    assert streamed is not None
    assert (streamed.prompt_tokens, streamed.completion_tokens) == (
        usage.prompt_tokens,
        usage.completion_tokens,
    )

    async def ask() -> str | None:
        async with aclient(url) as awaited:
            answer = await awaited.chat.completions.create(**asked)
            return answer.choices[0].message.content

    assert asyncio.run(ask()) == text


def test_completions_whole_streamed_and_async(client: OpenAI, url: str) -> None:
    answer = complete(client, COUNTING)
    text = answer.choices[0].text
    assert text.startswith(" 8, 9, 10")
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (12, "length")
    with complete(client, COUNTING, stream=True) as chunks:
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert asyncio.run(stream_all(url, [COUNTING])) == [(text, 12)]


def test_several_prompts_are_answered_in_order(client: OpenAI) -> None:
    prompts = [COUNTING, "The capital of France is", "Monday, Tuesday, Wednesday,"]
    together = complete(client, prompts)
    assert [c.index for c in together.choices] == [0, 1, 2]
    assert [c.text for c in together.choices] == [text_of(client, prompt) for prompt in prompts]


def test_token_ids_as_prompt(client: OpenAI, engine: ServingEngine) -> None:
    assert text_of(client, engine.tokenizer.encode(COUNTING)) == text_of(client, COUNTING)


def test_chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    entries = choice.logprobs.content
    assert answer.usage is not None and len(entries) == answer.usage.completion_tokens
    spelled = b"".join(bytes(entry.bytes or []) for entry in entries)
    assert spelled.decode().removesuffix("<|im_end|>") == choice.message.content
    for entry in entries:
        logprobs = [top.logprob for top in entry.top_logprobs]
        assert len(logprobs) == 3 and logprobs == sorted(logprobs, reverse=True)
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, logprobs[0])
        assert sum(map(math.exp, logprobs)) <= 1 + 1e-5


def test_echo_scores_what_was_generated_as_it_was_when_generated(
    client: OpenAI, engine: ServingEngine
) -> None:
    drawn = complete(
        client, COUNTING, temperature=1, seed=5, logprobs=2, extra_body={"return_token_ids": True}
    )
    choice = drawn.choices[0]
    scores = choice.logprobs
    assert "".join(scores.tokens) == choice.text
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert choice.text.startswith(token, offset)
    tokens = choice.prompt_token_ids + choice.token_ids
    echoed = complete(client, tokens, echo=True, max_tokens=0, logprobs=2)
    assert echoed.choices[0].text == COUNTING + choice.text
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    again = echoed.choices[0].logprobs.token_logprobs[-len(choice.token_ids) :]
    assert again == pytest.approx(scores.token_logprobs, abs=1e-4)
    assert len(engine.tokenizer.encode(COUNTING)) == len(choice.prompt_token_ids)


def test_samples_of_a_seed(client: OpenAI) -> None:
    asked: Any = {"n": 3, "temperature": 1, "seed": 11, "max_tokens": 10}
    choices = complete(client, "Once upon a time", **asked).choices
    texts = [choice.text for choice in choices]
    assert len(set(texts)) == 3
    assert [c.text for c in complete(client, "Once upon a time", **asked).choices] == texts
    streamed = ["", "", ""]
    with complete(client, "Once upon a time", stream=True, **asked) as chunks:
        for chunk in chunks:
            streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    assert len({c.text for c in complete(client, COUNTING, n=3).choices}) == 1


def test_a_stop_string_across_tokens_never_leaks(client: OpenAI) -> None:
    answer = complete(client, COUNTING, stop="9, 10", max_tokens=40).choices[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (" 8, ", "stop", "9, 10")
    with complete(client, COUNTING, stop=["zebra", "9, 10"], max_tokens=40, stream=True) as chunks:
        assert "".join(chunk.choices[0].text for chunk in chunks) == " 8, "


def test_how_long_an_answer_is(client: OpenAI) -> None:
    def ask(max_tokens: int, **extra: Any) -> tuple[int, str]:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            temperature=0,
            max_tokens=max_tokens,
            extra_body=extra,
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens, answer.choices[0].finish_reason

    natural, reason = ask(60)
    assert (natural < 20, reason) == (True, "stop")
    assert ask(5) == (5, "length")
    assert ask(30, ignore_eos=True) == (30, "length")
    longer, _ = ask(60, min_tokens=natural + 5)
    assert longer >= natural + 5


def test_embeddings_of_a_decoder(client: OpenAI) -> None:
    inputs = ["The cat sleeps.", "A kitten is sleeping.", "The cat sleeps."]
    vectors = [item.embedding for item in client.embeddings.create(model=MODEL, input=inputs).data]
    assert [len(vector) for vector in vectors] == [576] * 3
    assert [math.hypot(*vector) for vector in vectors] == pytest.approx([1.0] * 3, abs=1e-5)
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-2)


def test_tokenize_and_back(url: str) -> None:
    text = "Grüße, 東京 🙂 <|im_end|>\n\tdef f(x): return x"
    with httpx.Client(base_url=url) as http:
        counted = http.post("/tokenize", json={"prompt": text}).json()
        assert counted["count"] == len(counted["tokens"])
        back = http.post("/detokenize", json={"tokens": counted["tokens"]}).json()
    assert back == {"prompt": text}


# ---- many at once -------------------------------------------------------------------------


def test_a_seed_means_the_same_text_alone_and_in_a_crowd(client: OpenAI, url: str) -> None:
    def asked(seed: int, max_tokens: int = 24) -> dict[str, Any]:
        return {"temperature": 1, "seed": seed, "max_tokens": max_tokens}

    prompt, seeds = "The old lighthouse keeper", (1, 2)
    alone = [text_of(client, prompt, **asked(seed)) for seed in seeds]
    assert text_of(client, prompt, **asked(1)) == alone[0]
    assert len(set(alone)) == 2

    async def in_a_crowd() -> list[str]:
        async with aclient(url) as many:
            crowd = [
                asyncio.create_task(
                    stream_text(many, f"Tale {i} begins" + " again" * i, **asked(100 + i, 20 + i))
                )
                for i in range(20)
            ]
            texts = await asyncio.gather(*(stream_text(many, prompt, **asked(s)) for s in seeds))
            assert not all(task.done() for task in crowd)
            await asyncio.gather(*crowd)
            return [text for text, _ in texts]

    assert asyncio.run(in_a_crowd()) == alone


def counting_from(first: int) -> str:
    return f"{first}, {first + 1}, {first + 2}, {first + 3},"


def test_two_hundred_streams_are_not_mixed_up(
    client: OpenAI, url: str, engine: ServingEngine
) -> None:
    firsts = [100 + 4 * number for number in range(NUM_STREAMS)]
    answers = asyncio.run(stream_all(url, [counting_from(first) for first in firsts]))
    for first, (text, num_tokens) in zip(firsts, answers, strict=True):
        assert (num_tokens, text.split(",")[0]) == (12, f" {first + 4}")
    # The model miscounts now and then: those answers, and some others, are asked for alone.
    numbers = {n for n in range(NUM_STREAMS) if f", {firsts[n] + 5}," not in answers[n][0]}
    assert len(numbers) < NUM_STREAMS / 10
    for number in numbers | set(range(0, NUM_STREAMS, 40)):
        assert text_of(client, counting_from(firsts[number])) == answers[number][0]
    asyncio.run(eventually(lambda: engine.stats().num_used_blocks == 0))


def test_a_client_that_leaves_frees_its_blocks(client: OpenAI, engine: ServingEngine) -> None:
    before = engine.stats()
    with complete(client, "Chapter one.", max_tokens=4000, stream=True) as chunks:
        for _ in range(5):
            next(chunks)
        assert engine.stats().num_used_blocks > 0
    asyncio.run(eventually(lambda: engine.stats().num_used_blocks == 0))
    assert engine.stats().num_running == 0
    assert engine.stats().generated_tokens - before.generated_tokens < 100
    assert text_of(client, COUNTING).startswith(" 8, 9")


def test_a_prompt_seen_before_is_not_computed_again(client: OpenAI, engine: ServingEngine) -> None:
    prompt = " ".join(f"Clause {number} shall hold." for number in range(40))
    num_prompt = len(engine.tokenizer.encode(prompt))
    first, second = complete(client, prompt), complete(client, prompt)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= num_prompt - 16
    assert first.choices[0].text == second.choices[0].text


# ---- little memory, short queues, another kind of model -----------------------------------


def test_preempted_requests_end_with_the_text_of_a_calm_run(url: str) -> None:
    prompts = [f"{number} bears lived {'many years ago ' * 8}" for number in range(2, 10)]
    asked: Any = {"max_tokens": 28, "temperature": 0.8, "seed": 3}
    asked["extra_body"] = {"ignore_eos": True}
    calm = asyncio.run(stream_all(url, prompts, **asked))
    with served(kv_memory_bytes=20 * BLOCK_BYTES) as (engine, small_url):
        assert engine.stats().num_blocks == 20
        assert asyncio.run(stream_all(small_url, prompts, **asked)) == calm
        assert engine.stats().preemptions > 0
        assert engine.stats().num_used_blocks == 0
    assert {num_tokens for _, num_tokens in calm} == {28}


def test_a_full_queue_is_429_with_retry_after() -> None:
    async def overload(engine: ServingEngine, url: str) -> openai.RateLimitError:
        async with aclient(url) as client:
            first = asyncio.create_task(stream_text(client, "One", max_tokens=30))
            await eventually(lambda: engine.stats().num_running == 1)
            second = asyncio.create_task(stream_text(client, "Two", max_tokens=8))
            await eventually(lambda: engine.stats().num_waiting == 1)
            with pytest.raises(openai.RateLimitError) as refused:
                await stream_text(client, "Three")
            assert [num_tokens for _, num_tokens in await asyncio.gather(first, second)] == [30, 8]
            await stream_text(client, "Three")
            return refused.value

    settings: Any = {"max_running": 1, "max_waiting": 1, "kv_memory_bytes": 40 * BLOCK_BYTES}
    with served(**settings) as (engine, url):
        refusal = asyncio.run(overload(engine, url))
    assert int(refusal.response.headers["retry-after"]) >= 1
    assert (refusal.code, refusal.type) == ("queue_full", "rate_limit_error")


def cosine(one: list[float], other: list[float]) -> float:
    """Of vectors of length 1."""
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_sentences_of_like_meaning_are_near_each_other() -> None:
    with (
        served("minilm-l6") as (_, url),
        OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        inputs = ["A man is eating food.", "Someone has a meal.", "The stock market fell today."]
        answer = client.embeddings.create(model="minilm-l6", input=inputs)
        meal, same, unrelated = (item.embedding for item in answer.data)
        assert len(meal) == 384
        assert [math.hypot(*v) for v in (meal, same, unrelated)] == pytest.approx([1] * 3, abs=1e-5)
        assert cosine(meal, same) > 0.5 > 0.2 > cosine(meal, unrelated)
        with pytest.raises(openai.BadRequestError, match="generate"):
            client.completions.create(model="minilm-l6", prompt="Hello")
