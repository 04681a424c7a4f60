"""`generate`, `eval perplexity` and `bench` with a model that is a fake."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from cli_fakes import FakeLLM, FakeTokenizer
from typer.testing import CliRunner, Result

from shoal.cli import bench, evaluate, generate
from shoal.cli.app import app
from shoal.cli.loading import LoadOptions
from shoal.config import Split


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    environment = {"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, list(arguments), input=stdin, env=environment)


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    fake = FakeLLM()
    for module in (generate, evaluate, bench):
        monkeypatch.setattr(module, "open_llm", lambda *_, **__: fake)
    return fake


def test_text_to_stdout_and_figures_to_stderr(llm: FakeLLM) -> None:
    result = run("generate", "m", "the sky", "--max-tokens", "9", "--seed", "4", "--stop", "END")
    assert (result.exit_code, result.stdout) == (0, "It is blue.\n")
    assert "2 prompt tokens" in result.stderr and "3 tokens at" in result.stderr
    assert "ended by stop" in result.stderr
    [(prompt, params)] = llm.asked
    assert prompt == [3, 3]
    assert (params.max_tokens, params.seed, params.stop) == (9, 4, ("END",))
    assert llm.is_closed


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_the_prompt_can_come_from_stdin(llm: FakeLLM, arguments: tuple[str, ...]) -> None:
    assert run("generate", "m", *arguments, stdin="one three\nseven").exit_code == 0
    assert llm.asked[0][0] == [3, 5, 5]


@pytest.mark.parametrize(("stdin", "said"), [("", "is empty"), (b"\xff\xfe", "not UTF-8")])
def test_unusable_stdin_is_wrong_usage(llm: FakeLLM, stdin: str | bytes, said: str) -> None:
    result = run("generate", "m", stdin=stdin)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not llm.asked


def test_raw_is_the_default_and_chat_uses_the_template(llm: FakeLLM) -> None:
    llm.tokenizer = FakeTokenizer(bos=True)
    run("generate", "m", "hello")
    run("generate", "m", "hello", "--chat")
    assert [prompt for prompt, _ in llm.asked] == [[0, 5], [len("<user>"), 5]]


@pytest.mark.usefixtures("llm")
def test_several_answers() -> None:
    result = run("generate", "m", "hello", "-n", "2")
    assert result.stdout == "--- 1 of 2\nIt is blue.\n--- 2 of 2\nIt is blue.\n"


@pytest.mark.usefixtures("llm")
def test_json_is_one_record() -> None:
    record = json.loads(run("generate", "m", "hello there", "--json").stdout)
    assert record["num_prompt_tokens"] == 2
    assert record["samples"] == [
        {"text": "It is blue.", "num_tokens": 3, "finish_reason": "length"}
    ]


def last_record(result: Result) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return record


def test_perplexity_of_a_model(llm: FakeLLM) -> None:
    result = run("eval", "perplexity", "m", "--window", "100")
    record = last_record(result)
    [entry] = record["results"]
    assert entry["perplexity"] == pytest.approx(math.e**2, abs=1e-5)
    assert entry["ratio"] == 1
    assert "7.389" in result.stdout
    assert all(len(prompt) <= 100 for prompt, _ in llm.asked)


def test_perplexity_of_a_split_model(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    splits: list[Split] = []

    def open_llm(_model: str, options: LoadOptions, **_more: object) -> FakeLLM:
        splits.append(options.split)
        return llm

    monkeypatch.setattr(evaluate, "open_llm", open_llm)
    arguments = ("--pipeline", "2", "--tensor", "3", "--wire", "int8", "--transport", "sockets")
    assert run("eval", "perplexity", "m", *arguments).exit_code == 0
    assert splits == [Split(pipeline=2, tensor=3, wire_format="int8", transport="sockets")]


def test_windows_begin_as_the_models_prompts_do(llm: FakeLLM) -> None:
    llm.tokenizer = FakeTokenizer(bos=True)
    run("eval", "perplexity", "m")
    assert all(prompt[0] == 0 for prompt, _ in llm.asked)


def test_compare_is_relative_to_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    nats = {("float32", "none"): 2.0, ("auto", "int8"): 2.1, ("auto", "int4"): 2.3}

    def open_one(_: str, options: Any, **__: Any) -> FakeLLM:
        return FakeLLM(log_p=-nats.get((options.dtype, options.quantize), 2.0))

    monkeypatch.setattr(evaluate, "open_llm", open_one)
    result = run("eval", "perplexity", "m", "--compare")
    ratios = {
        (entry["dtype"], entry["quantize"]): entry["ratio"]
        for entry in last_record(result)["results"]
    }
    assert ratios[("float32", "none")] == 1
    assert ratios[("auto", "int8")] == pytest.approx(math.exp(0.1), abs=1e-5)
    assert ratios[("auto", "int4")] == pytest.approx(math.exp(0.3), abs=1e-5)
    assert ratios[("auto", "auto")] == pytest.approx(1)


def test_an_encoder_has_no_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "open_llm", lambda *_, **__: FakeLLM(can_generate=False))
    result = run("eval", "perplexity", "m")
    assert result.exit_code == 1
    assert "predicts no text" in result.stderr


def test_bench_in_process(llm: FakeLLM) -> None:
    result = run(
        *("bench", "m", "--requests", "5", "--concurrency", "2"),
        *("--prompt-tokens", "11", "--max-tokens", "7"),
    )
    assert result.exit_code == 0, result.output
    record = last_record(result)
    assert (record["num_requests"], record["num_errors"]) == (5, 0)
    assert (record["num_prompt_tokens"], record["num_output_tokens"]) == (55, 35)
    assert record["num_cached_tokens"] == 15
    assert "first token, ms" in result.stdout
    measured = [params for prompt, params in llm.asked if len(prompt) == 11][1:]
    assert all(params.ignore_eos and params.temperature == 0 for params in measured)
