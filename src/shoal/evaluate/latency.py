"""What a load test measured: the times of each request, and their summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from shoal.errors import InvalidRequest


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Times are in seconds on one clock; `arrivals_s` are those of its pieces.

    A piece is a token, or the tokens that came together. With an `error` the rest is what came
    before it.
    """

    sent_s: float
    ended_s: float
    arrivals_s: list[float]
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """In milliseconds."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """Rates are per second of the whole run. Only requests without an error are timed.

    `ttft` is from sending to the first piece, `gap` between pieces of one request, `tpot` the
    mean time per token after the first of each request, `latency` from sending to the end.
    """

    num_requests: int
    num_errors: int
    elapsed_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft: Percentiles | None
    gap: Percentiles | None
    tpot: Percentiles | None
    latency: Percentiles | None
    errors: dict[str, int]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the closest ranks, as numpy's default. Raises InvalidRequest for none."""
    if not values or not 0 <= percent <= 100:
        raise InvalidRequest(f"no percentile {percent} of {len(values)} values")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def percentiles(values_s: Sequence[float]) -> Percentiles | None:
    """None when there is nothing to summarise."""
    if not values_s:
        return None
    return Percentiles(
        mean_ms=1000 * math.fsum(values_s) / len(values_s),
        p50_ms=1000 * percentile(values_s, 50),
        p90_ms=1000 * percentile(values_s, 90),
        p99_ms=1000 * percentile(values_s, 99),
    )


def summarise(traces: Sequence[Trace]) -> LoadReport:
    """From the first request sent to the last ended."""
    if not traces:
        raise InvalidRequest("no request was made")
    done = [trace for trace in traces if trace.error is None]
    elapsed_s = max(trace.ended_s for trace in traces) - min(trace.sent_s for trace in traces)
    num_prompt = sum(trace.num_prompt_tokens for trace in done)
    num_output = sum(trace.num_output_tokens for trace in done)
    per_s = 1 / elapsed_s if elapsed_s > 0 else 0.0
    return LoadReport(
        num_requests=len(traces),
        num_errors=len(traces) - len(done),
        elapsed_s=elapsed_s,
        num_prompt_tokens=num_prompt,
        num_cached_tokens=sum(trace.num_cached_tokens for trace in done),
        num_output_tokens=num_output,
        requests_per_s=len(done) * per_s,
        output_tokens_per_s=num_output * per_s,
        total_tokens_per_s=(num_prompt + num_output) * per_s,
        ttft=percentiles([trace.arrivals_s[0] - trace.sent_s for trace in done]),
        gap=percentiles([gap for trace in done for gap in _gaps(trace)]),
        tpot=percentiles([time_per_token(trace) for trace in done if trace.num_output_tokens > 1]),
        latency=percentiles([trace.ended_s - trace.sent_s for trace in done]),
        errors=_counted([trace.error for trace in traces if trace.error is not None]),
    )


def _gaps(trace: Trace) -> list[float]:
    arrivals_s = trace.arrivals_s
    return [after - before for before, after in pairwise(arrivals_s)]


def time_per_token(trace: Trace) -> float:
    """Mean seconds between the tokens of an answer of two at least."""
    return (trace.arrivals_s[-1] - trace.arrivals_s[0]) / (trace.num_output_tokens - 1)


def _counted(errors: list[str]) -> dict[str, int]:
    return {error: errors.count(error) for error in sorted(set(errors))}
