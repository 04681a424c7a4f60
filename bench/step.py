"""Where the time of a step goes, and what the machine's limit is: `python -m bench.step`.

Method: an engine in this process computes 1 or 32 streams (prompt 128, 64 new tokens) and prompts
of 512 tokens; counted are steps that are all decoding, or a whole prompt. Passes with wrappers
around the parts of the code (`frames.py`) alternate with passes without: the first say which part
has which share, the second how long a step takes. All means are over the quicker half of the steps,
so that parts add up. Waiting is the time in which the computing thread did not run: for neighbours,
or asleep; threads that spin at a barrier count as running. `between steps` is what the engine does
from one step's end to the next one's beginning: scheduling, publishing. The limit: `roofline.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from threading import Event
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from bench.frames import KERNELS
from bench.ratios import spread_of
from bench.roofline import Limit, Rates, Shape, limit_of, measure_rates, shape_of
from bench.step_log import Step, logged, periods_s, quicker_half
from bench.works import WORKS, Work, prompts_of
from shoal.config import EngineConfig
from shoal.engine.local import start_engine
from shoal.engine.serving import ServingEngine
from shoal.evaluate.perplexity import english_text
from shoal.request import SamplingParams
from shoal.weights.source import resolve
from shoal.worker.profile import usable_cores

_KV_BYTES = 2**29


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds. `parts` are of steps with wrappers, `framed_ms` is their sum; `step_ms` and
    `waiting_ms` are of steps without. `period_ms` is from step to step, None for prompts."""

    work: str
    num_steps: int
    step_ms: float
    framed_ms: float
    waiting_ms: float
    period_ms: float | None
    parts: dict[str, float]
    calls: dict[str, float]
    limit: Limit

    @property
    def between_share(self) -> float | None:
        """Of a period, that no step was computed."""
        return None if self.period_ms is None else 1 - self.step_ms / self.period_ms

    @property
    def python_share(self) -> float:
        """Of a period (of a step, for prompts), outside all kernels: scheduling included."""
        kernels = sum(ms for kind, ms in self.parts.items() if kind in KERNELS) / self.framed_ms
        return 1 - kernels * (1 - (self.between_share or 0.0))


def run_once(engine: ServingEngine, work: Work, turn: int, *, with_frames: bool) -> list[Step]:
    """The steps of one turn that are the work itself, in order."""
    text = engine.tokenizer.encode(english_text())
    prompts = prompts_of(work, turn, text)
    return own_steps(work, steps_of(engine, prompts, work.new_tokens, with_frames=with_frames))


def own_steps(work: Work, steps: Sequence[Step]) -> list[Step]:
    """Those that compute nothing but what the work is about."""
    rows = work.prompt_tokens if work.figure == "prefill" else work.num_streams
    return [
        step for step in steps if step.num_chunks == work.num_streams and step.load.rows == rows
    ]


def steps_of(
    engine: ServingEngine, prompts: Sequence[list[int]], new_tokens: int, *, with_frames: bool
) -> list[Step]:
    """All that answering these at once takes, in order."""
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    all_asked = Event()
    with logged(with_frames=with_frames, all_asked=all_asked) as steps:
        try:
            streams = [engine.submit_sync(prompt, params) for prompt in prompts]
        finally:
            all_asked.set()
        for stream in streams:
            for _ in stream:
                pass
    return steps


def account(
    work: Work,
    plain: Sequence[Step],
    framed: Sequence[Step],
    periods: Sequence[float],
    shape: Shape,
    rates: Rates,
) -> Account:
    quick, quick_framed = quicker_half(plain), quicker_half(framed)
    kinds = dict.fromkeys(kind for step in quick_framed for kind in step.seconds)
    ordered = sorted(periods)[: (len(periods) + 1) // 2]
    middle = sorted(quick, key=lambda step: step.load.keys)[len(quick) // 2]
    return Account(
        work=work.name,
        num_steps=len(plain),
        step_ms=mean_ms([step.s for step in quick]),
        framed_ms=mean_ms([sum(step.seconds.values()) for step in quick_framed]),
        waiting_ms=mean_ms([max(0.0, step.s - step.cpu_s) for step in quick]),
        period_ms=mean_ms(ordered) if ordered else None,
        parts={k: mean_ms([s.seconds.get(k, 0.0) for s in quick_framed]) for k in kinds},
        calls={k: statistics.fmean(s.calls.get(k, 1) for s in quick_framed) for k in kinds},
        limit=limit_of(shape, middle.load, rates),
    )


def mean_ms(seconds: Sequence[float]) -> float:
    return statistics.fmean(seconds) * 1e3


def measure(engine: ServingEngine, work: Work, rounds: int, shape: Shape, rates: Rates) -> Account:
    plain: list[Step] = []
    framed: list[Step] = []
    periods: list[float] = []
    # A prompt is one step, an answer dozens.
    turns = rounds * 4 if work.figure == "prefill" else rounds
    run_once(engine, work, 0, with_frames=False)
    for turn in range(turns):
        steps = run_once(engine, work, 2 * turn + 1, with_frames=False)
        plain += steps
        periods += periods_s(steps)
        framed += run_once(engine, work, 2 * turn + 2, with_frames=True)
    return account(work, plain, framed, periods, shape, rates)


def parts_table(accounts: Sequence[Account]) -> Table:
    table = Table("of a step")
    kinds = sorted(
        dict.fromkeys(kind for one in accounts for kind in one.parts),
        key=lambda kind: -sum(one.parts.get(kind, 0.0) / one.framed_ms for one in accounts),
    )
    for one in accounts:
        table.add_column(f"{one.work} ms", justify="right")
        table.add_column("share", justify="right")
        table.add_column("calls", justify="right")
    for kind in kinds:
        cells = []
        for one in accounts:
            ms = one.parts.get(kind, 0.0)
            share = ms / one.framed_ms
            cells += [f"{ms:.2f}", f"{share:.1%}", f"{one.calls.get(kind, 0.0):.0f}"]
        table.add_row(kind if kind in KERNELS else f"Python: {kind}", *cells)
    table.add_section()
    table.add_row("all", *(cell for one in accounts for cell in (f"{one.framed_ms:.2f}", "", "")))
    return table


def limits_table(accounts: Sequence[Account]) -> Table:
    table = Table("", *(one.work for one in accounts))
    rows = {
        "step without wrappers, ms": [f"{one.step_ms:.2f}" for one in accounts],
        "what the wrappers add, ms": [f"{one.framed_ms - one.step_ms:+.2f}" for one in accounts],
        "of the step, waiting, ms": [f"{one.waiting_ms:.2f}" for one in accounts],
        "between steps, of a period": [_percent(one.between_share) for one in accounts],
        "outside kernels, of a period": [_percent(one.python_share) for one in accounts],
        "limit of memory, ms": [f"{one.limit.memory_ms:.2f}" for one in accounts],
        "limit of arithmetic, ms": [f"{one.limit.arithmetic_ms:.2f}" for one in accounts],
        "of the limit reached": [
            f"{one.limit.ms / (one.period_ms or one.step_ms):.0%} ({one.limit.binds})"
            for one in accounts
        ],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def record(one: Account) -> dict[str, Any]:
    return {
        **msgspec.to_builtins(one),
        "between_share": one.between_share,
        "python_share": one.python_share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("--works", nargs="+", choices=list(WORKS)[:3], default=list(WORKS)[:3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=4.0, help="to measure the machine's rates")
    options = parser.parse_args()
    config = EngineConfig(
        model=options.model,
        quantize=options.quantize,
        num_threads=options.threads,
        kv_memory_bytes=_KV_BYTES,
    )
    engine = start_engine(config)
    try:
        num_slots = engine.stats().num_blocks * config.block_size
        shape = shape_of(resolve(options.model), _KV_BYTES / num_slots)
        before = measure_rates(options.seconds / 2)
        accounts = [
            measure(engine, WORKS[name], options.rounds, shape, before) for name in options.works
        ]
        after = measure_rates(options.seconds / 2)
    finally:
        engine.close()
    console = Console(width=140)
    console.print(f"{engine.info.description}; {options.threads} threads")
    console.print(parts_table(accounts), limits_table(accounts))
    reading = spread_of([one.bytes_per_s / 1e9 for one in (before, after)])
    arithmetic = spread_of([one.operations_per_s / 1e9 for one in (before, after)])
    console.print(
        f"measured before and after: reading {reading.range_text(1)} GB/s, "
        f"float32 products {arithmetic.range_text(0)} billion operations/s"
    )
    print(
        json.dumps(
            {
                "benchmark": "step",
                "threads": options.threads,
                "shape": msgspec.to_builtins(shape),
                "rates": [msgspec.to_builtins(one) for one in (before, after)],
                "accounts": [record(one) for one in accounts],
            }
        )
    )


if __name__ == "__main__":
    main()
