"""`chat`: conversations, commands, interrupts, a full context, and a server far away."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator

import httpx
import pytest
from cli_fakes import FakeLLM, FakeTokenizer
from typer.testing import CliRunner, Result

from shoal.cli import chat
from shoal.cli.app import app
from shoal.cli.chat_backend import LocalBackend, RemoteBackend
from shoal.cli.chat_session import ChatSession
from shoal.cli.client import base_url
from shoal.cli.conversation import Conversation
from shoal.errors import ConfigError, ContextTooLong, OperatorError, QueueFull
from shoal.request import SamplingParams


def run(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, stdin: str, *arguments: str) -> Result:
    monkeypatch.setattr(chat, "open_llm", lambda *_, **__: llm)
    environment = {"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["chat", "m", *arguments], input=stdin, env=environment)


def test_each_line_of_a_pipe_is_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()
    result = run(llm, monkeypatch, "hi\n\nyou there\n")
    assert (result.exit_code, result.stdout) == (0, "It is blue.\nIt is blue.\n")
    first, second = (prompt for prompt, _ in llm.asked)
    assert first == [6, 2]
    # The whole conversation is sent: its beginning is in the prefix cache.
    assert second[: len(first)] == first and len(second) == 2 + 4 + 3
    assert llm.is_closed


def test_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()
    result = run(
        llm, monkeypatch, "hi\n/reset\n/system Be short.\n/help\n/nonsense\nhi\n/exit\nhi\n"
    )
    assert result.exit_code == 0
    assert [prompt for prompt, _ in llm.asked] == [[6, 2], [8, 2, 6, 6, 2]]
    assert "the conversation is forgotten" in result.stderr
    assert "system: Be short." in result.stderr
    assert "Ctrl-C" in result.stderr
    assert "no command /nonsense" in result.stderr


def test_system_and_sampling_options(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()
    run(llm, monkeypatch, "hi\n", "--system", "Rhyme.", "--temperature", "0", "--max-tokens", "5")
    [(prompt, params)] = llm.asked
    assert prompt == [8, 6, 6, 2]
    assert (params.temperature, params.max_tokens) == (0, 5)


def test_a_model_without_a_template_cannot_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM(tokenizer=FakeTokenizer(has_chat_template=False))
    result = run(llm, monkeypatch, "hi\n")
    assert result.exit_code == 1
    assert "shoal generate m" in result.stderr


def test_a_full_context_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each exchange is 2 + 4 tokens; a prompt may have 15 of 20.
    llm = FakeLLM(max_context=20)
    result = run(llm, monkeypatch, "a\nb\nc\nd\n")
    assert result.exit_code == 0
    assert [len(prompt) for prompt, _ in llm.asked] == [2, 8, 14, 14]
    assert "the context of 20 tokens is full: forgot the oldest exchange" in result.stderr


def test_a_question_beyond_the_context_is_the_engines_to_refuse() -> None:
    conversation = Conversation("system stays")
    conversation.ask("long")
    assert conversation.drop_oldest(lambda _: False) == 0
    assert [message["role"] for message in conversation.messages] == ["system", "user"]


class InterruptedTerminal:
    """A terminal at which these lines are typed."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines = iter(lines)

    def input(self, _: str) -> str:
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


def typed(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]
) -> Conversation:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", InterruptedTerminal(*lines).input)
    conversation = Conversation()
    ChatSession(LocalBackend(llm, SamplingParams()), conversation, 100).run()
    return conversation


def raise_at(piece: int, error: BaseException, *, times: int = 1) -> Callable[[int], None]:
    left = iter(range(times))

    def during(index: int) -> None:
        if index == piece and next(left, None) is not None:
            raise error

    return during


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = FakeLLM(during=raise_at(2, KeyboardInterrupt()))
    conversation = typed(llm, monkeypatch, "one", "two")
    assert [message["content"] for message in conversation.messages] == [
        *("one", "It is", "two", "It is blue.")
    ]
    assert llm.num_cancelled == 2
    captured = capsys.readouterr()
    assert captured.out == "It is\nIt is blue.\n\n"
    assert "stopped" in captured.err


def test_ctrl_c_before_the_first_word_takes_the_question_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = FakeLLM(during=raise_at(0, KeyboardInterrupt()))
    conversation = typed(llm, monkeypatch, "one", "two")
    assert [message["content"] for message in conversation.messages] == ["two", "It is blue."]


def test_ctrl_c_at_the_prompt_does_not_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = typed(FakeLLM(), monkeypatch, KeyboardInterrupt, "one")
    assert conversation.num_turns == 2
    assert "Ctrl-D or /exit leaves" in capsys.readouterr().err


def test_a_refused_question_does_not_end_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = FakeLLM(during=raise_at(0, QueueFull("too much is waiting")))
    conversation = typed(llm, monkeypatch, "one", "two")
    assert "error: too much is waiting" in capsys.readouterr().err
    assert [message["content"] for message in conversation.messages] == ["two", "It is blue."]


def test_in_a_pipe_ctrl_c_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(FakeLLM(during=raise_at(1, KeyboardInterrupt())), monkeypatch, "one\ntwo\n")
    assert (result.exit_code, result.stdout) == (130, "It")


def test_models_cannot_move_the_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    typed(FakeLLM(pieces=("\x1b[2J", "hi\r\x07")), monkeypatch, "one")
    assert capsys.readouterr().out == "[2Jhi\n\n"


def events(*contents: str) -> bytes:
    lines = [json.dumps({"choices": [{"delta": {"content": text}}]}) for text in contents]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()


Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def connect() -> Iterator[Callable[[Handler], RemoteBackend]]:
    clients: list[httpx.Client] = []

    def make(handler: Handler) -> RemoteBackend:
        def answer(request: httpx.Request) -> httpx.Response:
            if request.url.path == "/v1/models":
                return httpx.Response(200, json={"data": [{"id": "far", "max_model_len": 64}]})
            return handler(request)

        client = httpx.Client(base_url="http://far", transport=httpx.MockTransport(answer))
        clients.append(client)
        return RemoteBackend(client, None, SamplingParams(max_tokens=7, temperature=0.5))

    yield make
    for client in clients:
        client.close()


def test_a_server_answers(connect: Callable[[Handler], RemoteBackend]) -> None:
    bodies = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        if request.url.path == "/v1/tokenize":
            return httpx.Response(200, json={"count": 12})
        return httpx.Response(200, content=events("Hel", "lo", ""))

    backend = connect(handler)
    messages = [{"role": "user", "content": "hi"}]
    assert (backend.name, backend.max_context, backend.num_tokens(messages)) == ("far", 64, 12)
    assert "".join(backend.answer(messages)) == "Hello"
    assert bodies[1]["messages"] == messages
    assert (bodies[1]["model"], bodies[1]["max_tokens"], bodies[1]["stream"]) == ("far", 7, True)


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, {"message": "too long", "code": "context_length_exceeded"}, ContextTooLong),
        (500, {"message": "too bad"}, OperatorError),
    ],
)
def test_a_servers_errors_are_shoals(
    connect: Callable[[Handler], RemoteBackend],
    status: int,
    error: dict[str, str],
    kind: type[Exception],
) -> None:
    backend = connect(lambda _: httpx.Response(status, json={"error": error}))
    with pytest.raises(kind, match=error["message"]):
        list(backend.answer([]))


def test_an_error_in_the_middle_of_a_stream(
    connect: Callable[[Handler], RemoteBackend],
) -> None:
    broken = events("Hel")[: -len("data: [DONE]\n\n")] + b'data: {"error": {"message": "died"}}\n\n'
    backend = connect(lambda _: httpx.Response(200, content=broken))
    stream = backend.answer([])
    assert next(stream) == "Hel"
    with pytest.raises(OperatorError, match="died"):
        next(stream)


def test_a_server_without_tokenize_counts_nothing(
    connect: Callable[[Handler], RemoteBackend],
) -> None:
    assert connect(lambda _: httpx.Response(404)).num_tokens([]) is None


def test_nobody_answers() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with (
        httpx.Client(base_url="http://far", transport=httpx.MockTransport(refuse)) as client,
        pytest.raises(ConfigError, match="nothing answers at http://far"),
    ):
        RemoteBackend(client, None, SamplingParams())


@pytest.mark.parametrize(
    "text", ["127.0.0.1:80", "http://127.0.0.1:80/", "http://127.0.0.1:80/v1", "127.0.0.1:80/v1/"]
)
def test_addresses(text: str) -> None:
    assert base_url(text) == "http://127.0.0.1:80"


def test_not_an_address() -> None:
    with pytest.raises(ConfigError, match="not the address"):
        base_url("http://")
