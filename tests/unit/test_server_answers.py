"""What the endpoints answer to right requests, field by field, over the fake engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from server_fakes import CONTEXT, EOS, MODEL, FakeEngine
from starlette.testclient import TestClient

from shoal.engine.api import Health
from shoal.errors import EngineStopped
from shoal.server.app import create_app


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine("Hallo", "Welt!")


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(engine)) as client:
        yield client


def complete(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"model": MODEL, "prompt": "ab"} | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def chat(client: TestClient, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": MODEL, "messages": messages} | fields
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def stream(client: TestClient, path: str, **fields: Any) -> list[Any]:
    """The decoded events, with the last as the string it is."""
    start = {"prompt": "ab"} if path == "completions" else {}
    chat_start = {"messages": [{"role": "user", "content": "hi"}]}
    body = {"model": MODEL, "stream": True} | (start or chat_start) | fields
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = answer.text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    datas = [line.removeprefix("data: ") for line in lines]
    assert datas[-1] == "[DONE]"
    return [json.loads(data) for data in datas[:-1]]


def test_a_completion(client: TestClient, engine: FakeEngine) -> None:
    body = complete(client)
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == MODEL
    [choice] = body["choices"]
    assert choice == {
        "index": 0,
        "text": "Hallo",
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": EOS,
    }
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    [(prompt, params, priority)] = engine.submitted
    assert (prompt, params.max_tokens, params.temperature, priority) == ([97, 98], 16, 1.0, 0)


def test_every_sampling_field_reaches_the_engine(client: TestClient, engine: FakeEngine) -> None:
    asked = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 1,
        "seed": -7,
        "n": 2,
        "max_tokens": 9,
        "min_tokens": 2,
        "ignore_eos": True,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "skip_special_tokens": False,
    }
    others = {"stop": "x", "stop_token_ids": [4], "logit_bias": {"5": -100}, "priority": -3}
    complete(client, **asked, **others)
    _, params, priority = engine.submitted[0]
    assert {name: getattr(params, name) for name in asked} == asked
    assert (params.stop, params.stop_token_ids) == (("x",), (4,))
    assert (params.logit_bias, priority) == ({5: -100.0}, -3)


def test_many_prompts_with_many_samples(client: TestClient) -> None:
    body = complete(client, prompt=["a", "bcd"], n=2)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == ["Hallo", "Welt!"] * 2
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize("prompt", [[97, 98], [[97, 98]], ["ab"], "ab"])
def test_all_forms_of_a_prompt(client: TestClient, engine: FakeEngine, prompt: Any) -> None:
    body = complete(client, prompt=prompt, return_token_ids=True, max_tokens=1)
    [choice] = body["choices"]
    assert choice["prompt_token_ids"] == engine.submitted[0][0] == [97, 98]
    assert choice["token_ids"] == [ord("H")]
    assert choice["finish_reason"] == "length"


def test_the_best_of_two(client: TestClient) -> None:
    body = complete(client, best_of=2)
    assert [choice["text"] for choice in body["choices"]] == ["Welt!"]
    assert body["choices"][0]["index"] == 0
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 10


def test_legacy_logprobs(client: TestClient) -> None:
    [choice] = complete(client, logprobs=2, max_tokens=2)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["H", "a"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"H": -0.5, "A": -1.5}, {"a": -0.5, "A": -1.5}],
        "text_offset": [0, 1],
    }


def test_scoring_a_prompt_draws_no_token(client: TestClient, engine: FakeEngine) -> None:
    body = complete(client, prompt="é!", echo=True, max_tokens=0, logprobs=1)
    [choice] = body["choices"]
    assert choice["text"] == "é!"
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None, -1.0, -9999.0]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][2] == {"X": -0.125, "!": -9999.0}
    assert logprobs["text_offset"] == [0, 1, 1]
    assert len(logprobs["tokens"]) == 3
    assert body["usage"]["completion_tokens"] == 0
    assert engine.submitted[0][1].max_tokens == 1


def test_echo_puts_the_prompt_before_the_answer(client: TestClient) -> None:
    [choice] = complete(client, prompt=[97, 98], echo=True, logprobs=0, max_tokens=1)["choices"]
    assert choice["text"] == "abH"
    assert choice["logprobs"]["tokens"] == ["a", "b", "H"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": -1.0}, {"H": -0.5}]


def test_prompt_logprobs(client: TestClient) -> None:
    [choice] = complete(client, prompt_logprobs=1)["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "88": {"logprob": -0.125, "decoded_token": "X"},
            "98": {"logprob": -1.0, "decoded_token": "b"},
        },
    ]
    assert chat(client, prompt_logprobs=0)["prompt_logprobs"][0] is None


def test_a_streamed_completion(client: TestClient) -> None:
    chunks = stream(client, "completions", echo=True, stream_options={"include_usage": True})
    *body, usage = chunks
    assert "".join(chunk["choices"][0]["text"] for chunk in body) == "abHallo"
    assert [chunk["choices"][0]["finish_reason"] for chunk in body] == [None] * 4 + ["stop"]
    assert all(chunk["usage"] is None for chunk in body)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 7
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_streamed_legacy_logprobs_keep_counting_characters(client: TestClient) -> None:
    chunks = stream(client, "completions", logprobs=0)
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert offsets == [[0], [1], [2], [3], [4]]


def test_streaming_a_scored_prompt(client: TestClient) -> None:
    [chunk] = stream(client, "completions", echo=True, max_tokens=0)
    assert chunk["choices"][0]["text"] == "ab"
    assert chunk["choices"][0]["finish_reason"] == "length"


def test_streams_of_many_prompts_are_told_apart(client: TestClient) -> None:
    chunks = stream(client, "completions", prompt=["a", "b"], n=2, return_token_ids=True)
    texts = {index: "" for index in range(4)}
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "Hallo", 1: "Welt!", 2: "Hallo", 3: "Welt!"}
    prompts = [c["choices"][0].get("prompt_token_ids") for c in chunks]
    assert sorted(p for p in prompts if p) == [[97], [97], [98], [98]]


def test_a_chat_answer(client: TestClient, engine: FakeEngine) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "name": "Ada", "content": [{"type": "text", "text": "a"}] * 2},
        {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None},
        {"role": "tool", "content": "c", "tool_call_id": "1"},
    ]
    body = chat(client, messages=messages, chat_template_kwargs={"mood": "glad"})
    assert body["object"] == "chat.completion"
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hallo", "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt, params, _ = engine.submitted[0]
    expected = "<system>be kind<user>a\na<assistant>b<tool>c[glad]<assistant>"
    assert bytes(prompt).decode() == expected
    assert params.max_tokens is None


def test_chat_logprobs(client: TestClient) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 1}
    [choice] = chat(client, **fields)["choices"]
    assert choice["logprobs"]["content"] == [
        {
            "token": "H",
            "logprob": -0.5,
            "bytes": [72],
            "top_logprobs": [
                {"token": "H", "logprob": -0.5, "bytes": [72]},
                {"token": "A", "logprob": -1.5, "bytes": [65]},
            ],
        }
    ]


def test_a_streamed_chat(client: TestClient) -> None:
    chunks = stream(
        client, "chat/completions", n=2, logprobs=True, stream_options={"include_usage": True}
    )
    *body, usage = chunks
    by_index: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in body:
        assert chunk["object"] == "chat.completion.chunk"
        [choice] = chunk["choices"]
        by_index[choice["index"]].append(choice)
    for index, text in enumerate(["Hallo", "Welt!"]):
        first, *rest = by_index[index]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"]["content"] for choice in rest) == text
        assert [choice["finish_reason"] for choice in rest] == [None] * 4 + ["stop"]
        assert all(len(choice["logprobs"]["content"]) == 1 for choice in rest)
    assert usage["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("error", [EngineStopped("lost"), ZeroDivisionError("a secret")])
def test_an_error_after_the_first_byte_is_an_event(
    client: TestClient, engine: FakeEngine, path: str, error: Exception
) -> None:
    engine.breaks = error
    *_, last = stream(client, path)
    assert last["error"]["type"] in ("service_unavailable_error", "server_error")
    assert "secret" not in last["error"]["message"]
    assert engine.streams[0].cancelled
    assert 'finish_reason="failed"' in client.get("/metrics").text


def test_embeddings(client: TestClient) -> None:
    body = {"model": MODEL, "input": ["a", "bcd"], "dimensions": 3, "user": "me"}
    answer = client.post("/v1/embeddings", json=body).json()
    assert [item["embedding"] for item in answer["data"]] == [[1, 0.1, -2.5], [3, 0.1, -2.5]]
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


def test_tokens_there_and_back(client: TestClient) -> None:
    answer = client.post("/v1/tokenize", json={"prompt": "hé"}).json()
    assert answer == {"tokens": [104, 195, 169], "count": 3, "max_model_len": CONTEXT}
    back = client.post("/v1/detokenize", json={"model": MODEL, "tokens": answer["tokens"]})
    assert back.json() == {"prompt": "hé"}
    asked = {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}
    assert client.post("/v1/tokenize", json=asked).json()["count"] == len("<user>x")


def test_long_text_is_tokenised_like_short(client: TestClient) -> None:
    assert client.post("/v1/tokenize", json={"text": "x" * 50_000}).json()["count"] == 50_000


def test_models(client: TestClient) -> None:
    [model] = client.get("/v1/models").json()["data"]
    assert model["id"] == MODEL
    assert model["max_model_len"] == CONTEXT
    assert client.get(f"/v1/models/{MODEL}").json() == model


def test_health_fails_when_work_cannot_progress(client: TestClient, engine: FakeEngine) -> None:
    answer = client.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {
        "ok": True,
        "live": True,
        "ready": True,
        "progressing": True,
        "reason": "",
        "since_progress_s": 0.5,
        "waiting": 3,
        "running": 2,
        "journal": None,
        "replicas": {},
    }
    engine.state = Health(progressing=False, reason="no step for 31 s", since_progress_s=31)
    answer = client.get("/health")
    assert answer.status_code == 503
    assert answer.json()["reason"] == "no step for 31 s"


@pytest.mark.parametrize(
    ("sign", "path"), [("live", "live"), ("ready", "ready"), ("progressing", "progress")]
)
def test_each_probe_asks_one_question(
    client: TestClient, engine: FakeEngine, sign: str, path: str
) -> None:
    signs = {"live": True, "ready": True, "progressing": True}
    assert client.get(f"/health/{path}").json() == {sign: True, "reason": ""}
    engine.state = Health(**signs | {sign: False}, reason="why", since_progress_s=0)
    answer = client.get(f"/health/{path}")
    assert (answer.status_code, answer.json()) == (503, {sign: False, "reason": "why"})
    others = {"live", "ready", "progress"} - {path}
    assert {client.get(f"/health/{other}").status_code for other in others} == {200}
    assert client.get("/health").json()[sign] is False


def test_health_tells_replicas_apart(client: TestClient, engine: FakeEngine) -> None:
    ill = Health(ready=False, reason="recovering for 3 s: w1 is lost", since_progress_s=3)
    engine.state = Health(reason="", since_progress_s=0, replicas={"r1": ill})
    replicas = client.get("/health").json()["replicas"]
    assert replicas["r1"]["reason"] == "recovering for 3 s: w1 is lost"
    assert (replicas["r1"]["live"], replicas["r1"]["ready"]) == (True, False)


def test_metrics_count_what_happened(client: TestClient) -> None:
    chat(client, n=2)
    client.get("/made/up/path")
    client.get("/v1/models/made-up")
    text = client.get("/metrics").text
    for line in (
        'shoal_http_responses_total{endpoint="/v1/chat/completions",status="200"} 1.0',
        'shoal_http_responses_total{endpoint="other",status="404"} 1.0',
        'shoal_http_responses_total{endpoint="/v1/models/{name}",status="404"} 1.0',
        'shoal_samples_total{endpoint="/v1/chat/completions",finish_reason="stop"} 2.0',
        "shoal_time_to_first_token_seconds_count 2.0",
        "shoal_inter_token_seconds_count 8.0",
        "shoal_request_seconds_count 1.0",
        "shoal_prompt_length_tokens_sum 19.0",
        "shoal_generation_length_tokens_sum 10.0",
        "shoal_num_waiting 3.0",
        "shoal_steps_total 7.0",
        "shoal_kv_usage_ratio 0.4",
    ):
        assert line in text


def test_two_apps_do_not_share_their_numbers(client: TestClient) -> None:
    complete(client)
    with TestClient(create_app(FakeEngine())) as other:
        assert "shoal_request_seconds_count 0.0" in other.get("/metrics").text


def test_the_docs_need_no_other_host(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "curl" in page
    assert MODEL in page
    for line in page.splitlines():
        assert "http" not in line or "http://testserver" in line
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/health"}
    assert "$ref" not in json.dumps(schema["paths"]["/v1/chat/completions"]["post"]["requestBody"])
    assert client.get("/").json()["docs"] == "http://testserver/docs"
