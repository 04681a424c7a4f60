"""Whose next tokens a draft model is asked for, what becomes of its guesses, and when it rests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from scheduler_driver import WORD, answer, make_request, make_scheduler, plan, step

from shoal.engine.foresight import Foresight
from shoal.messages import StepResult
from shoal.schedule.drafting import Offered
from shoal.schedule.foresight import GuessWanted, Worth
from shoal.schedule.scheduler import Scheduler


def decoding(number: int = 1, **params: object) -> Scheduler:
    """So many requests, each with a first token."""
    scheduler = make_scheduler(max_drafted=4, drafter=Offered)
    for request_id in range(1, number + 1):
        scheduler.add(make_request(request_id, max_tokens=40, params=params))
    step(scheduler)
    return scheduler


def test_what_is_offered_is_tried() -> None:
    scheduler = decoding(temperature=0.5)
    (wanted,) = scheduler.wanted_guesses()
    assert (wanted.request_id, wanted.tokens[-1], wanted.number) == (1, WORD, 2)
    assert (wanted.sampling.position, wanted.sampling.temperature) == (len(wanted.tokens), 0.5)
    scheduler.offer({1: [WORD, WORD + 1], 99: [WORD]})
    made = plan(scheduler)
    assert made.chunks[0].tokens == [WORD, WORD, WORD + 1]
    results = [answer(chunk) for chunk in made.chunks]
    scheduler.complete(StepResult(epoch=made.epoch, step=made.step, results=results))
    assert plan(scheduler).chunks[0].num_drafted == 0, "an old guess was tried again"


def test_nobody_is_asked_beside_a_prompt_or_for_many() -> None:
    assert [each.number for each in decoding(2).wanted_guesses()] == [2, 2]
    assert [each.number for each in decoding(4).wanted_guesses()] == [1] * 4
    assert decoding(5).wanted_guesses() == []
    scheduler = decoding()
    scheduler.add(make_request(9, num_prompt=60))
    step(scheduler)
    assert scheduler.wanted_guesses() == [], "a prompt is being read"
    assert make_scheduler(drafter=Offered).wanted_guesses() == []
    step(decoding_one := decoding())
    plan(decoding_one)
    assert decoding_one.wanted_guesses() == [], "a plan is under way"


def after(
    worth: Worth, num_steps: int, *, guess_s: float, right: float, plain_s: float = 0.010
) -> int:
    """Steps with guesses among so many, where one with them takes 2 ms more than one without."""
    num_guessed = 0
    for _ in range(num_steps):
        if worth.is_resting:
            worth.plain_step(plain_s)
        else:
            worth.guessed_step(guess_s, plain_s + 0.002, right)
            num_guessed += 1
    return num_guessed


def test_guesses_go_on_while_they_save_time_and_rest_where_they_do_not() -> None:
    assert after(Worth(), 104, guess_s=0.015, right=2.0) == 99
    worth = Worth()
    assert after(worth, 104, guess_s=0.025, right=2.0) < 15
    assert after(worth, 3000, guess_s=0.025, right=2.0) < 30
    assert after(worth, 2000, guess_s=0.001, right=2.0) > 900, "it never tries again"


def test_steps_that_become_quicker_are_noticed() -> None:
    worth = Worth()
    assert after(worth, 204, guess_s=0.015, right=2.0, plain_s=0.010) > 190
    assert after(worth, 2000, guess_s=0.007, right=2.0, plain_s=0.004) < 600


class Drafts:
    """A draft model that is right, wrong or broken."""

    def __init__(self, word: int | None) -> None:
        self.word = word
        self.num_asked = 0

    def guess(self, wanted: list[GuessWanted]) -> dict[int, list[int]]:
        self.num_asked += 1
        if self.word is None:
            raise RuntimeError("out of order")
        return {each.request_id: [self.word] * each.number for each in wanted}


@pytest.fixture
def ticks() -> Iterator[float]:
    return iter(range(10_000))  # type: ignore[arg-type]


def answered(drafts: Drafts, ticks: Iterator[float], *, step_s: float) -> int:
    """Steps that 40 tokens take, with `drafts` asked before each; a guess takes a second."""
    scheduler = decoding()
    foresight = Foresight(drafts, scheduler, clock=lambda: next(ticks))  # type: ignore[arg-type]
    num_steps = 1
    while scheduler.has_work:
        foresight.look_ahead(threading.Lock())
        made = plan(scheduler)
        results = [answer(chunk) for chunk in made.chunks]
        result = StepResult(epoch=made.epoch, step=made.step, results=results)
        foresight.finished(result, step_s)
        scheduler.complete(result)
        num_steps += 1
    return num_steps


def test_right_guesses_save_steps_where_steps_are_slow(ticks: Iterator[float]) -> None:
    assert answered(Drafts(WORD), ticks, step_s=10.0) < 20
    drafts = Drafts(WORD)
    assert answered(drafts, ticks, step_s=0.1) > 20, "a guess takes longer than what it saves"
    assert drafts.num_asked < 8


def test_a_draft_model_that_fails_is_asked_no_more_and_nobody_notices(
    ticks: Iterator[float],
) -> None:
    drafts = Drafts(None)
    assert answered(drafts, ticks, step_s=10.0) == 40
    assert drafts.num_asked == 1
