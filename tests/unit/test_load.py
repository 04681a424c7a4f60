"""Load tests: percentiles, summaries of known times, prompts, arrivals, and the running of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError, InvalidRequest, QueueFull
from shoal.evaluate.latency import Trace, percentile, summarise
from shoal.evaluate.load import LoadSpec, Piece, arrival_times, cut_prompts, run_load


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
    st.floats(0, 100),
)
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(
        float(np.percentile(values, percent)), rel=1e-9, abs=1e-6
    )


def test_no_percentile_of_nothing() -> None:
    with pytest.raises(InvalidRequest):
        percentile([], 50)


def trace(sent_s: float, *arrivals_s: float, error: str | None = None) -> Trace:
    return Trace(
        sent_s=sent_s,
        ended_s=arrivals_s[-1] if arrivals_s else sent_s,
        arrivals_s=list(arrivals_s),
        num_prompt_tokens=10,
        num_cached_tokens=2,
        num_output_tokens=len(arrivals_s),
        error=error,
    )


def test_summary_of_known_times() -> None:
    report = summarise([trace(0.0, 1.0, 1.5, 2.0), trace(1.0, 3.0, 4.0, 5.0)])
    assert report.elapsed_s == 5.0
    assert report.output_tokens_per_s == pytest.approx(6 / 5)
    assert report.total_tokens_per_s == pytest.approx(26 / 5)
    assert report.num_cached_tokens == 4
    assert report.ttft is not None and report.ttft.mean_ms == pytest.approx(1500)
    assert report.gap is not None and report.gap.p50_ms == pytest.approx(750)
    assert report.tpot is not None and report.tpot.p50_ms == pytest.approx(750)
    assert report.latency is not None and report.latency.p99_ms == pytest.approx(3980)


def test_failed_requests_are_counted_and_not_timed() -> None:
    report = summarise([trace(0.0, 1.0, 2.0), trace(0.0, error="full"), trace(0.0, error="full")])
    assert (report.num_requests, report.num_errors, report.errors) == (3, 2, {"full": 2})
    assert report.num_output_tokens == 2
    assert report.ttft is not None and report.ttft.p99_ms == pytest.approx(1000)


def test_all_failed() -> None:
    report = summarise([trace(0.0, error="no")])
    assert report.ttft is None and report.output_tokens_per_s == 0


def test_prompts_have_exact_lengths_and_go_round() -> None:
    spec = LoadSpec(num_requests=20, prompt_tokens=7, seed=3)
    prompts = cut_prompts([0, 1, 2, 3, 4], spec)
    assert len(prompts) == 20
    assert all(len(prompt) == 7 for prompt in prompts)
    assert all((b - a) % 5 == 1 for p in prompts for a, b in pairwise(p))
    assert prompts == cut_prompts([0, 1, 2, 3, 4], spec)
    assert prompts != cut_prompts([0, 1, 2, 3, 4], LoadSpec(num_requests=20, prompt_tokens=7))


def test_arrivals_have_the_rate() -> None:
    times = arrival_times(LoadSpec(num_requests=2000, rate_per_s=4.0))
    assert times == sorted(times) and times[0] == 0
    assert times[-1] / 1999 == pytest.approx(1 / 4, rel=0.1)
    assert arrival_times(LoadSpec(num_requests=2)) == [0.0, 0.0]


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"max_tokens": -1}, {"rate_per_s": 0.0}])
def test_absurd_loads_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="positive"):
        LoadSpec(**wrong)


class FakeTarget:
    """Sends `num_sent` tokens whatever was asked, or refuses."""

    def __init__(self, *, num_missing: int = 0, refuses: bool = False) -> None:
        self.num_open = self.most_open = 0
        self._num_missing = num_missing
        self._refuses = refuses

    async def tokenize(self, text: str) -> list[int]:
        return [len(text)]

    async def answer(self, prompt: list[int], max_tokens: int) -> AsyncIterator[Piece]:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            if self._refuses:
                raise QueueFull("too much is waiting")
            for _ in range(max_tokens - self._num_missing):
                await asyncio.sleep(0)
                yield Piece(has_tokens=True)
            yield Piece(
                has_tokens=False,
                num_prompt_tokens=len(prompt),
                num_output_tokens=max_tokens - self._num_missing,
            )
        finally:
            self.num_open -= 1


def load(target: FakeTarget, spec: LoadSpec) -> list[Trace]:
    return asyncio.run(run_load(target, cut_prompts([1, 2, 3], spec), spec))


def test_no_more_are_open_than_asked() -> None:
    target = FakeTarget()
    traces = load(target, LoadSpec(num_requests=12, concurrency=3, max_tokens=5))
    assert target.most_open == 3
    assert [len(trace.arrivals_s) for trace in traces] == [5] * 12
    assert all(trace.error is None for trace in traces)


def test_with_a_rate_nothing_waits_for_a_seat() -> None:
    target = FakeTarget()
    load(target, LoadSpec(num_requests=12, concurrency=1, rate_per_s=1e6, max_tokens=50))
    assert target.most_open > 1


def test_a_short_answer_is_an_error() -> None:
    traces = load(FakeTarget(num_missing=1), LoadSpec(num_requests=1, max_tokens=5))
    assert traces[0].error == "asked for 5 tokens, 4 came"


def test_a_refusal_is_an_error() -> None:
    traces = load(FakeTarget(refuses=True), LoadSpec(num_requests=2, max_tokens=5))
    assert [trace.error for trace in traces] == ["too much is waiting"] * 2
