"""`shoal chaos` and its parts: what is a difference, who is struck, what is reported."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from msgspec import structs
from operator_fakes import FakeFleet, fake_node, fake_status, fake_worker, serving
from server_fakes import FakeEngine, running_server
from typer.testing import CliRunner, Result

from shoal.cli.app import app
from shoal.cli.chaos_run import is_exact, local_targets
from shoal.cli.chaos_target import HttpAsker
from shoal.errors import OperatorError, PeerLost
from shoal.evaluate.answers import Answer, AnsweredSample, Asked, Difference, first_difference
from shoal.evaluate.chaos import Tally, calm_answers, judge, keep_asking
from shoal.evaluate.chaos_prompts import make_questions
from shoal.evaluate.chaos_report import divide_gaps, gaps_of
from shoal.evaluate.strikes import Striker, Target, is_shoal_worker, running
from shoal.request import SamplingParams

TOKENS = [5, 6, 7, 8, 9, 10]


def sample(*token_ids: int, **changes: object) -> AnsweredSample:
    made = AnsweredSample(
        token_ids=list(token_ids),
        text=" ".join(map(str, token_ids)),
        logprobs=[-0.5] * len(token_ids),
        finish_reason="length",
    )
    return structs.replace(made, **changes)


def answer(*samples: AnsweredSample, **changes: object) -> Answer:
    made = Answer(sent_s=0.0, ended_s=1.0, samples=list(samples) or [sample(*TOKENS)])
    return structs.replace(made, **changes)


def difference(*token_ids: int) -> Difference:
    found = first_difference(answer(), answer(sample(*token_ids)))
    assert found is not None
    return found


# ---- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token_ids", "kind", "number"),
    [
        ((5, 6, 9, 10), "lost", 2),
        ((5, 6, 9, 10, 11, 12), "lost", 2),
        ((6, 7, 8, 9, 10), "lost", 1),
        ((5, 6, 7), "lost", 3),
        ((5, 6, 7, 7, 8, 9), "repeated", 1),
        ((5, 6, 7, 6, 7, 8), "repeated", 2),
        ((5, 6, 7, 8, 9, 10, 10), "repeated", 1),
        ((5, 6, 1, 8, 9, 10), "differs", 4),
    ],
)
def test_lost_and_repeated_tokens_are_told_apart(
    token_ids: tuple[int, ...], kind: str, number: int
) -> None:
    found = difference(*token_ids)
    assert (found.kind, found.num_tokens) == (kind, number)


def test_the_first_difference_is_shown() -> None:
    assert difference(5, 6, 1, 8).text == "sample 0, token 2: after '5 6 ' '7 8 9 10' became '1 8'"


@pytest.mark.parametrize(
    ("got", "said"),
    [
        (
            answer(sample(*TOKENS, text="5 6 x")),
            "sample 0, same tokens, another text: after '5 6 '",
        ),
        (answer(sample(*TOKENS, finish_reason="stop")), "another end: ('length', None) became"),
        (answer(sample(*TOKENS, stop_match=".")), "another end: ('length', None) became"),
        (answer(sample(*TOKENS, logprobs=[-0.5] * 5 + [-0.6])), "other log-probabilities"),
        (answer(sample(*TOKENS), sample(1)), "1 samples became 2"),
        (answer(num_output_tokens=7), "usage: None tokens became 7"),
        (answer(prompt_logprobs=[-1.0]), "the prompt's log-probabilities"),
    ],
)
def test_all_of_an_answer_is_compared(got: Answer, said: str) -> None:
    found = first_difference(answer(), got)
    assert found is not None
    assert said in found.text
    assert found.num_tokens == 0


def test_rounding_of_log_probabilities_is_no_difference() -> None:
    got = answer(sample(*TOKENS, logprobs=[-0.5001] * 6, arrivals_s=[3.0]))
    assert first_difference(answer(), got) is None


def test_an_answer_without_an_end_is_broken() -> None:
    assert answer().broken() is None
    assert answer(error="503").broken() == "503"
    assert answer(sample(1), sample(2, finish_reason=None)).broken() == "sample 1 has no end"


# ---- gaps -------------------------------------------------------------------------------------


def test_a_gap_that_spans_strikes_is_counted_once() -> None:
    streamed = answer(sample(1, arrivals_s=[1.0, 1.5, 4.0]), sent_s=0.5)
    hit, other = divide_gaps([streamed, answer()], [2.0, 3.0, 9.0])
    assert (hit, other) == ([2.5], [0.5, 0.5])
    assert (gaps_of(hit).max_s, gaps_of([]).number) == (2.5, 0)


# ---- questions --------------------------------------------------------------------------------


def test_questions_are_of_every_kind_and_the_same_for_the_same_seed() -> None:
    questions = make_questions(16, max_tokens=9, seed=3)
    assert questions == make_questions(16, max_tokens=9, seed=3)
    assert len({asked.prompt for asked in questions}) == 16
    assert len({asked.kind for asked in questions}) == 8
    assert all(asked.params.greedy or asked.params.seed is not None for asked in questions)
    assert {asked.stream for asked in questions} == {True, False}


# ---- asking -----------------------------------------------------------------------------------


class ScriptedAsker:
    """Answers `calm`, but what `oddities` has for the number of the request."""

    def __init__(self, oddities: dict[int, Answer] | None = None) -> None:
        self.num_asked = 0
        self.num_open = self.most_open = 0
        self._oddities = oddities or {}

    async def ask(self, asked: Asked, on_tokens: Callable[[int], None]) -> Answer:
        del asked
        number, self.num_asked = self.num_asked, self.num_asked + 1
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await asyncio.sleep(0.001)
        self.num_open -= 1
        on_tokens(6)
        return self._oddities.get(number, answer())


QUESTIONS = make_questions(8, max_tokens=6, seed=0)


def test_what_fails_in_peace_is_an_error() -> None:
    asker = ScriptedAsker({2: answer(error="no such model")})
    with pytest.raises(OperatorError, match=r"already without any chaos, .* no such model"):
        asyncio.run(calm_answers(asker, QUESTIONS, at_once=3, tally=Tally()))


def test_streams_are_kept_open_until_there_is_enough() -> None:
    asker, tally = ScriptedAsker({9: answer(error="gone"), 11: answer(sample(5, 6, 8))}), Tally()

    async def run() -> None:
        enough = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, enough.set)
        calm = [answer()] * len(QUESTIONS)
        await keep_asking(asker, QUESTIONS, calm, num_streams=4, seed=1, enough=enough, tally=tally)

    asyncio.run(run())
    assert asker.most_open == 4
    assert asker.num_open == 0
    assert len(tally.answers) == asker.num_asked > 12
    assert tally.num_tokens == 6 * asker.num_asked
    assert [each.reason for each in tally.broken] == ["gone"]
    assert [each.difference.kind for each in tally.different] == ["lost"]


def test_a_broken_answer_is_not_compared_as_well() -> None:
    tally = Tally()
    judge(QUESTIONS[0], answer(), answer(sample(1), error="gone"), tally)
    assert (len(tally.broken), len(tally.different)) == (1, 0)


# ---- over HTTP --------------------------------------------------------------------------------


def http_answer(lines: list[str], asked: Asked) -> Answer:
    body = "\n\n".join(lines) + "\n\n"

    async def ask() -> Answer:
        transport = httpx.MockTransport(lambda _request: httpx.Response(200, text=body))
        async with httpx.AsyncClient(base_url="http://x", transport=transport) as client:
            return await HttpAsker(client, "m").ask(asked, lambda _: None)

    return asyncio.run(ask())


def event(text: str, end: str | None = None, index: int = 0) -> str:
    choice = {"index": index, "text": text, "token_ids": [len(text)], "finish_reason": end}
    return "data: " + json.dumps({"choices": [choice], "usage": None})


STREAMED = Asked(kind="greedy", prompt="a", params=SamplingParams(temperature=0))
USAGE = 'data: {"choices": [], "usage": {"completion_tokens": 2}}'
DONE = "data: [DONE]"


def test_a_stream_is_put_together() -> None:
    got = http_answer([event("ab"), event("c", "stop"), USAGE, DONE], STREAMED)
    (said,) = got.samples
    assert (said.text, said.token_ids, said.finish_reason) == ("abc", [2, 1], "stop")
    assert len(said.arrivals_s) == got.num_output_tokens == 2
    assert got.broken() is None


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([event("a", "stop"), USAGE], "in place of [DONE]"),
        ([event("a"), DONE], "sample 0 has no end"),
        ([event("a"), 'data: {"error": {"message": "lost"}}', DONE], "lost"),
    ],
)
def test_a_stream_that_breaks_off_is_broken(lines: list[str], said: str) -> None:
    assert said in (http_answer(lines, STREAMED).broken() or "")


# ---- strikes ----------------------------------------------------------------------------------


def start_sleeper() -> subprocess.Popen[bytes]:
    """A process that looks like a worker."""
    script = "import time; time.sleep(60)"
    return subprocess.Popen([sys.executable, "-S", "-c", script, "shoal.fleet.nursery"])


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [start_sleeper() for _ in range(2)]
    yield started
    for each in started:
        each.kill()
        each.wait()


def until(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_workers_are_killed_one_by_one(sleepers: list[subprocess.Popen[bytes]]) -> None:
    targets = [Target(f"w{each.pid}", each.pid) for each in sleepers]
    striker = Striker(lambda: targets, how="kill", every_s=0.02, seed=0)
    striker.start()
    until(lambda: len(striker.strikes) == 2)
    striker.stop()
    assert [each.wait() for each in sleepers] == [-9, -9]
    assert {strike.pid for strike in striker.strikes} == {each.pid for each in sleepers}
    assert striker.strikes[0].at_s < striker.strikes[1].at_s


def test_the_frozen_go_on_at_the_end(sleepers: list[subprocess.Popen[bytes]]) -> None:
    process = psutil.Process(sleepers[0].pid)
    striker = Striker(lambda: [Target("w", process.pid)], how="freeze", every_s=0.02, seed=0)
    striker.start()
    until(lambda: bool(striker.strikes))
    until(lambda: process.status() == psutil.STATUS_STOPPED)
    striker.stop()
    assert process.status() != psutil.STATUS_STOPPED
    assert {strike.how for strike in striker.strikes} == {"freeze"}


def test_nothing_but_a_worker_is_struck() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    looks: list[int] = []

    def targets() -> list[Target]:
        looks.append(child.pid)
        return [Target("w", child.pid)]

    striker = Striker(targets, how="kill", every_s=0.01, seed=0)
    striker.start()
    until(lambda: len(looks) >= 2)
    striker.stop()
    assert child.poll() is None
    assert striker.strikes == []
    child.kill()
    assert running(child.pid) is None or child.wait() == -9
    assert not is_shoal_worker(psutil.Process())
    child.wait()


def test_a_server_that_is_gone_ends_the_strikes() -> None:
    def targets() -> list[Target]:
        raise PeerLost("the server is gone")

    striker = Striker(targets, how="kill", every_s=0.01, seed=0)
    striker.start()
    until(lambda: striker.trouble is not None)
    striker.stop()
    assert striker.trouble == "the server is gone"


# ---- the command ------------------------------------------------------------------------------


def test_targets_are_workers_of_this_machine() -> None:
    here, away = structs.replace(fake_node("a"), address="127.0.0.1"), fake_node("bb")
    workers = (fake_worker(0, "a", pid=11), fake_worker(1, "bb", pid=12), fake_worker(2, "local"))
    status = fake_status(nodes=(here, away), workers=workers)
    assert local_targets(status) == [Target("r0s0t0-1", 11)]


def test_only_float32_is_promised() -> None:
    assert is_exact("Llama, float32, 2 stages of 15 + 15 layers")
    assert not is_exact("Llama, 8-bit weights for up to 4 rows and bfloat16 beyond, float32 x")


def chaos(folder: Path, *words: str) -> Result:
    environment = {"COLUMNS": "100", "SHOAL_STATE": str(folder / "state"), "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["chaos", *words], env=environment)


class Roomy(FakeEngine):
    """Takes prompts of any length, and says something else after `turn` requests."""

    def __init__(self, turn: int | None = None) -> None:
        super().__init__()
        self.info = structs.replace(self.info, name="small")
        self.delay_s = 0.002
        self._turn = turn

    def _check(self, prompt_tokens: list[int]) -> None:
        assert prompt_tokens
        if len(self.submitted) == self._turn:
            self.answers = ("Hello",)


@pytest.mark.parametrize("turn", [None, 24])
def test_a_run_ends_with_its_report(
    sleepers: list[subprocess.Popen[bytes]], tmp_path: Path, turn: int | None
) -> None:
    node = structs.replace(fake_node("a"), address="127.0.0.1")
    workers = tuple(fake_worker(i, "a", pid=each.pid) for i, each in enumerate(sleepers))
    fleet = FakeFleet(value=fake_status(nodes=(node,), workers=workers))
    with serving(fleet, tmp_path), running_server(Roomy(turn)) as url:
        result = chaos(
            tmp_path, "--url", url, "--kill-every", "0.05s", "--for", "2s", "--streams", "3"
        )
    *_, last = result.stdout.splitlines()
    record = json.loads(last)
    assert (record["num_kills"], record["num_broken"], record["num_freezes"]) == (2, 0, 0)
    assert record["num_tokens"] >= 5 * record["num_requests"] > 16
    assert "2 workers killed, 0 frozen" in result.stdout
    if turn is None:
        assert (result.exit_code, record["num_different"]) == (0, 0), result.output
    else:
        assert (result.exit_code, record["ok"]) == (1, False)
        assert "after 'H' 'allo' became 'ello'" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("control", "said"),
    [
        (False, "runs whole in one process: there is no worker to kill"),
        (True, "none of the 2 workers of small runs on this machine"),
    ],
)
def test_a_server_without_workers_here_is_refused(tmp_path: Path, control: bool, said: str) -> None:
    with serving(FakeFleet(), tmp_path) as address:
        del address
        if not control:
            (file,) = (tmp_path / "state" / "serving").glob("*.json")
            file.write_text(json.dumps(json.loads(file.read_text()) | {"control": ""}))
        result = chaos(tmp_path)
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())
