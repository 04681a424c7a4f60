"""Clients that come back, and servers that do: whatever was read before, the rest follows."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import httpx
import pytest
from server_fakes import MODEL, FakeEngine

from shoal.errors import EngineStopped, QueueFull
from shoal.journal.api import Journal
from shoal.journal.database import Database
from shoal.journal.writer import SqliteJournal
from shoal.server.app import create_app
from shoal.server.run import bind, make_server, url_of

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
LONG = "abcdefghijklmnopqrstuvwxyz" * 5


class Event(NamedTuple):
    place: str | None
    data: Any


@contextmanager
def served(engine: FakeEngine, journal: Journal | None, *, grace_s: int = 5) -> Iterator[str]:
    listener = bind("127.0.0.1", 0)
    server = make_server(create_app(engine, journal=journal), grace_s=grace_s)
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def kept(path: Path, model: str = MODEL, **settings: Any) -> Iterator[SqliteJournal]:
    journal = SqliteJournal(path, model, **settings)
    try:
        yield journal
    finally:
        journal.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine("Hallo", "Du da")


@pytest.fixture
def url(engine: FakeEngine, path: Path) -> Iterator[str]:
    with kept(path) as journal, served(engine, journal) as url:
        yield url


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client() as client:
        yield client


def body(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "ab", "max_tokens": 200, "stream": True} | changes


def events(lines: Iterator[str]) -> Iterator[Event]:
    place = None
    for line in lines:
        if line.startswith("id"):
            place = line.removeprefix("id").removeprefix(": ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield Event(place, data if data == "[DONE]" else json.loads(data))
            place = None


def stream(method: str, address: str, *, client: Any = httpx, **options: Any) -> list[Event]:
    with client.stream(method, address, timeout=20, **options) as answer:
        assert answer.status_code == 200, answer.read()
        return list(events(answer.iter_lines()))


def first_events(address: str, number: int, **asked: Any) -> list[Event]:
    """As many, then the client leaves."""
    with httpx.stream("POST", address, json=body(**asked), timeout=20) as answer:
        found = events(answer.iter_lines())
        return [next(found) for _ in range(number)]


def text_of(found: list[Event]) -> str:
    chunks = [event.data for event in found if event.data != "[DONE]"]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk.get("choices"))


def wait_until(condition: Any, timeout_s: float = 5.0) -> None:
    limit_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit_s, "it did not come true"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("endpoint", "asked"),
    [
        (COMPLETIONS, body()),
        (COMPLETIONS, body(prompt=["ab", "c"], n=2, echo=True, return_token_ids=True)),
        (COMPLETIONS, body(logprobs=2, n=2, stream_options={"include_usage": True})),
        (COMPLETIONS, body(echo=True, max_tokens=0, stream_options={"include_usage": True})),
        (COMPLETIONS, body(prompt=[[97, 98], [99]], echo=True, stop=["x"], seed=4)),
        (CHAT, {"model": MODEL, "messages": MESSAGES, "stream": True}),
        (
            CHAT,
            {
                "model": MODEL,
                "messages": MESSAGES,
                "stream": True,
                "n": 3,
                "logprobs": True,
                "return_token_ids": True,
                "stream_options": {"include_usage": True},
            },
        ),
    ],
)
def test_after_any_event_exactly_what_follows_comes(
    url: str, engine: FakeEngine, client: httpx.Client, endpoint: str, asked: dict[str, Any]
) -> None:
    engine.answers = ("Hi!", "Du")
    calm = stream("POST", url + endpoint, json=asked)
    num_submitted = len(engine.submitted)
    response_id = calm[0].data["id"]
    places = [event.place for event in calm[:-1]]
    assert len(set(places)) == len(places)
    for position, place in enumerate(places, start=1):
        headers = {"Last-Event-ID": str(place)}
        assert stream("POST", url + endpoint, headers=headers, client=client) == calm[position:]
        number = str(place).partition(":")[2]
        ways: list[dict[str, Any]] = [
            {"headers": headers},
            {"params": {"stream": "true", "starting_after": number}},
        ]
        for way in ways:
            assert (
                stream("GET", f"{url}{endpoint}/{response_id}", client=client, **way)
                == calm[position:]
            )
    assert stream("GET", f"{url}{endpoint}/{response_id}", params={"stream": "true"}) == calm
    assert len(engine.submitted) == num_submitted


@pytest.mark.parametrize("asked", [{}, {"n": 2, "best_of": 3}, {"echo": True, "logprobs": 1}])
def test_a_whole_answer_can_be_asked_for_again(url: str, asked: dict[str, Any]) -> None:
    answer = httpx.post(url + COMPLETIONS, json=body(stream=False, **asked))
    response_id = answer.headers["x-response-id"]
    assert answer.json()["id"] == response_id
    again = httpx.get(f"{url}{COMPLETIONS}/{response_id}")
    assert again.json() == answer.json()
    assert again.headers["x-response-id"] == response_id


def test_streamed_or_whole_is_the_choice_of_who_comes_back(url: str) -> None:
    streamed = stream("POST", url + COMPLETIONS, json=body())
    whole = httpx.get(f"{url}{COMPLETIONS}/{streamed[0].data['id']}").json()
    assert whole["object"] == "text_completion"
    assert whole["choices"][0]["text"] == "Hallo"
    assert whole["usage"]["completion_tokens"] == 5
    scored = httpx.post(url + COMPLETIONS, json=body(stream=False, prompt_logprobs=1)).json()
    refused = httpx.get(f"{url}{COMPLETIONS}/{scored['id']}?stream=true")
    assert refused.status_code == 400
    assert "prompt_logprobs" in refused.text


def test_two_read_the_same_response_and_one_may_leave(url: str, engine: FakeEngine) -> None:
    engine.answers, engine.delay_s = (LONG,), 0.005
    with httpx.stream("POST", url + COMPLETIONS, json=body(), timeout=20) as answer:
        found = events(answer.iter_lines())
        seen = [next(found) for _ in range(3)]
        address = f"{url}{COMPLETIONS}/{seen[0].data['id']}?stream=true&starting_after=3"
        with httpx.stream("GET", address) as other:
            rest = events(other.iter_lines())
            mine = [next(found) for _ in range(5)]
            assert [next(rest) for _ in range(5)] == mine
        seen += [*mine, *found]
    assert text_of(seen) == LONG
    assert len(engine.submitted) == 1


def test_a_client_that_left_has_its_response_go_on(url: str, engine: FakeEngine) -> None:
    engine.answers, engine.delay_s = (LONG,), 0.005
    seen = first_events(url + COMPLETIONS, 7)
    wait_until(lambda: engine.streams[0].cancelled)
    headers = {"Last-Event-ID": str(seen[-1].place)}
    rest = stream("POST", url + COMPLETIONS, json=body(), headers=headers)
    assert text_of(seen + rest) == LONG
    assert rest[-1].data == "[DONE]"
    [(_, before, _), (_, after, _)] = engine.submitted
    assert after.seed == before.seed is not None
    assert engine.streams[1].num_read < len(LONG) - 6


def test_many_come_back_at_once_and_it_is_computed_once(url: str, engine: FakeEngine) -> None:
    engine.answers, engine.delay_s = (LONG,), 0.005
    seen = first_events(url + COMPLETIONS, 4)
    wait_until(lambda: engine.streams[0].cancelled)
    address = f"{url}{COMPLETIONS}/{seen[0].data['id']}"
    answers: list[str] = []

    def ask() -> None:
        answers.append(httpx.get(address, timeout=20).json()["choices"][0]["text"])

    threads = [Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [LONG] * 5
    assert len(engine.submitted) == 2


def test_a_request_repeated_with_its_key_is_one(url: str, engine: FakeEngine) -> None:
    headers = {"Idempotency-Key": "0a1b2c"}
    asked = body(stream=False)
    first = httpx.post(url + COMPLETIONS, json=asked, headers=headers)
    assert httpx.post(url + COMPLETIONS, json=asked, headers=headers).json() == first.json()
    assert len(engine.submitted) == 1
    other = httpx.post(url + COMPLETIONS, json=body(stream=False, seed=2), headers=headers)
    assert other.status_code == 400
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    chat = {"model": MODEL, "messages": MESSAGES}
    assert httpx.post(url + CHAT, json=chat, headers=headers).status_code == 400
    bad = httpx.post(url + COMPLETIONS, json=asked, headers={"Idempotency-Key": "a b"})
    assert bad.json()["error"]["code"] == "invalid_key"


def test_a_lost_answer_is_asked_for_again_while_it_is_computed(
    url: str, engine: FakeEngine
) -> None:
    engine.answers, engine.delay_s = (LONG,), 0.005
    asked, headers = body(stream=False), {"Idempotency-Key": "k1"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + COMPLETIONS, json=asked, headers=headers, timeout=0.2)
    again = httpx.post(url + COMPLETIONS, json=asked, headers=headers, timeout=20).json()
    assert again["choices"][0]["text"] == LONG
    assert again["usage"]["completion_tokens"] == len(LONG)


@pytest.mark.parametrize(
    ("method", "address", "headers", "status", "words"),
    [
        ("GET", f"{COMPLETIONS}/cmpl-{'0' * 32}", {}, 404, "may have expired"),
        ("GET", f"{COMPLETIONS}/who?stream=maybe", {}, 400, "true or false"),
        ("GET", f"{COMPLETIONS}/who?starting_after=1", {}, 400, "needs stream=true"),
        ("GET", f"{COMPLETIONS}/who?stream=1&starting_after=x", {}, 400, "number of an event"),
        ("GET", f"{COMPLETIONS}/who", {"Last-Event-ID": f"cmpl-{'0' * 32}:1"}, 400, "asked for"),
        ("POST", COMPLETIONS, {"Last-Event-ID": "17"}, 400, "Last-Event-ID is '17'"),
        ("POST", COMPLETIONS, {"Last-Event-ID": f"cmpl-{'0' * 32}:1"}, 404, "no response"),
        ("DELETE", f"{COMPLETIONS}/who", {}, 405, "use GET"),
    ],
)
def test_what_cannot_be_come_back_to(
    url: str, method: str, address: str, headers: dict[str, str], status: int, words: str
) -> None:
    refused = httpx.request(method, url + address, headers=headers)
    assert refused.status_code == status, refused.text
    assert words in refused.json()["error"]["message"]


def test_ids_belong_to_their_endpoint_and_streams_have_an_end(url: str) -> None:
    calm = stream("POST", url + COMPLETIONS, json=body())
    response_id = calm[0].data["id"]
    wrong = httpx.get(f"{url}{CHAT}/{response_id}")
    assert wrong.status_code == 400
    assert wrong.json()["error"]["code"] == "wrong_endpoint"
    headers = {"Last-Event-ID": f"{response_id}:99"}
    [error, done] = stream("POST", url + COMPLETIONS, headers=headers)
    assert "there is no event 99: this stream has 5" in error.data["error"]["message"]
    assert done.data == "[DONE]"
    assert f'endpoint="{CHAT}/{{response_id}}"' in httpx.get(f"{url}/metrics").text


def test_without_a_journal_a_response_goes_with_its_client(engine: FakeEngine) -> None:
    with served(engine, None) as url:
        calm = stream("POST", url + COMPLETIONS, json=body())
        assert {event.place for event in calm} == {None}
        gone = httpx.get(f"{url}{COMPLETIONS}/{calm[0].data['id']}")
    assert gone.status_code == 404
    assert "keeps no journal" in gone.text


def test_a_response_that_expired_is_gone(engine: FakeEngine, path: Path) -> None:
    with kept(path, keep_s=0.05, retry_s=0.05) as journal, served(engine, journal) as url:
        calm = stream("POST", url + COMPLETIONS, json=body())
        address = f"{url}{COMPLETIONS}/{calm[0].data['id']}"
        wait_until(lambda: httpx.get(address).status_code == 404)


def test_an_engine_that_gives_up_can_be_asked_to_go_on(url: str, engine: FakeEngine) -> None:
    engine.breaks = EngineStopped("no workers are left")
    broken = stream("POST", url + COMPLETIONS, json=body())
    assert broken[-2].data["error"]["code"] == "engine_stopped"
    engine.breaks = None
    headers = {"Last-Event-ID": str(broken[0].place)}
    rest = stream("POST", url + COMPLETIONS, json=body(), headers=headers)
    assert text_of([broken[0], *rest]) == "Hallo"


def test_an_error_stays_an_error(url: str, engine: FakeEngine) -> None:
    engine.breaks = ZeroDivisionError()
    broken = stream("POST", url + COMPLETIONS, json=body())
    engine.breaks = None
    again = httpx.get(f"{url}{COMPLETIONS}/{broken[0].data['id']}")
    assert again.status_code == 500
    assert again.json()["error"]["message"] == broken[-2].data["error"]["message"]


# ---- the server is the one that leaves ---------------------------------------------------------


def interrupted(path: Path, number: int) -> tuple[list[Event], int]:
    """What a client reads from a server that ends, with no grace, after so many events; and how
    many are left to compute."""
    engine = FakeEngine(LONG)
    engine.delay_s = 0.01
    seen: list[Event] = []

    def read(url: str) -> None:
        seen.extend(stream("POST", url + COMPLETIONS, json=body()))

    with kept(path) as journal:
        with served(engine, journal, grace_s=0) as url:
            reader = Thread(target=read, args=(url,))
            reader.start()
            wait_until(lambda: engine.streams and engine.streams[0].num_read > number)
        reader.join()
    assert seen.pop().data == "[DONE]"
    database = Database(path)
    record = database.find(seen[0].data["id"])
    database.close()
    assert record is not None
    # More than the client has seen, if some was on its way.
    assert record.state == "open"
    return seen, len(LONG) - len(record.entries)


def test_a_server_that_starts_again_goes_on(path: Path) -> None:
    seen, num_left = interrupted(path, 5)
    error = seen.pop().data["error"]
    assert error["code"] == "server_restarting"
    assert "Last-Event-ID" in error["message"]
    assert 5 <= len(seen) < len(LONG)
    engine = FakeEngine(LONG)
    with kept(path) as journal, served(engine, journal) as url:
        # Before anybody has come back.
        wait_until(lambda: engine.streams and engine.streams[0].num_read == num_left)
        headers = {"Last-Event-ID": str(seen[-1].place)}
        rest = stream("POST", url + COMPLETIONS, headers=headers)
        assert text_of(seen + rest) == LONG
        whole = httpx.get(f"{url}{COMPLETIONS}/{seen[0].data['id']}").json()
    assert whole["choices"][0]["text"] == LONG
    assert whole["usage"]["completion_tokens"] == len(LONG)
    with kept(path) as journal, served(FakeEngine("wrong"), journal) as url:
        assert httpx.get(f"{url}{COMPLETIONS}/{seen[0].data['id']}").json() == whole


def test_another_model_does_not_go_on_for_the_last(path: Path) -> None:
    seen, _ = interrupted(path, 3)
    engine = FakeEngine(LONG)
    for _ in range(2):
        with kept(path, "another model") as journal, served(engine, journal) as url:
            refused = httpx.get(f"{url}{COMPLETIONS}/{seen[0].data['id']}")
            assert refused.status_code == 500
            message = refused.json()["error"]["message"]
            assert f"was begun by '{MODEL}'" in message
            assert "'another model', which is served now" in message
    assert not engine.submitted


def test_a_full_queue_at_the_start_is_waited_for(path: Path) -> None:
    _, num_left = interrupted(path, 3)
    engine = FakeEngine(LONG)
    engine.refusals = {i: QueueFull("full", retry_after_s=0.01) for i in range(3)}
    with kept(path) as journal, served(engine, journal):
        wait_until(lambda: engine.streams and engine.streams[0].num_read == num_left)


def test_no_place_is_told_that_the_journal_does_not_have(
    url: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.answers, engine.delay_s = (LONG,), 0.005
    with httpx.stream("POST", url + COMPLETIONS, json=body(), timeout=20) as answer:
        found = events(answer.iter_lines())
        seen = [next(found) for _ in range(3)]
        assert all(event.place for event in seen)

        def fail(*_: Any) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(Database, "append", fail)
        health = httpx.get(f"{url}/health").json
        wait_until(lambda: health()["journal"] is not None)
        assert "disk is full" in health()["journal"]
        seen += found
    assert text_of(seen) == LONG
    assert {event.place for event in seen[-20:-1]} == {""}
    assert httpx.get(f"{url}{COMPLETIONS}/{seen[0].data['id']}").status_code == 404
