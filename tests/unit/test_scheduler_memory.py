"""Who gets the blocks: shared prefixes, groups of samples, preemption."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from scheduler_driver import (
    WORD,
    complete,
    drain,
    make_request,
    make_scheduler,
    plan,
    sizes,
    step,
    tokens_of,
)

from shoal.messages import Chunk, ChunkResult
from shoal.request import FinishReason, Request

# ---- shared prefixes ----------------------------------------------------------------------


def test_a_cached_prefix_is_shared_but_the_last_token_is_computed() -> None:
    scheduler = make_scheduler()
    prompt = list(range(8))
    scheduler.add(make_request(1, prompt_tokens=prompt, max_tokens=1))
    drain(scheduler)
    scheduler.add(make_request(2, prompt_tokens=prompt, max_tokens=1))
    scheduler.add(make_request(3, prompt_tokens=[*prompt, 50], max_tokens=1))
    made = plan(scheduler)
    assert sizes(made) == {2: 1, 3: 1}
    cached = {event.request_id: event.num_cached_tokens for event in complete(scheduler, made)}
    assert cached == {2: 7, 3: 8}
    counts = scheduler.counts()
    assert (counts.prompt_tokens, counts.prefix_hit_tokens) == (25, 15)


def test_what_is_computed_again_for_its_logits_is_stored_in_the_next_token_s_place() -> None:
    scheduler = make_scheduler(max_drafted=4)
    scheduler.add(make_request(1, prompt_tokens=[WORD] * 8, max_tokens=2))
    drain(scheduler)
    scheduler.add(make_request(2, prompt_tokens=[WORD] * 8, max_tokens=2))
    scheduler.add(make_request(3, prompt_tokens=[WORD] * 8, max_tokens=2))
    made = plan(scheduler)
    ours, theirs = made.chunks
    assert (ours.start, ours.tokens, ours.is_cached, ours.num_drafted) == (7, [WORD], True, 0)
    assert ours.block_ids[:2] == theirs.block_ids[:2], "the prompt's blocks are shared"
    assert ours.block_ids[2] != theirs.block_ids[2], "and not written"
    complete(scheduler, made)
    after = plan(scheduler).chunks[0]
    assert (after.start, after.block_ids, after.is_cached) == (8, ours.block_ids, False)


def test_who_draws_nothing_needs_no_room_for_another_token() -> None:
    scheduler = make_scheduler(num_blocks=2, max_context=8)
    for request_id in (1, 2):
        scheduler.add(make_request(request_id, prompt_tokens=[5] * 8, max_tokens=0))
        drain(scheduler)
    assert scheduler.counts().prefix_hit_tokens == 4


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
