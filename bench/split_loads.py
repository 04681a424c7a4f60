"""The loads that benchmarks put on split models, and who runs them."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec
import psutil
from msgspec import structs

from shoal.evaluate.latency import Trace
from shoal.evaluate.load import LoadSpec, Piece, Prompt, cut_prompts, run_load
from shoal.evaluate.perplexity import english_text
from shoal.fleet.deployment import AnyEngine, Deployment
from shoal.request import SamplingParams

MODEL = "smollm2-135m"
KV_BYTES = 640_000_000


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """`num_streams` prompts at once, each answered with exactly `max_tokens`."""

    name: str
    num_streams: int
    prompt_tokens: int
    max_tokens: int

    def spec(self, seed: int) -> LoadSpec:
        return LoadSpec(
            num_requests=self.num_streams,
            concurrency=self.num_streams,
            prompt_tokens=self.prompt_tokens,
            max_tokens=self.max_tokens,
            seed=seed,
        )


class EngineTarget:
    """A `Target` of `shoal.evaluate.load`."""

    def __init__(self, engine: AnyEngine) -> None:
        self._engine = engine

    async def tokenize(self, text: str) -> list[int]:
        return self._engine.tokenizer.encode(text, add_special=False)

    async def answer(self, prompt: Prompt, max_tokens: int) -> AsyncIterator[Piece]:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        num_tokens = 0
        async for delta in self._engine.submit(prompt, params):
            num_tokens += len(delta.token_ids)
            yield Piece(has_tokens=bool(delta.token_ids))
        yield Piece(has_tokens=False, num_output_tokens=num_tokens)


class Contestant:
    """A loaded model, and the processes that it has started."""

    def __init__(self, name: str, start: Callable[[], Deployment]) -> None:
        before = _children()
        self.name = name
        self.deployment = start()
        self._processes = [psutil.Process(pid) for pid in _children() - before]

    def run(self, work: Work, seed: int) -> list[Trace]:
        engine = self.deployment.engine
        tokens = engine.tokenizer.encode(english_text(), add_special=False)
        spec = work.spec(seed)
        traces = asyncio.run(run_load(EngineTarget(engine), cut_prompts(tokens, spec), spec))
        errors = [trace.error for trace in traces if trace.error is not None]
        if errors:
            raise RuntimeError(f"{self.name}: {errors[0]}")
        return traces

    def workers_cpu_s(self) -> float:
        """Processor time its worker processes have used."""
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)


def tokens_per_s(work: Work, traces: Sequence[Trace]) -> float:
    """Of a prompt alone, from its sending to its first token. Else of decoding: what came while
    all streams had begun and none had ended.
    """
    if work.max_tokens == 1:
        sent_s = min(trace.sent_s for trace in traces)
        last_s = max(trace.arrivals_s[0] for trace in traces)
        return work.num_streams * work.prompt_tokens / (last_s - sent_s)
    first_s = max(trace.arrivals_s[0] for trace in traces)
    last_s = min(trace.arrivals_s[-1] for trace in traces)
    arrivals_s = [arrival_s for trace in traces for arrival_s in trace.arrivals_s]
    return sum(first_s < arrival_s <= last_s for arrival_s in arrivals_s) / (last_s - first_s)


class Rates:
    """Tokens per second by work and contestant, a list of one for each round."""

    def __init__(self) -> None:
        self._rates: dict[tuple[str, str], list[float]] = {}

    def add(self, work: Work, name: str, rate: float) -> None:
        self._rates.setdefault((work.name, name), []).append(rate)

    def median(self, work: Work, name: str) -> float:
        return statistics.median(self._rates[work.name, name])

    def ratios(self, work: Work, name: str, base: str) -> list[float]:
        """Round by round, in rising order."""
        pairs = zip(self._rates[work.name, name], self._rates[work.name, base], strict=True)
        return sorted(rate / base_rate for rate, base_rate in pairs)


def measure_in_turn(
    contestants: Mapping[str, Contestant],
    contests: Mapping[Work, Sequence[str]],
    num_rounds: int,
    *,
    report: Callable[[str], None],
) -> tuple[Rates, float]:
    """Every round gives each work to each of its contestants in turn, after a round unmeasured.

    Also returns the largest part of a core that the workers of those who were not at work used.
    """
    rates, idle_share = Rates(), 0.0
    for number in range(num_rounds + 1):
        report(f"round {number} of {num_rounds}" if number else "warming up")
        for work, names in contests.items():
            for name in names:
                idle = [each for each in contestants.values() if each.name != name]
                start_s, cpu_s = time.perf_counter(), sum(each.workers_cpu_s() for each in idle)
                task = work if number else structs.replace(work, max_tokens=min(work.max_tokens, 4))
                rate = tokens_per_s(task, contestants[name].run(task, seed=number))
                used_s = sum(each.workers_cpu_s() for each in idle) - cpu_s
                if number:
                    rates.add(work, name, rate)
                    idle_share = max(idle_share, used_s / (time.perf_counter() - start_s))
    return rates, idle_share


def idle_cores(contestants: Sequence[Contestant], seconds: float) -> tuple[float, float]:
    """What this process and all worker processes use of a core while nothing is asked of them."""
    own = psutil.Process()
    own_s, workers_s = sum(own.cpu_times()[:2]), sum(c.workers_cpu_s() for c in contestants)
    time.sleep(seconds)
    own_s = sum(own.cpu_times()[:2]) - own_s
    workers_s = sum(c.workers_cpu_s() for c in contestants) - workers_s
    return own_s / seconds, workers_s / seconds


def _children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}
