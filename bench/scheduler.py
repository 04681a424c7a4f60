"""What the scheduler costs per step: `python bench/scheduler.py [--steps N]`.

Method: a scheduler serves prompts of 256 tokens, half of them with a shared prefix, that end after
64 to 191 tokens. Whoever ends is replaced, so that the numbers of waiting and running requests
stay as the row says. A sample is one `plan` and its `complete`, after a warm-up in which all
running prompts are computed; making the result and adding the replacement are not timed. Times
are of this thread's CPU, garbage collection included, so that neighbours do not count. Beside
it, in the same run, stands the floor: making the values of the same plan and nothing else.
Limit: 1000 µs at 1000 waiting and 64 running.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from itertools import count

import msgspec
from rich.console import Console
from rich.table import Table

from shoal.messages import Chunk, ChunkResult, Plan, Sampling, StepResult
from shoal.request import Request, SamplingParams
from shoal.schedule.scheduler import Scheduler

WAITING = (0, 100, 1000, 5000)
RUNNING = (1, 32, 64, 256)
NUM_PROMPT_TOKENS = 256
BLOCK_SIZE = 16


class Row(msgspec.Struct, kw_only=True):
    num_waiting: int
    num_running: int
    median_us: float
    p99_us: float
    floor_us: float


def make_request(request_id: int) -> Request:
    shared = NUM_PROMPT_TOKENS // 2 if request_id % 2 else 0
    own = [(request_id * 7919 + i) % 49_152 for i in range(NUM_PROMPT_TOKENS - shared)]
    return Request(
        request_id=request_id,
        prompt_tokens=[1] * shared + own,
        params=SamplingParams(temperature=0.7, top_p=0.9),
        max_tokens=64 + request_id * 37 % 128,
        seed=request_id,
        arrival_s=float(request_id),
    )


def make_result(plan: Plan) -> StepResult:
    results = [
        ChunkResult(
            request_id=chunk.request_id, token_ids=[plan.step % 1000] if chunk.sampling else []
        )
        for chunk in plan.chunks
    ]
    return StepResult(epoch=plan.epoch, step=plan.step, results=results)


def copy_values(plan: Plan) -> Plan:
    """The least a scheduler must do: make these structs and lists."""
    chunks = []
    for chunk in plan.chunks:
        sampling = chunk.sampling and Sampling(
            seed=chunk.sampling.seed,
            position=chunk.sampling.position,
            temperature=chunk.sampling.temperature,
            top_p=chunk.sampling.top_p,
        )
        chunks.append(
            Chunk(
                request_id=chunk.request_id,
                start=chunk.start,
                tokens=chunk.tokens.copy(),
                block_ids=chunk.block_ids.copy(),
                sampling=sampling,
            )
        )
    return Plan(epoch=plan.epoch, step=plan.step, chunks=chunks)


def measure(num_waiting: int, num_running: int, num_steps: int) -> Row:
    scheduler = Scheduler(
        num_blocks=(num_running + 8) * 32,
        block_size=BLOCK_SIZE,
        max_context=1024,
        max_step_tokens=512,
        max_running=num_running,
        max_waiting=num_waiting + num_running,
    )
    ids = count()
    for _ in range(num_waiting + num_running):
        scheduler.add(make_request(next(ids)))
    times_us: list[float] = []
    floors_us: list[float] = []
    num_warm_up = num_running * NUM_PROMPT_TOKENS // 512 + 20
    for step in range(num_warm_up + num_steps):
        started_s = time.thread_time()
        plan = scheduler.plan(started_s)
        planned_s = time.thread_time()
        assert plan is not None
        result = make_result(plan)
        resumed_s = time.thread_time()
        events = scheduler.complete(result)
        completed_s = time.thread_time()
        copy_values(plan)
        copied_s = time.thread_time()
        if step >= num_warm_up:
            times_us.append((planned_s - started_s + completed_s - resumed_s) * 1e6)
            floors_us.append((copied_s - completed_s) * 1e6)
        for event in events:
            if event.finish_reason is not None:
                scheduler.add(make_request(next(ids)))
    return Row(
        num_waiting=num_waiting,
        num_running=num_running,
        median_us=round(statistics.median(times_us), 1),
        p99_us=round(statistics.quantiles(times_us, n=100)[-1], 1),
        floor_us=round(statistics.median(floors_us), 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="timed steps per row (600)")
    num_steps = parser.parse_args().steps
    table = Table("waiting", "running", "median µs", "p99 µs", "floor µs", "µs per running")
    for column in table.columns:
        column.justify = "right"
    rows = []
    for num_running in RUNNING:
        for num_waiting in WAITING:
            gc.collect()
            row = measure(num_waiting, num_running, num_steps)
            rows.append(row)
            values = (row.median_us, row.p99_us, row.floor_us, row.median_us / num_running)
            table.add_row(str(num_waiting), str(num_running), *(f"{value:.1f}" for value in values))
    Console().print(table)
    print(json.dumps({"benchmark": "scheduler", "rows": msgspec.to_builtins(rows)}))


if __name__ == "__main__":
    main()
