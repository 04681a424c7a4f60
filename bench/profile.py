"""How well a profile predicts a worker: `python bench/profile.py [--threads N] [--runs N]`.

Method: each run profiles this machine as `shoal profile` does, then times steps of a worker that
holds all of the model: one new token for each of 1 or 32 streams, which have 128 tokens. Predicted
is the planner's formula over the profile of the same run. The parts of a step are timed by a
wrapper around linear layers, in steps of their own; the head is one of them. Errors are medians
over runs of measured / predicted - 1: positive where the worker was slower than predicted.
With `--cpu-time` everything is in time of this thread's CPU, so that neighbours do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from shoal.cluster.costs import ModelCost
from shoal.cluster.hardware import Cluster, NodeProfile
from shoal.cluster.timing import Clockwork, Team
from shoal.compute import linear
from shoal.config import EngineConfig, Quantize
from shoal.messages import Chunk, Plan, Sampling
from shoal.models.config import DecoderConfig, decoder_config
from shoal.parallel.partition import whole_shard
from shoal.weights.source import open_source, resolve
from shoal.worker import stopwatch
from shoal.worker.profile import profile_node, usable_cores
from shoal.worker.worker import Worker, load_worker

STREAMS = (1, 32)
CONTEXT = 128
NUM_STEPS = {1: 20, 32: 7}
BLOCK_SIZE = 16

Call = Callable[[object, torch.Tensor], torch.Tensor]
Clock = Callable[[], float]


class Row(msgspec.Struct, kw_only=True):
    """Milliseconds of a step; `linears` is the part of it inside linear layers."""

    precision: str
    num_streams: int
    predicted: float
    predicted_linears: float
    measured: float
    measured_linears: float

    @property
    def error(self) -> float:
        return self.measured / self.predicted - 1

    @property
    def linears_error(self) -> float:
        return self.measured_linears / self.predicted_linears - 1


def predict(
    node: NodeProfile, model: DecoderConfig, precision: Quantize, rows: int
) -> tuple[float, float]:
    """Milliseconds of a step, and of its matrices alone."""
    part = whole_shard(model.dims).slice
    cost = ModelCost(
        dims=model.dims,
        hidden_size=model.hidden_size,
        head_dim=model.head_dim,
        precision=precision,
        weight_bytes=0,
        embedding_bytes=0,
        head_bytes=0,
        kv_element_bytes=4,
    )
    team = Team(nodes=(node.name,), slices=(part,))

    def step_ms(profile: NodeProfile, context: int) -> float:
        clockwork = Clockwork(Cluster(nodes=(profile,)), cost, stream_tokens=context)
        times = clockwork.stage(team, rows)
        return (model.num_layers * times.layer_s + times.first_s + times.last_s) * 1e3

    bare = msgspec.structs.replace(node, layer_overhead_s=0.0, activations_per_s=0.0)
    return step_ms(node, CONTEXT), step_ms(bare, 0)


def make_plan(num_streams: int, step: int) -> Plan:
    per_stream = CONTEXT // BLOCK_SIZE + 1
    chunks = [
        Chunk(
            request_id=stream,
            start=CONTEXT,
            tokens=[100 + stream],
            block_ids=list(range(stream * per_stream, (stream + 1) * per_stream)),
            sampling=Sampling(seed=1, position=CONTEXT, temperature=0.0),
        )
        for stream in range(num_streams)
    ]
    return Plan(epoch=0, step=step, chunks=chunks)


def step_s(worker: Worker, num_streams: int, step: int, clock: Clock) -> float:
    plan = make_plan(num_streams, step)
    started_s = clock()
    worker.execute(plan)
    return clock() - started_s


@contextmanager
def timed_linears(spent_s: list[float], clock: Clock) -> Iterator[None]:
    """Adds the time of every linear layer's call to `spent_s[-1]`."""
    kinds = (linear.LinearByRows, linear.DenseLinear)
    originals = [kind.__call__ for kind in kinds]

    def timed(original: Call) -> Call:
        def call(self: object, x: torch.Tensor) -> torch.Tensor:
            started_s = clock()
            y = original(self, x)
            spent_s[-1] += clock() - started_s
            return y

        return call

    for kind, original in zip(kinds, originals, strict=True):
        kind.__call__ = timed(original)
    try:
        yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.__call__ = original


def measure(worker: Worker, num_streams: int, clock: Clock) -> tuple[float, float]:
    """Milliseconds of a step, and of its linear layers."""
    num_steps = NUM_STEPS[num_streams]
    for step in range(3):
        step_s(worker, num_streams, step, clock)
    steps = [step_s(worker, num_streams, step, clock) for step in range(num_steps)]
    spent_s: list[float] = []
    with timed_linears(spent_s, clock):
        for step in range(num_steps):
            spent_s.append(0.0)
            step_s(worker, num_streams, step, clock)
    return statistics.median(steps) * 1e3, statistics.median(spent_s) * 1e3


def one_run(
    workers: dict[Quantize, Worker], model: DecoderConfig, options: argparse.Namespace
) -> list[Row]:
    clock = time.thread_time if options.cpu_time else time.perf_counter
    precisions = tuple(dict.fromkeys((*workers, "int8")))
    node = profile_node(
        "here", precisions=precisions, num_threads=options.threads, budget_s=options.seconds
    )
    rows = []
    for precision, worker in workers.items():
        for num_streams in STREAMS:
            predicted, predicted_linears = predict(node, model, precision, num_streams)
            measured, measured_linears = measure(worker, num_streams, clock)
            rows.append(
                Row(
                    precision=precision,
                    num_streams=num_streams,
                    predicted=predicted,
                    predicted_linears=predicted_linears,
                    measured=measured,
                    measured_linears=measured_linears,
                )
            )
    return rows


def load(model: str, precision: Quantize) -> tuple[Worker, DecoderConfig]:
    files = resolve(model)
    config = EngineConfig(model=model, quantize=precision, kv_memory_bytes=2**29)
    source = open_source(files)
    try:
        return load_worker(files, config), decoder_config(source.config)
    finally:
        source.close()


def summary(runs: list[list[Row]]) -> tuple[Table, list[dict[str, object]]]:
    table = Table(
        "precision", "streams", "predicted ms", "measured ms", "error", "lowest", "highest"
    )
    for name in ("linears predicted", "measured", "error", "beside: predicted", "measured"):
        table.add_column(name)
    records: list[dict[str, object]] = []
    for rows in zip(*runs, strict=True):
        errors = [row.error for row in rows]
        middle = {
            name: statistics.median(getattr(row, name) for row in rows)
            for name in ("predicted", "measured", "predicted_linears", "measured_linears")
        }
        linears_error = statistics.median(row.linears_error for row in rows)
        table.add_row(
            rows[0].precision,
            str(rows[0].num_streams),
            f"{middle['predicted']:.1f}",
            f"{middle['measured']:.1f}",
            f"{statistics.median(errors):+.0%}",
            f"{min(errors):+.0%}",
            f"{max(errors):+.0%}",
            f"{middle['predicted_linears']:.1f}",
            f"{middle['measured_linears']:.1f}",
            f"{linears_error:+.0%}",
            f"{middle['predicted'] - middle['predicted_linears']:.1f}",
            f"{middle['measured'] - middle['measured_linears']:.1f}",
        )
        records.append(
            {
                "precision": rows[0].precision,
                "num_streams": rows[0].num_streams,
                "error": round(statistics.median(errors), 3),
                "linears_error": round(linears_error, 3),
                "runs": msgspec.to_builtins(rows),
            }
        )
    return table, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precisions", nargs="+", default=["auto", "none"])
    parser.add_argument("--seconds", type=float, default=12.0, help="of each profile (12)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread; see above")
    options = parser.parse_args()
    if options.cpu_time:
        options.threads = 1
        stopwatch.time = SimpleNamespace(perf_counter=time.thread_time)
    torch.set_num_threads(options.threads)
    workers = {}
    for precision in options.precisions:
        workers[precision], model = load(options.model, precision)
    runs = [one_run(workers, model, options) for _ in range(options.runs)]
    table, records = summary(runs)
    Console(width=160).print(table)
    print(json.dumps({"benchmark": "profile", "threads": options.threads, "rows": records}))


if __name__ == "__main__":
    main()
