"""What a load consists of, and which of its answers were good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from bench.goodput import goodput, keeps, parse_limits
from bench.serve import Row, record_of, row_of, table_of
from bench.serving_loads import (
    WORKLOADS,
    Sent,
    Workload,
    conversations_of,
    num_conversations,
    send_all,
)
from shoal.errors import OperatorError
from shoal.evaluate.latency import Trace
from shoal.evaluate.load import LoadSpec, Piece, Prompt, arrival_times

TEXT = list(range(2000))
CHAT = Workload(
    name="chat", question_tokens=8, answer_tokens=2, shared_tokens=20, num_turns=3, rates=(1.0,)
)
LIMITS = {"ttft": 1000.0, "tpot": 100.0}


def trace(arrivals_s: Sequence[float], **more: Any) -> Trace:
    return Trace(
        sent_s=0.0,
        ended_s=arrivals_s[-1],
        arrivals_s=list(arrivals_s),
        num_output_tokens=len(arrivals_s),
        **more,
    )


def test_limits_are_spelt_as_in_vllm() -> None:
    assert parse_limits(["ttft:1000", "tpot:100"]) == LIMITS
    for wrong in ("ttft", "itl:5", "tpot:soon", "e2el:0"):
        with pytest.raises(ValueError, match=wrong.partition(":")[2] or wrong):
            parse_limits([wrong])


def test_an_answer_is_good_if_it_keeps_every_limit() -> None:
    # One long gap is no matter as long as the mean is short.
    assert keeps(trace([1.0, 1.01, 1.2]), LIMITS)
    assert not keeps(trace([1.001, 1.01]), LIMITS)
    assert not keeps(trace([0.5, 0.7]), LIMITS)
    assert keeps(trace([0.5]), LIMITS)
    assert not keeps(trace([0.5, 0.51], error="it broke"), LIMITS)
    assert not keeps(trace([0.5, 0.51]), LIMITS | {"e2el": 500.0})


def test_goodput_counts_failures_among_all() -> None:
    traces = [trace([0.5, 0.6]), trace([2.0, 2.1]), trace([0.5, 0.6], error="x"), trace([0.1, 0.2])]
    good = goodput(traces, LIMITS, elapsed_s=4.0)
    assert (good.share, good.requests_per_s) == (0.5, 0.5)
    with pytest.raises(ValueError, match="no request"):
        goodput([], LIMITS, 1.0)


def test_so_many_conversations_that_requests_come_at_the_rate() -> None:
    assert num_conversations(CHAT, rate_per_s=6.0, seconds=10.0) == 20
    assert num_conversations(WORKLOADS["long"], rate_per_s=0.01, seconds=1.0) == 1


def test_conversations_have_nothing_in_common_but_what_they_share() -> None:
    conversations = conversations_of(CHAT, 5, TEXT)
    assert [len(question) for question in conversations[0]] == [28, 8, 8]
    assert {tuple(first[:20]) for first, *_ in conversations} == {tuple(TEXT[:20])}
    begins = [first[20] for first, *_ in conversations]
    begins += [question[0] for _, *rest in conversations for question in rest]
    assert len(set(begins)) == 15


def test_a_prompt_may_be_longer_than_the_text() -> None:
    (first,) = conversations_of(WORKLOADS["long"], 1, TEXT[:300])[0]
    assert len(first) == 2048


class ScriptedTarget:
    """Answers at once with counted tokens; fails for prompts that hold `poison`."""

    def __init__(self, poison: int = -1) -> None:
        self.prompts: list[Prompt] = []
        self._poison = poison

    async def tokenize(self, text: str) -> list[int]:
        return [len(text)]

    async def answer(self, prompt: Prompt, max_tokens: int) -> AsyncIterator[Piece]:
        self.prompts.append(prompt)
        if self._poison in prompt:
            raise OperatorError("poisoned")
        for number in range(max_tokens):
            yield Piece(has_tokens=True, token_ids=[-2 - number])
        yield Piece(has_tokens=False, num_output_tokens=max_tokens, num_cached_tokens=7)


def sent_to(target: ScriptedTarget, conversations: list[list[Prompt]]) -> Sent:
    return asyncio.run(send_all(target, conversations, rate_per_s=3000.0, answer_tokens=2, seed=0))


def test_a_turn_has_the_answers_before_it_in_its_prompt() -> None:
    target = ScriptedTarget()
    sent = sent_to(target, [[[1, 2], [3], [4, 5]]])
    assert target.prompts == [[1, 2], [1, 2, -2, -3, 3], [1, 2, -2, -3, 3, -2, -3, 4, 5]]
    assert [one.num_output_tokens for one in sent.traces] == [2, 2, 2]
    assert len(sent.late_s) == 1 and sent.late_s[0] >= 0


def test_conversations_begin_so_seldom_that_their_turns_come_at_the_rate() -> None:
    conversations = [[[1], [2], [3]] for _ in range(12)]
    sent = sent_to(ScriptedTarget(), conversations)
    planned_s = arrival_times(LoadSpec(num_requests=12, rate_per_s=1000.0, seed=0))
    begun_s = [one.sent_s for one in sent.traces[::3]]
    assert begun_s[-1] - begun_s[0] >= planned_s[-1] - sent.late_s[0]


def test_a_turn_that_fails_ends_its_conversation_only() -> None:
    sent = sent_to(ScriptedTarget(poison=3), [[[1], [3], [4]], [[5], [6], [7]]])
    assert [one.error for one in sent.traces] == [None, "poisoned", None, None, None]


def test_a_row_of_the_table() -> None:
    traces = [
        trace([0.5, 0.55], num_prompt_tokens=100, num_cached_tokens=60),
        trace([2.0, 2.05], num_prompt_tokens=100, num_cached_tokens=20),
    ]
    row: Row = row_of(2.0, Sent(traces=traces, late_s=[0.0, 0.01]), LIMITS)
    assert row.cached_share == 0.4
    told = record_of(row)
    assert told["goodput"]["share"] == 0.5
    assert told["ttft"]["p50_ms"] == pytest.approx(1250.0)
    cells = [next(iter(column.cells)) for column in table_of([row], LIMITS).columns]
    assert cells[:4] == ["2", "2", "1,250 / 1,850 / 1,985", "50 / 50 / 50"]
    assert cells[6:9] == ["50%", "0.49", "40%"]
