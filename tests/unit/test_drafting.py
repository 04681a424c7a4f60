"""What is guessed, how much of it, and who gets room for it in a plan."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_driver import WORD, complete, make_request, make_scheduler, plan, step

from shoal.errors import InternalError
from shoal.messages import Chunk, ChunkResult
from shoal.schedule.drafting import Drafting
from shoal.schedule.lookup import PromptLookup
from shoal.schedule.scheduler import Scheduler

# ---- what is guessed ----------------------------------------------------------------------


def looked_up(tokens: list[int], at_most: int) -> list[int]:
    """As the lookup should, by looking through all tokens."""
    for length in (3, 2):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                longer = list(tokens)
                for _ in range(at_most):
                    longer.append(longer[end + len(longer) - len(tokens)])
                return longer[len(tokens) :]
    return []


def test_what_came_after_the_longest_run_comes_again() -> None:
    tokens = [1, 2, 3, 7, 8, 5, 2, 3, 9, 9, 1, 2, 3]
    assert PromptLookup().propose(tokens, 4) == [7, 8, 5, 2]  # three tokens before two
    assert PromptLookup().propose(tokens[1:], 4) == [9, 9, 1, 2]  # the latest two
    assert PromptLookup().propose(tokens, 0) == []
    assert PromptLookup().propose([1, 2, 3, 4, 3], 4) == []  # one says too little
    assert PromptLookup().propose([6], 4) == []


def test_what_repeats_itself_at_the_end_goes_on_in_its_period() -> None:
    assert PromptLookup().propose([1, 5, 6, 5, 6, 5], 5) == [6, 5, 6, 5, 6]
    assert PromptLookup().propose([4, 4, 4], 3) == [4, 4, 4]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 6), st.integers(0, 7))
def test_an_index_that_grows_finds_what_a_look_through_finds(
    tokens: list[int], stride: int, at_most: int
) -> None:
    lookup = PromptLookup()
    for number in [*range(1, len(tokens), stride), len(tokens)]:
        known = tokens[:number]
        assert lookup.propose(known, at_most) == looked_up(known, at_most)


def lines_run(lookup: PromptLookup, tokens: list[int]) -> int:
    """By one call, whatever else the machine does."""
    number = 0

    def trace(_frame: Any, event: str, _arg: Any) -> Any:
        nonlocal number
        number += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        lookup.propose(tokens, 8)
    finally:
        sys.settrace(before)
    return number


def test_a_call_costs_the_same_however_long_the_text_is() -> None:
    text = [i * i % 1009 for i in range(20_000)]
    lookup = PromptLookup()
    assert lines_run(lookup, text) < 4_000, "a long prompt is taken up in parts"
    for _ in range(len(text) // 512):
        lookup.propose(text, 8)
    assert lines_run(lookup, [*text, 1]) < 100


# ---- how much is guessed ------------------------------------------------------------------


class Ready:
    """Knows it all."""

    def propose(self, tokens: list[int], at_most: int) -> list[int]:
        return [len(tokens)] * at_most


def test_drafts_grow_while_they_are_right_and_shrink_when_not() -> None:
    drafting = Drafting(8, Ready())
    lengths = []
    for num_right in (2, 4, 8, 8, 3, 0, 0):
        lengths.append(len(drafting.propose([0], 100)))
        drafting.judge(lengths[-1], num_right)
    assert lengths == [2, 4, 8, 8, 8, 4, 2]
    assert drafting.propose([0], 1) == [1]


def test_who_guesses_wrong_again_and_again_rests_longer_each_time() -> None:
    drafting = Drafting(8, Ready())
    drafted = []
    for _ in range(300):
        draft = drafting.propose([0], 100)
        drafted.append(len(draft))
        if draft:
            drafting.judge(len(draft), 0)
    at = [i for i, number in enumerate(drafted) if number]
    assert [drafted[i] for i in at[:3]] == [2, 1, 1]
    rests = [late - early - 1 for early, late in pairwise(at[1:])]
    assert rests[:6] == [4, 8, 16, 32, 64, 64]
    while not (draft := drafting.propose([0], 100)):
        pass
    drafting.judge(1, 1)
    assert len(drafting.propose([0], 100)) == 2


# ---- room ---------------------------------------------------------------------------------


def saying_word(**options: Any) -> Scheduler:
    """With one request that has said the same word a few times, and drafts all it may by now."""
    scheduler = make_scheduler(max_drafted=8, max_context=256, **options)
    scheduler.add(make_request(1, max_tokens=100))
    while scheduler.counts().generated_tokens < 20:
        step(scheduler)
    return scheduler


def test_guesses_that_are_right_save_steps_and_are_counted() -> None:
    scheduler = saying_word()
    before = scheduler.counts()
    chunk = plan(scheduler).chunks[0]
    assert (chunk.num_drafted, chunk.tokens) == (7, [WORD] * 8)
    assert chunk.sampling is not None and chunk.sampling.position == chunk.start + 1
    assert len(chunk.block_ids) == -(-(chunk.start + 8) // 4)
    scheduler.new_epoch(1, cache_lost=True)
    scheduler.check()
    assert step(scheduler)[0] == {1: chunk.start + 1}  # all anew, and that draws the next token
    assert step(scheduler)[0] == {1: 8}
    after = scheduler.counts()
    assert after.generated_tokens - before.generated_tokens == 9
    assert after.drafted_tokens - before.drafted_tokens == 7
    assert after.accepted_tokens - before.accepted_tokens == 7


def test_guesses_end_where_the_answer_must() -> None:
    scheduler = saying_word()
    num_left = 100 - scheduler.counts().generated_tokens
    steps = []
    while scheduler.has_work:
        steps.append(step(scheduler)[0][1])
    assert sum(steps) == num_left, "not one row more than can be used"
    banning = make_scheduler(max_drafted=8)
    params = {"min_tokens": 13}
    banning.add(make_request(1, max_tokens=20, params=params, stop_ids=frozenset({3})))
    num_drawn = 0
    while banning.has_work:
        made = plan(banning)
        sampling = made.chunks[0].sampling
        assert sampling is not None
        first, last = num_drawn, num_drawn + made.chunks[0].num_drafted
        assert bool(sampling.banned_ids) == (first < 13) == (last < 13)
        num_drawn += len(complete(banning, made))
    assert num_drawn == 20
    assert banning.counts().accepted_tokens > 8


def test_prompts_go_before_guesses() -> None:
    scheduler = saying_word(max_step_tokens=8)
    scheduler.add(make_request(2, num_prompt=20, max_tokens=1))
    assert [step(scheduler)[0] for _ in range(3)] == [{1: 1, 2: 7}, {1: 1, 2: 7}, {1: 2, 2: 6}]
    assert step(scheduler)[0] == {1: 8}


def test_a_step_of_many_rows_has_no_guesses() -> None:
    scheduler = saying_word(max_step_tokens=64)
    scheduler.add(make_request(2, num_prompt=30, max_tokens=1))
    assert step(scheduler)[0] == {1: 1, 2: 30}
    assert step(scheduler)[0] == {1: 8}


def test_running_requests_share_the_room_for_guesses() -> None:
    scheduler = make_scheduler(max_drafted=8, max_context=256)
    scheduler.add_all([make_request(i, max_tokens=100) for i in range(1, 4)])
    while scheduler.counts().generated_tokens < 60:
        step(scheduler)
    assert step(scheduler)[0] == {1: 3, 2: 3, 3: 2}


def test_guesses_take_no_block_that_others_may_need_and_give_back_what_they_took() -> None:
    scheduler = saying_word(num_blocks=40)
    num_used = scheduler.counts().num_used_blocks
    made = plan(scheduler)
    assert scheduler.counts().num_used_blocks > num_used
    complete(scheduler, made, wrong)
    assert scheduler.counts().num_used_blocks in (num_used, num_used + 1)  # of the word it drew

    tight = make_scheduler(max_drafted=8, num_blocks=8, max_context=32)
    tight.add(make_request(1, num_prompt=4, max_tokens=28))
    others = [make_request(i, num_prompt=4, max_tokens=1) for i in range(2, 9)]
    while tight.has_work:
        if others:
            tight.add(others.pop())
        made = plan(tight)
        free = 8 - tight.counts().num_used_blocks
        decode = next((c for c in made.chunks if c.num_drafted), None)
        if decode is not None and len(decode.block_ids) > -(-(decode.start + 1) // 4):
            assert free >= len(tight.running_ids)
        complete(tight, made)
    assert tight.counts().preemptions == 0


def wrong(chunk: Chunk) -> ChunkResult:
    return ChunkResult(request_id=chunk.request_id, token_ids=[WORD + 1] if chunk.sampling else [])


def test_guesses_at_a_text_that_is_always_another_soon_cost_little() -> None:
    def contrary(chunk: Chunk) -> ChunkResult:
        guess = chunk.tokens[1] if chunk.num_drafted else WORD + 1
        token_id = WORD if guess != WORD else WORD + 1
        return ChunkResult(request_id=chunk.request_id, token_ids=[token_id])

    scheduler = make_scheduler(max_drafted=8)
    scheduler.add(make_request(1, max_tokens=120))
    while scheduler.has_work:
        complete(scheduler, plan(scheduler), contrary)
    counts = scheduler.counts()
    assert (counts.generated_tokens, counts.accepted_tokens) == (120, 0)
    assert 2 < counts.drafted_tokens < 10


@pytest.mark.parametrize("token_ids", [[], [WORD, 1, WORD], [WORD] * 10])
def test_a_result_that_was_not_drafted_is_our_bug_and_changes_nothing(
    token_ids: list[int],
) -> None:
    scheduler = saying_word()
    made = plan(scheduler)
    with pytest.raises(InternalError, match="request 1"):
        complete(scheduler, made, lambda _: ChunkResult(request_id=1, token_ids=token_ids))
    assert len(complete(scheduler, made)) == 8
