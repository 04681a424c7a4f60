"""Every kind of wrong request gets OpenAI's error form, the right status and a useful message."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from server_fakes import MODEL, FakeEngine
from starlette.testclient import TestClient

from shoal.errors import EngineStopped, OperatorError, QueueFull
from shoal.server.app import create_app

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine("Hallo")


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, max_body_bytes=10_000)) as client:
        yield client


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hi"} | fields


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return dict(body["error"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model": "x"} extra', "not valid JSON"),
        (b'{"model": NaN}', "not valid JSON"),
        (b'{"temperature": Infinity}', "not valid JSON"),
        (b'{"temperature": 1e999}', "not valid JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', "UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "\\udc00 x"}', "surrogate"),
        (b"[" * 9000, "nested too deeply"),
        (b"[]", "must be a JSON object, got an array"),
        (b"3", "must be a JSON object, got a number"),
        (b"null", "must be a JSON object, got null"),
    ],
)
def test_bytes_that_are_no_json_object(client: TestClient, body: bytes, words: str) -> None:
    error = error_of(client.post(CHAT, content=body, headers=JSON), 400)
    assert words in error["message"]
    assert error["code"] == "invalid_json"


def test_other_content_types_are_told_which_to_send(client: TestClient) -> None:
    error = error_of(client.post(CHAT, data={"model": MODEL}), 415)
    assert "application/json" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": -0.1}, "temperature", "[0.0, 100.0]"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"temperature": True}, "temperature", "number"),
        ({"temperature": 10**400}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "(0.0, 1.0]"),
        ({"top_p": 1.5}, "top_p", "1.5"),
        ({"min_p": -1}, "min_p", "-1"),
        ({"top_k": -2}, "top_k", "-2"),
        ({"top_k": 1.5}, "top_k", "integer"),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"max_tokens": -5}, "max_tokens", "-5"),
        ({"max_tokens": 10**30}, "max_tokens", "less than"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "more than max_tokens"),
        ({"n": 0}, "n", "0"),
        ({"n": 1000}, "n", "128"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": [1]}, "stop", "string"),
        ({"stop": ""}, "stop", "1 to"),
        ({"presence_penalty": 3}, "presence_penalty", "[-2.0, 2.0]"),
        ({"repetition_penalty": 0}, "repetition_penalty", "(0.0"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]", "101"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        ({"logit_bias": {"٣": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": [1]}, "logit_bias", "dict"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]", "integer"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"stream_options": {"usage": True}, "stream": True}, "stream_options.usage", "unknown"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        ({"model": None}, "model", "missing"),
        ({"model": 7}, "model", "string"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"zzz": None}, "zzz", "unknown field"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_parameters_out_of_type_or_range(
    client: TestClient, path: str, fields: dict[str, Any], param: str, words: str
) -> None:
    body = chat(**fields) if path == CHAT else completion(**fields)
    error = error_of(client.post(path, json=body), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([], "messages", "at least 1"),
        ("hi", "messages", "list"),
        ([7], "messages[0]", "got 7"),
        ([{"role": "user"}], "messages[0].content", "missing"),
        ([{"content": "x"}], "messages[0].role", "missing"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role", "'developer'"),
        ([{"role": "user", "content": 5}], "messages[0].content", "text parts"),
        ([{"role": "user", "content": "x", "nme": "y"}], "messages[0].nme", "unknown field"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content",
            "reads text only",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content", "text part"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}],
            "messages[0].tool_calls",
            "not supported",
        ),
        ([{"role": "user", "content": "refuse me"}], "messages", "template refuses"),
    ],
)
def test_messages(client: TestClient, messages: Any, param: str, words: str) -> None:
    error = error_of(client.post(CHAT, json=chat(messages=messages)), 400)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"functions": [{}]},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"web_search_options": {}},
    ],
)
def test_what_is_not_supported_says_so(client: TestClient, fields: dict[str, Any]) -> None:
    error = error_of(client.post(CHAT, json=chat(**fields)), 400)
    assert error["code"] == "unsupported_parameter"
    assert error["param"] in fields
    assert "not supported" in error["message"]


def test_fields_that_ask_for_nothing_are_accepted(client: TestClient) -> None:
    harmless = {
        "user": "u",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "functions": None,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "reasoning_effort": "low",
        "verbosity": "low",
        "prediction": None,
        "seed": None,
        "temperature": None,
        "stop": None,
        "max_tokens": 3.0,
        "top_p": 1,
    }
    assert client.post(CHAT, json=chat(**harmless)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "empty"),
        ({"prompt": [[1], []]}, "prompt", "empty"),
        ({"prompt": [1, True]}, "prompt", "token ids"),
        ({"prompt": [1.5]}, "prompt", "token ids"),
        ({"prompt": {"a": 1}}, "prompt", "token ids"),
        ({"prompt": [-1]}, "prompt", "vocabulary"),
        ({"prompt": [10**30]}, "prompt", "vocabulary"),
        ({"prompt": ["a"] * 2049}, "prompt", "2048"),
        ({"best_of": 1, "n": 2}, "best_of", "less than n"),
        ({"best_of": 2, "stream": True}, "best_of", "stream"),
        ({"echo": True, "logprobs": 1, "stream": True}, "logprobs", "stream"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"suffix": "end"}, "suffix", "not supported"),
    ],
)
def test_completion_fields(
    client: TestClient, fields: dict[str, Any], param: str, words: str
) -> None:
    error = error_of(client.post(COMPLETIONS, json=completion(**fields)), 400)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_chat_fields(client: TestClient, fields: dict[str, Any], param: str) -> None:
    assert error_of(client.post(CHAT, json=chat(**fields)), 400)["param"] == param


def test_a_missing_prompt_and_missing_messages(client: TestClient) -> None:
    assert error_of(client.post(CHAT, json={"model": MODEL}), 400)["param"] == "messages"
    assert error_of(client.post(COMPLETIONS, json={"model": MODEL}), 400)["param"] == "prompt"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_unknown_model_is_told_the_one_there_is(client: TestClient, path: str) -> None:
    body = chat(model="gpt-9") if path == CHAT else completion(model="gpt-9")
    error = error_of(client.post(path, json=body), 404)
    assert error["code"] == "model_not_found"
    assert MODEL in error["message"]
    assert error_of(client.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context(client: TestClient, stream: bool) -> None:
    answer = client.post(COMPLETIONS, json=completion(prompt="x" * 300, stream=stream))
    error = error_of(answer, 400)
    assert error["code"] == "context_length_exceeded"
    assert "300" in error["message"]
    assert "200" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_says_when_to_come_back(
    client: TestClient, engine: FakeEngine, stream: bool
) -> None:
    engine.refusals = {0: QueueFull("too many wait", retry_after_s=2.3)}
    answer = client.post(COMPLETIONS, json=completion(stream=stream))
    assert error_of(answer, 429)["type"] == "rate_limit_error"
    assert answer.headers["retry-after"] == "3"


def test_a_stopped_engine_is_worth_a_retry(client: TestClient, engine: FakeEngine) -> None:
    engine.refusals = {0: EngineStopped("going down")}
    answer = client.post(CHAT, json=chat())
    error_of(answer, 503)
    assert answer.headers["retry-after"] == "1"


def test_a_refusal_in_a_list_cancels_the_others(client: TestClient, engine: FakeEngine) -> None:
    engine.refusals = {2: QueueFull("too many wait")}
    error_of(client.post(COMPLETIONS, json=completion(prompt=["a", "b", "c", "d"])), 429)
    assert [stream.cancelled for stream in engine.streams] == [True, True]


def test_a_model_that_cannot_generate() -> None:
    with TestClient(create_app(FakeEngine(can_generate=False))) as client:
        assert "encoder" in error_of(client.post(COMPLETIONS, json=completion()), 400)["message"]


def test_a_model_without_a_chat_template(client: TestClient, engine: FakeEngine) -> None:
    engine.tokenizer.has_chat_template = False
    assert "/v1/completions" in error_of(client.post(CHAT, json=chat()), 400)["message"]


def test_an_unexpected_exception_stays_in_the_log(
    client: TestClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refusals = {0: ZeroDivisionError("a secret path")}
    answer = client.post(CHAT, json=chat(), headers={"x-request-id": "mine-7"})
    error = error_of(answer, 500)
    assert "secret" not in answer.text
    assert "mine-7" in error["message"]
    assert answer.headers["x-request-id"] == "mine-7"
    assert "mine-7" in caplog.text
    assert "a secret path" in caplog.text


def test_what_the_operator_must_fix_is_no_fault_of_the_client(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.refusals = {0: OperatorError("the disk is full")}
    assert error_of(client.post(CHAT, json=chat()), 500)["type"] == "server_error"


@pytest.mark.parametrize("forged", ["a b", "x" * 200, "ä"])
def test_a_request_id_that_could_forge_a_log_line_is_replaced(
    client: TestClient, forged: str
) -> None:
    answer = client.get("/health", headers={"x-request-id": forged.encode()})
    assert answer.headers["x-request-id"].startswith("req-")


def test_unknown_paths_and_wrong_methods(client: TestClient) -> None:
    assert "/v1/nothing" in error_of(client.get("/v1/nothing"), 404)["message"]
    answer = client.get(CHAT)
    assert "POST" in error_of(answer, 405)["message"]
    assert answer.headers["allow"] == "POST"
    error_of(client.delete("/v1/models"), 405)


def test_a_body_too_large_with_its_length_told(client: TestClient) -> None:
    answer = client.post(COMPLETIONS, json=completion(prompt="x" * 20_000))
    error = error_of(answer, 413)
    assert "10000 bytes" in error["message"]
    assert answer.headers["connection"] == "close"


def test_a_body_that_never_ends_is_not_read_to_its_end(client: TestClient) -> None:
    num_sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal num_sent
        for _ in range(1000):
            num_sent += 1
            yield b"x" * 1000

    error_of(client.post(COMPLETIONS, content=endless(), headers=JSON), 413)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": ""}, "empty"),
        ({"input": [[1], ["a"]]}, "token ids"),
        ({"input": "a", "dimensions": 2}, "3"),
        ({"input": "a", "encoding_format": "hex"}, "'base64'"),
        ({"model": MODEL}, "missing"),
    ],
)
def test_embeddings(client: TestClient, fields: dict[str, Any], words: str) -> None:
    answer = client.post("/v1/embeddings", json={"model": MODEL} | fields)
    assert words in error_of(answer, 400)["message"]


def test_one_bad_embedding_cancels_the_others(client: TestClient, engine: FakeEngine) -> None:
    engine.delay_s = 30
    engine.embed_error = QueueFull("too many wait")
    body = {"model": MODEL, "input": [[1], [2], [0]]}
    error_of(client.post("/v1/embeddings", json=body), 429)
    assert engine.embeds_cancelled == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/tokenize", {}),
        ("/v1/tokenize", {"prompt": "a", "text": "b"}),
        ("/v1/tokenize", {"prompt": 7}),
        ("/v1/detokenize", {"tokens": [257]}),
        ("/v1/detokenize", {"tokens": [-1]}),
        ("/v1/detokenize", {"tokens": ["a"]}),
        ("/v1/detokenize", {}),
    ],
)
def test_tokenize(client: TestClient, path: str, body: dict[str, Any]) -> None:
    error_of(client.post(path, json=body), 400)
