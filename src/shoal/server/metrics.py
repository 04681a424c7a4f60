"""What Prometheus sees of one server: the engine's counts, and what clients waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from shoal.engine.api import RECOVERY_BOUNDS_S, AsyncEngine, Delta, EngineStats

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAP_S = (0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
_LENGTH_TOKENS = tuple(2**power for power in range(18))

_GAUGES = {
    "num_waiting": "Samples waiting for their first step",
    "num_running": "Samples being computed",
    "num_blocks": "KV cache blocks there are",
    "num_used_blocks": "KV cache blocks held by running samples",
    "num_cached_blocks": "KV cache blocks kept for prompts that share a prefix",
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of the samples started",
    "prefix_hit_tokens": "Prompt tokens found in the KV cache",
    "generated_tokens": "Tokens drawn",
    "drafted_tokens": "Tokens guessed ahead of being drawn",
    "accepted_tokens": "Guessed tokens that were right: each saved a step",
    "preemptions": "Running samples put back to wait",
    "steps": "Forward passes",
    "step_seconds": "Time spent in forward passes",
    "schedule_seconds": "Time spent deciding what runs next",
    "epoch": "Times that workers have formed anew: after a loss, a drain, a rebalance",
}


_WORKER_COUNTERS = {
    "steps": "Steps a worker took part in",
    "busy_seconds": "Time a worker computed",
    "waiting_seconds": "Time a worker waited for the previous stage in the middle of a step",
    "bubble_seconds": "Time a worker did not compute while its replica had a plan under way",
    "stage_bytes": "Bytes sent to the next stage",
    "stage_messages": "Messages sent to the next stage",
    "rank_bytes": "Bytes handed to other ranks of the stage",
    "rank_messages": "Messages handed to other ranks of the stage",
}


class EngineCollector(Collector):
    """Reads `engine.stats()` when Prometheus asks, so that nothing is counted twice."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for field, text in _GAUGES.items():
            yield GaugeMetricFamily(f"shoal_{field}", text, value=getattr(stats, field))
        for field, text in _COUNTERS.items():
            yield CounterMetricFamily(f"shoal_{field}", text, value=getattr(stats, field))
        usage = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
        yield GaugeMetricFamily("shoal_kv_usage_ratio", "Part of the KV cache in use", value=usage)
        if stats.replicas:
            yield from _by_replica(stats.replicas, GaugeMetricFamily, _GAUGES)
            yield from _by_replica(stats.replicas, CounterMetricFamily, _COUNTERS)
        yield from _by_worker(stats.replicas or {"r0": stats})
        yield from _recoveries(stats.replicas or {"r0": stats})


def _by_replica(
    replicas: dict[str, EngineStats],
    family: type[GaugeMetricFamily | CounterMetricFamily],
    fields: dict[str, str],
) -> Iterator[Metric]:
    """Families of their own, so that adding up `shoal_…` counts nothing twice."""
    for field, text in fields.items():
        metric = family(f"shoal_replica_{field}", f"{text}, by replica", labels=["replica"])
        for name, stats in replicas.items():
            metric.add_metric([name], getattr(stats, field))
        yield metric


def _by_worker(replicas: dict[str, EngineStats]) -> Iterator[Metric]:
    """By seat, not by process: a worker that is replaced goes on where the last one ended."""
    labels = ["replica", "stage", "rank", "node"]
    workers = [(name, worker) for name, stats in replicas.items() for worker in stats.workers]
    for field, text in _WORKER_COUNTERS.items() if workers else ():
        metric = CounterMetricFamily(f"shoal_worker_{field}", text, labels=labels)
        for name, worker in workers:
            place = [name, str(worker.stage), str(worker.rank), worker.node]
            metric.add_metric(place, getattr(worker, field))
        yield metric


def _recoveries(replicas: dict[str, EngineStats]) -> Iterator[Metric]:
    tallies = {name: stats.recoveries for name, stats in replicas.items()}
    ended = CounterMetricFamily(
        "shoal_recoveries",
        "Incidents that have ended: losses of workers, drains, rebalances",
        labels=["replica", "noticed_by", "outcome"],
    )
    phases = CounterMetricFamily(
        "shoal_recovery_phase_seconds",
        "Time spent in each phase of the incidents that ended well",
        labels=["replica", "phase"],
    )
    totals = HistogramMetricFamily(
        "shoal_recovery_seconds",
        "From noticing a loss to the first new token of a request that it had stopped",
        labels=["replica"],
    )
    for name, tally in tallies.items():
        for noticed_by, outcome, number in tally.ended:
            ended.add_metric([name, noticed_by, outcome], number)
        for phase, seconds in tally.phase_seconds.items():
            if phase != "total":
                phases.add_metric([name, phase], seconds)
        number = sum(count for _, outcome, count in tally.ended if outcome == "recovered")
        if number:
            bounds = [*map(str, RECOVERY_BOUNDS_S), "+Inf"]
            buckets = list(zip(bounds, [*tally.num_within, number], strict=True))
            totals.add_metric([name], buckets, tally.phase_seconds.get("total", 0.0))
    yield from (ended, phases, totals)


class Metrics:
    """One registry per app: two servers in one process do not mix their numbers."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        ProcessCollector(registry=self.registry)
        self.responses = Counter(
            "shoal_http_responses",
            "HTTP responses begun",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.samples = Counter(
            "shoal_samples",
            "Samples ended; cancelled: the client left, failed: the engine gave up",
            ["endpoint", "finish_reason"],
            registry=self.registry,
        )
        self.first_token_s = self._histogram(
            "time_to_first_token_seconds", "From submission to a sample's first token", _LATENCY_S
        )
        self.inter_token_s = self._histogram(
            "inter_token_seconds", "Between one token of a sample and the next", _GAP_S
        )
        self.request_s = self._histogram(
            "request_seconds", "From submission to a request's last token", _LATENCY_S
        )
        self.prompt_length = self._histogram(
            "prompt_length_tokens", "Tokens per prompt", _LENGTH_TOKENS
        )
        self.generation_length = self._histogram(
            "generation_length_tokens", "Tokens per finished sample", _LENGTH_TOKENS
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"shoal_{name}", text, buckets=buckets, registry=self.registry)


class GenerationMeter:
    """Measures one request's samples from their deltas."""

    def __init__(
        self, metrics: Metrics, endpoint: str, num_samples: int, *, num_ended: int = 0
    ) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._start_s = time.perf_counter()
        self._last_token_s: list[float | None] = [None] * num_samples
        self._num_tokens = [0] * num_samples
        self._num_open = num_samples - num_ended

    def record(self, sample: int, delta: Delta) -> None:
        if delta.token_ids:
            self._record_tokens(sample, len(delta.token_ids))
        if delta.finish_reason is not None:
            self._metrics.generation_length.observe(self._num_tokens[sample])
            self._end(1, delta.finish_reason.value)
            if self._num_open == 0:
                self._metrics.request_s.observe(time.perf_counter() - self._start_s)

    def give_up(self, reason: str) -> None:
        """The samples still open end here, for `reason`."""
        self._end(self._num_open, reason)

    def _record_tokens(self, sample: int, num_tokens: int) -> None:
        now_s = time.perf_counter()
        last_s = self._last_token_s[sample]
        if last_s is None:
            self._metrics.first_token_s.observe(now_s - self._start_s)
        else:
            for _ in range(num_tokens):
                self._metrics.inter_token_s.observe((now_s - last_s) / num_tokens)
        self._last_token_s[sample] = now_s
        self._num_tokens[sample] += num_tokens

    def _end(self, num_samples: int, reason: str) -> None:
        if num_samples:
            self._metrics.samples.labels(self._endpoint, reason).inc(num_samples)
            self._num_open -= num_samples
