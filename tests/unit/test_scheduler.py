"""The scheduler's decisions, one by one. What must hold in any order is in the property tests."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from shoal.errors import ContextTooLong, InternalError, InvalidRequest, QueueFull
from shoal.messages import Chunk, ChunkResult, Event, Plan, StepResult, TokenLogprobs
from shoal.request import FinishReason, Request, SamplingParams
from shoal.schedule.scheduler import Scheduler

WORD = 7  # the token that the imaginary model always draws


def make_scheduler(**overrides: Any) -> Scheduler:
    options: dict[str, Any] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_context": 128,
        "max_step_tokens": 32,
        "max_running": 8,
        "max_waiting": 16,
    }
    return Scheduler(**(options | overrides))


def make_request(request_id: int, num_prompt: int = 4, **overrides: Any) -> Request:
    params = SamplingParams(**overrides.pop("params", {}))
    options: dict[str, Any] = {
        "prompt_tokens": [100 * request_id + i for i in range(num_prompt)],
        "max_tokens": 8,
        "seed": request_id,
        "arrival_s": float(request_id),
    }
    return Request(request_id=request_id, params=params, **(options | overrides))


def plan(scheduler: Scheduler) -> Plan:
    made = scheduler.plan(0.0)
    scheduler.check()
    assert made is not None
    return made


def answer(chunk: Chunk) -> ChunkResult:
    return ChunkResult(
        request_id=chunk.request_id,
        token_id=WORD if chunk.sampling else None,
        prompt_logprobs=[TokenLogprobs(-float(t), [], []) for t in chunk.score_targets],
        pooled=array("f", [float(len(chunk.tokens))]).tobytes() if chunk.pooling else b"",
    )


def complete(
    scheduler: Scheduler, done: Plan, answer: Callable[[Chunk], ChunkResult] = answer
) -> list[Event]:
    results = [answer(chunk) for chunk in done.chunks]
    events = scheduler.complete(StepResult(epoch=done.epoch, step=done.step, results=results))
    scheduler.check()
    return events


def step(scheduler: Scheduler) -> tuple[dict[int, int], list[Event]]:
    """One plan and its result: the number of tokens planned per request, and the events."""
    made = plan(scheduler)
    return sizes(made), complete(scheduler, made)


def sizes(made: Plan) -> dict[int, int]:
    return {chunk.request_id: len(chunk.tokens) for chunk in made.chunks}


def drain(scheduler: Scheduler) -> list[Event]:
    events = []
    while scheduler.has_work:
        events += step(scheduler)[1]
    return events


def tokens_of(events: Iterable[Event], request_id: int) -> list[int | None]:
    return [event.token_id for event in events if event.request_id == request_id]


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


# ---- shared prefixes ----------------------------------------------------------------------


def test_a_cached_prefix_is_shared_but_the_last_token_is_computed() -> None:
    scheduler = make_scheduler()
    prompt = list(range(8))
    scheduler.add(make_request(1, prompt_tokens=prompt, max_tokens=1))
    drain(scheduler)
    scheduler.add(make_request(2, prompt_tokens=prompt, max_tokens=1))
    scheduler.add(make_request(3, prompt_tokens=[*prompt, 50], max_tokens=1))
    made = plan(scheduler)
    assert sizes(made) == {2: 4, 3: 1}
    cached = {event.request_id: event.num_cached_tokens for event in complete(scheduler, made)}
    assert cached == {2: 4, 3: 8}
    counts = scheduler.counts()
    assert (counts.prompt_tokens, counts.prefix_hit_tokens) == (25, 12)


def test_emitted_tokens_are_cached_too() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1, num_prompt=4, max_tokens=5))
    drain(scheduler)
    conversation = [*make_request(1).prompt_tokens, *[WORD] * 5, 1]
    scheduler.add(make_request(2, prompt_tokens=conversation))
    assert step(scheduler)[0] == {2: 2}


@pytest.mark.parametrize(
    "overrides", [{"pooling": True}, {"params": {"prompt_logprobs": 1}}, {"splittable": False}]
)
def test_who_wants_something_of_every_token_skips_none(overrides: dict[str, Any]) -> None:
    scheduler = make_scheduler()
    prompt = list(range(8))
    scheduler.add(make_request(1, prompt_tokens=prompt, max_tokens=1))
    drain(scheduler)
    scheduler.add(make_request(2, prompt_tokens=prompt, **overrides))
    assert step(scheduler)[0] == {2: 8}


def test_blocks_of_an_unsplittable_prompt_are_never_shared() -> None:
    scheduler = make_scheduler()
    prompt = list(range(9))
    scheduler.add(make_request(1, prompt_tokens=prompt, splittable=False, pooling=True))
    drain(scheduler)
    scheduler.add(make_request(2, prompt_tokens=prompt))
    assert step(scheduler)[0] == {2: 9}


def test_nothing_is_shared_when_prefix_caching_is_off() -> None:
    scheduler = make_scheduler(prefix_caching=False)
    for i in range(2):
        scheduler.add(make_request(i, prompt_tokens=list(range(8)), group=1))
    assert step(scheduler)[0] == {0: 8, 1: 8}
    assert scheduler.counts().num_cached_blocks == 0


# ---- groups -------------------------------------------------------------------------------


def group_of(num_samples: int, num_prompt: int = 9) -> list[Request]:
    prompt = list(range(num_prompt))
    return [make_request(i, prompt_tokens=prompt, group=5) for i in range(num_samples)]


def test_samples_wait_for_the_first_and_share_its_prompt() -> None:
    scheduler = make_scheduler(max_step_tokens=5)
    scheduler.add_all(group_of(3))
    assert step(scheduler)[0] == {0: 5}
    assert step(scheduler)[0] == {0: 4}
    assert step(scheduler)[0] == {0: 1, 1: 1, 2: 1}
    assert scheduler.counts().prefix_hit_tokens == 16


def test_when_the_leader_leaves_the_next_sample_leads() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add_all(group_of(4))
    assert step(scheduler)[0] == {0: 8}
    scheduler.cancel(0)
    scheduler.cancel(2)
    assert step(scheduler)[0] == {1: 1}  # the rest of the prompt; 3 is held, tokens are left
    assert step(scheduler)[0] == {1: 1, 3: 1}


def test_a_preempted_leader_still_leads() -> None:
    scheduler = make_scheduler(max_step_tokens=6)
    scheduler.add_all(group_of(2))
    step(scheduler)
    scheduler.preempt([0], "drain")
    scheduler.check()
    assert step(scheduler)[0] == {0: 5}  # its first block is still cached
    assert step(scheduler)[0] == {0: 1, 1: 1}


# ---- preemption ---------------------------------------------------------------------------


def test_memory_shortage_preempts_the_lowest_rank_and_loses_no_token() -> None:
    scheduler = make_scheduler(num_blocks=4, max_context=16, prefix_caching=False)
    scheduler.add(make_request(1, num_prompt=8, max_tokens=8))
    scheduler.add(make_request(2, num_prompt=7, max_tokens=8))
    events = step(scheduler)[1]
    assert step(scheduler)[0] == {1: 1}  # 1 needs a third block: 2 gives up both of its own
    assert scheduler.preemptions_by_reason == {"memory": 1}
    assert len(tokens_of(events, 2)) == 1
    events = drain(scheduler)
    assert len(tokens_of(events, 2)) == 7
    assert scheduler.counts().generated_tokens == 16


def test_a_victim_of_this_plan_asks_for_nothing_more_in_it() -> None:
    scheduler = make_scheduler(num_blocks=14, max_step_tokens=14)
    scheduler.add(make_request(1, num_prompt=7))
    scheduler.add(make_request(3, num_prompt=7, priority=1))
    step(scheduler)
    scheduler.add(make_request(2, num_prompt=40))
    assert step(scheduler)[0] == {1: 1, 3: 1, 2: 12}
    assert step(scheduler)[0] == {1: 1, 2: 13}
    assert scheduler.preemptions_by_reason == {"memory": 1}


def test_a_preempted_request_recomputes_its_answer_as_prompt() -> None:
    scheduler = make_scheduler(prefix_caching=False)
    scheduler.add(make_request(1, num_prompt=4, params={"frequency_penalty": 1.0}))
    step(scheduler)
    step(scheduler)
    scheduler.preempt([1], "drain")
    scheduler.check()
    (chunk,) = plan(scheduler).chunks
    assert chunk.tokens == [100, 101, 102, 103, WORD, WORD]
    assert chunk.sampling is not None
    assert (chunk.sampling.position, chunk.sampling.output_history) == (6, [WORD, WORD])


def test_a_request_in_flight_is_preempted_when_it_lands() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1))
    made = plan(scheduler)
    scheduler.preempt([1, 99], "drain")
    scheduler.check()
    assert scheduler.counts().num_running == 1
    assert len(complete(scheduler, made)) == 1
    assert (scheduler.counts().num_running, scheduler.counts().num_waiting) == (0, 1)
    assert len(drain(scheduler)) == 7


def test_those_below_in_flight_are_waited_for() -> None:
    scheduler = make_scheduler(num_blocks=4, max_context=16, max_in_flight=2)
    scheduler.add(make_request(1, num_prompt=8, max_tokens=8))
    first = plan(scheduler)
    scheduler.add(make_request(2, num_prompt=7, max_tokens=8))
    second = plan(scheduler)
    complete(scheduler, first)
    assert scheduler.plan(0.0) is None  # 1 lacks a block, and keeps its own
    complete(scheduler, second)
    assert sizes(plan(scheduler)) == {1: 1}
    assert scheduler.preemptions_by_reason == {"memory": 1}


def test_better_priority_takes_the_place_of_worse_but_mere_arrival_does_not() -> None:
    scheduler = make_scheduler(max_running=1)
    scheduler.add(make_request(5, priority=1))
    step(scheduler)
    scheduler.add(make_request(1, priority=1))
    assert step(scheduler)[0] == {5: 1}
    scheduler.add(make_request(9, priority=0, max_tokens=1))
    assert step(scheduler)[0] == {9: 4}
    assert scheduler.preemptions_by_reason == {"priority": 1}


def test_prompt_logprobs_and_pooled_sums_are_collected_over_chunks() -> None:
    scheduler = make_scheduler(max_step_tokens=4, prefix_caching=False)
    scheduler.add(make_request(1, num_prompt=10, params={"prompt_logprobs": 0}, max_tokens=2))
    scheduler.add(make_request(2, num_prompt=10, pooling=True))
    events = drain(scheduler)
    scores = [e.prompt_logprobs for e in events if e.prompt_logprobs is not None]
    assert [[entry.logprob for entry in entries] for entries in scores] == [
        [-float(t) for t in range(101, 110)]
    ]
    (pooled,) = [event for event in events if event.pooled is not None]
    assert (pooled.request_id, pooled.finish_reason) == (2, FinishReason.STOP)
    assert pooled.pooled == array("f", [10.0]).tobytes()


def test_a_preemption_neither_repeats_prompt_logprobs_nor_doubles_pooled_sums() -> None:
    scheduler = make_scheduler(max_step_tokens=6)
    scheduler.add(make_request(1, num_prompt=10, params={"prompt_logprobs": 0}, max_tokens=3))
    step(scheduler)
    scheduler.preempt([1], "drain")
    scheduler.add(make_request(0, num_prompt=2, max_tokens=1))  # shifts the chunk borders
    events = step(scheduler)[1] + step(scheduler)[1] + step(scheduler)[1]
    scheduler.preempt([1], "drain")
    made = plan(scheduler)
    assert [chunk.score_targets for chunk in made.chunks] == [[]]
    assert made.chunks[0].start > 0, "all its scores are known: a prefix hit is welcome"
    events += complete(scheduler, made)
    (scores,) = [e.prompt_logprobs for e in events if e.prompt_logprobs is not None]
    assert [entry.logprob for entry in scores] == [-float(t) for t in range(101, 110)]

    scheduler = make_scheduler(max_step_tokens=6)
    scheduler.add(make_request(2, num_prompt=10, pooling=True))
    step(scheduler)
    scheduler.preempt([2], "drain")
    (event,) = drain(scheduler)
    assert event.pooled == array("f", [10.0]).tobytes()


def test_pooled_sums_round_like_float32() -> None:
    scheduler = make_scheduler(max_step_tokens=2)
    scheduler.add(make_request(1, num_prompt=6, pooling=True))
    parts = iter([2.0**24, 1.0, 1.0])

    def answer_part(chunk: Chunk) -> ChunkResult:
        return ChunkResult(request_id=chunk.request_id, pooled=array("f", [next(parts)]).tobytes())

    for _ in range(3):
        events = complete(scheduler, plan(scheduler), answer_part)
    assert events[0].pooled == array("f", [2.0**24]).tobytes()


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
        ChunkResult(request_id=1, token_id=WORD),
        ChunkResult(request_id=2, token_id=WORD),
    ):
        with pytest.raises(InternalError, match="request 1"):
            complete(scheduler, made, lambda _chunk, wrong=wrong: wrong)
    assert len(complete(scheduler, made)) == 1
