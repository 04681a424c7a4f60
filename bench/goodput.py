"""Which requests kept the limits that make an answer good for whoever waits for it.

Limits have the names and units of vLLM's `benchmark_serving --goodput`: `ttft` to the first token,
`tpot` the mean time per token after it, `e2el` the whole request, in milliseconds. A request that
failed keeps no limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from shoal.evaluate.latency import Trace, time_per_token

Limits = Mapping[str, float]

_TIMES_S: dict[str, Callable[[Trace], float]] = {
    "ttft": lambda trace: trace.arrivals_s[0] - trace.sent_s,
    # An answer of one token has no time between tokens.
    "tpot": lambda trace: time_per_token(trace) if trace.num_output_tokens > 1 else 0.0,
    "e2el": lambda trace: trace.ended_s - trace.sent_s,
}


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """`share` is of all requests; `requests_per_s` are those that kept every limit."""

    share: float
    requests_per_s: float


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """`["ttft:1000", "tpot:100"]`. Raises ValueError."""
    limits = {}
    for text in texts:
        name, _, value = text.partition(":")
        if name not in _TIMES_S:
            raise ValueError(f"'{text}' is no limit: write {' or '.join(_TIMES_S)}, : and ms")
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise ValueError(f"'{value}' in '{text}' is no number of milliseconds") from error
        if not limits[name] > 0:
            raise ValueError(f"the limit '{text}' must be above 0")
    return limits


def keeps(trace: Trace, limits: Limits) -> bool:
    if trace.error is not None:
        return False
    return all(_TIMES_S[name](trace) * 1e3 <= limit_ms for name, limit_ms in limits.items())


def goodput(traces: Sequence[Trace], limits: Limits, elapsed_s: float) -> Goodput:
    """Raises ValueError for no requests."""
    if not traces:
        raise ValueError("no request was made")
    num_good = sum(keeps(trace, limits) for trace in traces)
    return Goodput(share=num_good / len(traces), requests_per_s=num_good / elapsed_s)
