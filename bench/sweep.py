"""Tokens per second against the machine's limits: `python -m bench.sweep [--only SWEEP ...]`.

Method: engines in this process, no prefix cache, steps timed one by one; medians. `layers`: random
weights in the shapes of Llama 3.2 1B and 3B, with few layers and a small vocabulary; engines with
different numbers of layers take turns, and a line through them is drawn out to all layers and to
all the vocabulary: that is an extrapolation and is called one. `context`: one stream at rising
lengths, and the pieces of 512 tokens in which a long prompt is read. `streams`: 1 to 256 at once.
Limits: `roofline.py`, with the better of the rates before and after. `--quantize auto` holds
random weights in 8 bits, since their files have no 4-bit blocks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console

from bench.extrapolation import Extrapolated, extrapolate
from bench.llama_shapes import LLAMA_SHAPES, LlamaShape, write_checkpoints
from bench.machine import describe_machine
from bench.ratios import in_turn
from bench.roofline import Rates, measure_rates, shape_in_blocks, shape_of
from bench.sweep_points import (
    Point,
    Subject,
    Taken,
    decoding,
    head_ms,
    of_work,
    point_of,
    reading,
    run,
)
from bench.sweep_tables import points_table, record_of, wholes_table
from bench.works import Work
from shoal.compute.threads import set_num_threads
from shoal.config import EngineConfig, Quantize
from shoal.engine.local import start_engine
from shoal.weights.source import open_source, resolve
from shoal.worker.profile import usable_cores

SWEEPS = ("layers", "context", "streams")
KV_BYTES = 2**30
# Drawn tokens of prompts lie below 17 384.
SMALL_VOCABULARY = 20_480
STEP_TOKENS = 512
MANY_STEP_TOKENS = 2048
STREAMS_CONTEXT = 64


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured. `layers` is by shape."""

    layers: dict[str, list[int]]
    contexts: list[int]
    streams: list[int]
    num_steps: int
    rounds: int
    rates_s: float


FULL = Plan(
    layers={"llama-1b": [1, 2, 4, 6], "llama-3b": [1, 2, 4]},
    contexts=[128, 512, 2048, 4096, 8000],
    streams=[1, 2, 4, 8, 16, 32, 64, 128, 256],
    num_steps=24,
    rounds=2,
    rates_s=4.0,
)
QUICK = Plan(
    layers={"llama-1b": [1, 2], "llama-3b": [1, 2]},
    contexts=[128, 1024],
    streams=[1, 8, 32],
    num_steps=8,
    rounds=1,
    rates_s=1.0,
)


def config_of(model: str, options: argparse.Namespace, step_tokens: int) -> EngineConfig:
    return EngineConfig(
        model=model,
        quantize=options.quantize,
        num_threads=options.threads,
        kv_memory_bytes=KV_BYTES,
        max_step_tokens=step_tokens,
        prefix_caching=False,
    )


def started(
    stack: ExitStack, config: EngineConfig, name: str, bits: Literal[4, 8] | None
) -> Subject:
    """It closes with `stack`. `bits` of weights that are rounded as they are loaded, else None."""
    engine = stack.enter_context(closing(start_engine(config)))
    files = resolve(config.model)
    kv_bytes = KV_BYTES / (engine.stats().num_blocks * config.block_size)
    with closing(open_source(files)) as source:
        model_config = source.config
    shape = shape_in_blocks(model_config, bits, kv_bytes) if bits else shape_of(files, kv_bytes)
    return Subject(
        model=name,
        num_layers=model_config["num_hidden_layers"],
        engine=engine,
        shape=shape,
        step_tokens=config.max_step_tokens,
    )


def bits_of(quantize: Quantize) -> Literal[4, 8]:
    """What plain weights of a folder become."""
    return 4 if quantize == "int4" else 8


def sweep_layers(
    shape: LlamaShape, plan: Plan, options: argparse.Namespace
) -> tuple[list[Point], list[Extrapolated]]:
    counts = plan.layers[shape.name]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = write_checkpoints(shape, counts, SMALL_VOCABULARY, folder)
        subjects = {
            str(count): started(
                stack,
                config_of(str(path), options, STEP_TOKENS),
                shape.name,
                bits_of(options.quantize),
            )
            for count, path in paths.items()
        }
        works = [
            decoding(1, 128, plan.num_steps, STEP_TOKENS),
            decoding(32, 16, plan.num_steps, STEP_TOKENS),
            reading(STEP_TOKENS),
        ]
        points, wholes = [], []
        for work in works:
            # A prompt is one step, an answer dozens.
            rounds = plan.rounds * (2 if work.figure == "prefill" else 1)
            some = alternated(subjects, work, rounds)
            largest = subjects[str(max(counts))]
            framed = of_work(work, run(largest, work, rounds + 1, with_frames=True)).steps
            points += some
            wholes.append(drawn_out(shape, some, head_ms(framed), largest, options.quantize))
    return points, wholes


def alternated(subjects: dict[str, Subject], work: Work, num_rounds: int) -> list[Point]:
    """After a round that is not counted."""
    taken = {name: Taken() for name in subjects}
    for turn in range(num_rounds + 1):
        for name in in_turn(list(subjects), turn):
            new = of_work(work, run(subjects[name], work, turn))
            if turn:
                taken[name].steps += new.steps
                taken[name].seconds += new.seconds
    return [point_of(subjects[name], work, taken[name]) for name in subjects]


def drawn_out(
    shape: LlamaShape,
    points: Sequence[Point],
    of_head_ms: float,
    largest: Subject,
    quantize: Quantize,
) -> Extrapolated:
    whole = extrapolate(
        {point.num_layers: point.ms.median for point in points},
        head_ms=of_head_ms,
        vocabulary_scale=shape.vocab_size / SMALL_VOCABULARY,
        num_layers=shape.num_layers,
    )
    config = shape.config(num_layers=shape.num_layers, vocab_size=shape.vocab_size)
    kv_bytes = largest.shape.kv_bytes_per_token / largest.num_layers * shape.num_layers
    load = points[-1].load
    word = "decode" if points[-1].figure == "decode" else "prefill"
    count = points[-1].num_streams if word == "decode" else load.rows
    return Extrapolated(
        model=shape.name,
        work=f"{word}-{count}",
        load=load,
        shape=shape_in_blocks(config, bits_of(quantize), kv_bytes),
        whole=whole,
    )


def sweep_context(plan: Plan, options: argparse.Namespace) -> list[Point]:
    """Decoding at each length, and what reading a piece of a prompt costs that far behind."""
    points, pieces = [], dict[int, Taken]()
    with ExitStack() as stack:
        config = config_of(options.model, options, STEP_TOKENS)
        subject = started(stack, config, options.model, None)
        run(subject, decoding(1, min(plan.contexts), 4, STEP_TOKENS), 0)
        for turn, context in enumerate(plan.contexts, start=1):
            work = decoding(1, context, plan.num_steps, STEP_TOKENS)
            steps = run(subject, work, turn)
            points.append(point_of(subject, work, of_work(work, steps)))
            for step in of_work(reading(STEP_TOKENS), steps).steps:
                piece = pieces.setdefault(step.load.keys, Taken())
                piece.steps.append(step)
                piece.seconds.append(step.s)
        shown = {max(k for k in pieces if k <= c) for c in plan.contexts if c >= min(pieces)}
        points += [point_of(subject, reading(STEP_TOKENS), pieces[keys]) for keys in sorted(shown)]
    return points


def sweep_streams(plan: Plan, options: argparse.Namespace) -> list[Point]:
    """Prompts are read in larger steps than usual, which decoding does not notice."""
    points = []
    with ExitStack() as stack:
        config = config_of(options.model, options, MANY_STEP_TOKENS)
        subject = started(stack, config, options.model, None)
        run(subject, decoding(1, STREAMS_CONTEXT, 4, MANY_STEP_TOKENS), 0)
        for turn, number in enumerate(plan.streams, start=1):
            work = decoding(number, STREAMS_CONTEXT, plan.num_steps, MANY_STEP_TOKENS)
            points.append(point_of(subject, work, of_work(work, run(subject, work, turn))))
    return points


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=SWEEPS)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter points")
    parser.add_argument("--model", default="smollm2-135m", help="of context and streams")
    parser.add_argument("--shapes", nargs="+", choices=list(LLAMA_SHAPES), help="of layers")
    parser.add_argument("--quantize", choices=("auto", "int8", "int4"), default="auto")
    parser.add_argument("--threads", type=int, default=usable_cores())
    return parser.parse_args()


def measure(
    plan: Plan, options: argparse.Namespace
) -> tuple[dict[str, list[Point]], list[Extrapolated]]:
    points: dict[str, list[Point]] = {name: [] for name in options.only}
    wholes: list[Extrapolated] = []
    if "layers" in options.only:
        for name in options.shapes or plan.layers:
            some, their_wholes = sweep_layers(LLAMA_SHAPES[name], plan, options)
            points["layers"] += some
            wholes += their_wholes
    if "context" in options.only:
        points["context"] = sweep_context(plan, options)
    if "streams" in options.only:
        points["streams"] = sweep_streams(plan, options)
    return points, wholes


def best_of(readings: Sequence[Rates]) -> Rates:
    """A limit is what the machine can do, not what its neighbours left of it at some moment."""
    return Rates(
        bytes_per_s=max(one.bytes_per_s for one in readings),
        operations_per_s=max(one.operations_per_s for one in readings),
    )


def main() -> None:
    options = options_of()
    plan = QUICK if options.quick else FULL
    set_num_threads(options.threads)
    before = measure_rates(plan.rates_s / 2)
    points, wholes = measure(plan, options)
    after = measure_rates(plan.rates_s / 2)
    best = best_of([before, after])
    machine = describe_machine(options.threads)
    console = Console(width=140)
    console.print(f"{machine}; quantize {options.quantize}", highlight=False)
    for name, some in points.items():
        console.print(points_table(name, some, best))
    if wholes:
        console.print(wholes_table(wholes, best))
    for when, rates in (("before", before), ("after", after)):
        console.print(
            f"{when}: reading {rates.bytes_per_s / 1e9:.1f} GB/s, "
            f"float32 products {rates.operations_per_s / 1e9:.0f} billion operations/s"
        )
    record = {
        "benchmark": "sweep",
        "machine": machine,
        "quantize": options.quantize,
        "rates": [msgspec.to_builtins(rates) for rates in (before, after)],
        "points": {name: [record_of(one, best) for one in some] for name, some in points.items()},
        "extrapolated": [record_of(one, best) for one in wholes],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
