"""What the scheduler plans and reports, one decision at a time."""

from __future__ import annotations

import pytest
from scheduler_driver import (
    WORD,
    answer,
    complete,
    drain,
    make_request,
    make_scheduler,
    plan,
    sizes,
    step,
)

from shoal.errors import ContextTooLong, InternalError, InvalidRequest, QueueFull
from shoal.messages import ChunkResult, Event, StepResult
from shoal.request import FinishReason

# ---- the life of a request ------------------------------------------------------------------


def test_one_request_from_prompt_to_end() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1, num_prompt=6, max_tokens=3))
    first = plan(scheduler)
    (chunk,) = first.chunks
    assert (chunk.start, chunk.tokens, len(chunk.block_ids)) == (0, list(range(100, 106)), 2)
    assert chunk.sampling is not None
    assert (chunk.sampling.position, chunk.sampling.seed) == (6, 1)
    assert [event.token_id for event in complete(scheduler, first)] == [WORD]
    second = plan(scheduler)
    (chunk,) = second.chunks
    assert (chunk.start, chunk.tokens) == (6, [WORD])
    events = complete(scheduler, second) + drain(scheduler)
    assert [event.finish_reason for event in events] == [None, FinishReason.LENGTH]
    assert scheduler.plan(0.0) is None
    assert scheduler.counts().num_used_blocks == 0


def test_long_prompts_are_computed_in_chunks_and_sampled_at_the_end() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_request(1, num_prompt=20))
    seen = []
    for _ in range(3):
        made = plan(scheduler)
        (chunk,) = made.chunks
        seen.append((chunk.start, len(chunk.tokens), chunk.sampling is not None))
        events = complete(scheduler, made)
    assert seen == [(0, 8, False), (8, 8, False), (16, 4, True)]
    assert len(events) == 1


def test_decodes_go_before_prefills_of_better_rank() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_request(2, num_prompt=4))
    step(scheduler)
    scheduler.add(make_request(1, num_prompt=30, priority=-1))
    assert step(scheduler)[0] == {2: 1, 1: 7}
    assert step(scheduler)[0] == {2: 1, 1: 7}


def test_waiting_requests_start_by_priority_then_arrival() -> None:
    scheduler = make_scheduler(max_running=1)
    scheduler.add(make_request(1, priority=1, max_tokens=1))
    scheduler.add(make_request(2, priority=0, max_tokens=1, arrival_s=9.0))
    scheduler.add(make_request(3, priority=0, max_tokens=1, arrival_s=3.0))
    assert [event.request_id for event in drain(scheduler)] == [3, 2, 1]


def test_at_most_max_running_run() -> None:
    scheduler = make_scheduler(max_running=2)
    for i in range(3):
        scheduler.add(make_request(i))
    assert step(scheduler)[0] == {0: 4, 1: 4}
    assert (scheduler.counts().num_running, scheduler.counts().num_waiting) == (2, 1)


def test_a_request_for_no_tokens_ends_with_its_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1, max_tokens=0, params={"prompt_logprobs": 0}))
    (event,) = step(scheduler)[1]
    assert (event.token_id, event.finish_reason) == (None, FinishReason.LENGTH)
    assert event.prompt_logprobs is not None
    assert len(event.prompt_logprobs) == 3


# ---- the end ------------------------------------------------------------------------------


def test_a_stop_id_ends_the_request_and_is_reported() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1, stop_ids=frozenset({WORD})))
    (event,) = step(scheduler)[1]
    assert (event.token_id, event.finish_reason) == (WORD, FinishReason.STOP)


def test_stop_ids_are_banned_until_min_tokens() -> None:
    scheduler = make_scheduler()
    stop_ids = frozenset({9, WORD, 8})
    scheduler.add(make_request(1, stop_ids=stop_ids, params={"min_tokens": 2}))
    banned = []
    while scheduler.has_work:
        made = plan(scheduler)
        assert made.chunks[0].sampling is not None
        banned.append(made.chunks[0].sampling.banned_ids)
        (event,) = complete(scheduler, made)
    assert banned == [(7, 8, 9), (7, 8, 9), ()]
    assert event.finish_reason is FinishReason.STOP


def test_histories_are_sent_only_to_penalties() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1, params={"presence_penalty": 1.0}))
    scheduler.add(make_request(2))
    step(scheduler)
    step(scheduler)
    penalised, plain = (chunk.sampling for chunk in plan(scheduler).chunks)
    assert penalised is not None and plain is not None
    assert penalised.prompt_history == [100, 101, 102, 103]
    assert penalised.output_history == [WORD, WORD]
    assert (plain.prompt_history, plain.output_history) == ([], [])


# ---- refusals -----------------------------------------------------------------------------


def test_what_can_never_run_is_refused_with_the_numbers() -> None:
    scheduler = make_scheduler(num_blocks=8, max_context=30)
    with pytest.raises(InvalidRequest, match="empty"):
        scheduler.add(make_request(1, num_prompt=0))
    with pytest.raises(ContextTooLong, match=r"25 .*max_tokens=6 .*31.*context of 30"):
        scheduler.add(make_request(1, num_prompt=25, max_tokens=6))
    scheduler.add(make_request(1, num_prompt=24, max_tokens=6))
    small = make_scheduler(num_blocks=2)
    with pytest.raises(ContextTooLong, match="KV cache of 8"):
        small.add(make_request(1, num_prompt=4, max_tokens=5))
    with pytest.raises(ContextTooLong, match=r"33 .*one step, which holds 32"):
        make_scheduler().add(make_request(1, num_prompt=33, splittable=False, pooling=True))


def test_a_full_queue_refuses_and_says_when_to_return() -> None:
    scheduler = make_scheduler(max_waiting=2)
    scheduler.add_all([make_request(1), make_request(2)])
    with pytest.raises(QueueFull, match="2 requests are waiting") as refusal:
        scheduler.add(make_request(3))
    assert refusal.value.retry_after_s >= 1.0
    step(scheduler)
    scheduler.add(make_request(3))


def test_retry_after_follows_the_pace_of_admissions() -> None:
    scheduler = make_scheduler(max_waiting=4, max_running=1)
    scheduler.add_all([make_request(i, max_tokens=1) for i in range(4)])
    for i in range(3):
        made = scheduler.plan(now_s=10.0 * i)
        assert made is not None
        complete(scheduler, made)
    with pytest.raises(QueueFull) as refusal:
        scheduler.add_all([make_request(i) for i in range(10, 14)])
    assert refusal.value.retry_after_s == pytest.approx(10.0)


def test_a_group_is_refused_as_a_whole() -> None:
    scheduler = make_scheduler(max_waiting=3)
    with pytest.raises(ContextTooLong):
        scheduler.add_all([make_request(1), make_request(2, num_prompt=500)])
    scheduler.add_all([make_request(1), make_request(2)])
    with pytest.raises(QueueFull):
        scheduler.add_all([make_request(3), make_request(4)])
    with pytest.raises(InvalidRequest, match="4 samples"):
        scheduler.add_all([make_request(i) for i in range(10, 14)])
    assert scheduler.counts().num_waiting == 2
    scheduler.check()


# ---- leaving ------------------------------------------------------------------------------


def test_cancel_before_during_and_after() -> None:
    scheduler = make_scheduler(max_in_flight=2)
    scheduler.add(make_request(1))
    event = scheduler.cancel(1)
    assert event == Event(request_id=1, finish_reason=FinishReason.CANCELLED)
    assert scheduler.cancel(1) is None
    assert not scheduler.has_work

    scheduler.add(make_request(2))
    made = plan(scheduler)
    assert scheduler.cancel(2) is not None
    scheduler.check()
    assert scheduler.has_work
    assert scheduler.counts().num_used_blocks == 1, "a plan in flight writes to it"
    assert complete(scheduler, made) == []
    assert scheduler.counts().num_used_blocks == 0
    assert not scheduler.has_work


def test_finish_ends_without_an_event() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1))
    step(scheduler)
    scheduler.finish(1)
    scheduler.finish(1)
    scheduler.check()
    assert not scheduler.has_work


def test_an_id_may_be_used_again_after_its_end_but_not_before() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1))
    with pytest.raises(InternalError, match="in use"):
        scheduler.add(make_request(1))
    scheduler.cancel(1)
    scheduler.add(make_request(1))
    assert len(drain(scheduler)) == 8


# ---- several plans in flight --------------------------------------------------------------


def test_outstanding_plans_share_the_running_requests_evenly() -> None:
    scheduler = make_scheduler(max_in_flight=2)
    scheduler.add_all([make_request(i) for i in range(4)])
    step(scheduler)
    first, second = plan(scheduler), plan(scheduler)
    assert (set(sizes(first)), set(sizes(second))) == ({0, 1}, {2, 3})
    assert scheduler.plan(0.0) is None
    complete(scheduler, second)
    assert set(sizes(plan(scheduler))) == {2, 3}


# ---- failures -----------------------------------------------------------------------------


def test_a_new_epoch_voids_plans_and_keeps_tokens() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1, num_prompt=6))
    step(scheduler)
    lost = plan(scheduler)
    scheduler.new_epoch(1, cache_lost=False)
    scheduler.check()
    assert complete(scheduler, lost) == []
    again = plan(scheduler)
    (chunk,) = again.chunks
    assert again.epoch == 1
    assert (chunk.start, chunk.tokens) == (4, [104, 105, WORD])
    assert len(complete(scheduler, again)) == 1
    with pytest.raises(InternalError, match="epoch 1"):
        scheduler.new_epoch(1, cache_lost=False)


def test_a_lost_cache_is_not_trusted() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1, num_prompt=6))
    step(scheduler)
    scheduler.new_epoch(1, cache_lost=True)
    scheduler.check()
    assert plan(scheduler).chunks[0].start == 0


def test_stale_and_unknown_results_do_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1))
    made = plan(scheduler)
    results = [answer(made.chunks[0])]
    assert scheduler.complete(StepResult(epoch=0, step=99, results=results)) == []
    assert scheduler.complete(StepResult(epoch=7, step=made.step, results=results)) == []
    assert len(complete(scheduler, made)) == 1
    assert complete(scheduler, made) == []


def test_a_result_that_is_not_what_was_asked_for_is_our_bug_and_changes_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1, params={"prompt_logprobs": 0}))
    made = plan(scheduler)
    for wrong in (
        ChunkResult(request_id=1),
        ChunkResult(request_id=1, token_ids=[WORD]),
        ChunkResult(request_id=2, token_ids=[WORD]),
    ):
        with pytest.raises(InternalError, match="request 1"):
            complete(scheduler, made, lambda _chunk, wrong=wrong: wrong)
    assert len(complete(scheduler, made)) == 1


def test_a_long_prompt_fills_every_plan_in_flight() -> None:
    """A pipeline's second stage must not idle while the first computes the rest of a prompt."""
    scheduler = make_scheduler(max_in_flight=3, max_step_tokens=12)
    scheduler.add(make_request(1, num_prompt=10))
    plans = [plan(scheduler) for _ in range(3)]
    assert [(p.chunks[0].start, len(p.chunks[0].tokens)) for p in plans] == [(0, 4), (4, 4), (8, 2)]
    assert [p.chunks[0].sampling is not None for p in plans] == [False, False, True]
    assert scheduler.plan(0.0) is None
    events = [complete(scheduler, p) for p in plans]
    assert [len(e) for e in events] == [0, 0, 1]
    assert plan(scheduler).chunks[0].tokens == [WORD]


def test_a_request_preempted_with_chunks_in_flight_goes_when_the_last_has_landed() -> None:
    scheduler = make_scheduler(max_in_flight=2, max_step_tokens=8)
    scheduler.add(make_request(1, num_prompt=12))
    plans = [plan(scheduler), plan(scheduler)]
    scheduler.preempt([1], "drain")
    complete(scheduler, plans[0])
    assert scheduler.running_ids == [1]
    assert scheduler.plan(0.0) is None, "its rest must wait until it runs again"
    complete(scheduler, plans[1])
    assert scheduler.running_ids == []
    assert scheduler.preemptions_by_reason == {"drain": 1}
    # The blocks that were full are still cached.
    assert plan(scheduler).chunks[0].start == 8
