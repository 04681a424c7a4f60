"""What split models send, against the least they could: `python bench/wire.py`.

Method: the workers' own counters before and after each load, divided by the tokens computed (of
prompts too) and by the steps. Counted are frames: header, body and their prefix, not what TLS or
the system put around them.
The least: hidden states cross to each worker of the next stage once, as hidden size × 4 bytes per
token, in one message per step; a sum takes as much from each rank to each of the others, twice per
layer and once for the embedding; and logits reach rank 0 from the ranks that computed them. Kernels
that leave out, in the last layer, rows whose states nobody reads can be below that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
from rich.console import Console
from rich.table import Table
from split_loads import KV_BYTES, MODEL, Contestant, Work

from shoal.compute.kernels import choose_scheme
from shoal.config import EngineConfig, Split
from shoal.engine.api import WorkerStats
from shoal.fleet.deployment import AnyEngine, deploy
from shoal.models.config import DecoderConfig, decoder_config
from shoal.parallel.partition import tensor_slices
from shoal.weights.source import open_source, resolve

SPLITS = {
    "pipeline 2": Split(pipeline=2),
    "pipeline 2, int8": Split(pipeline=2, wire_format="int8"),
    "tensor 2": Split(tensor=2),
    "tensor 2, sockets": Split(tensor=2, transport="sockets"),
    "tensor 2, sockets, int8": Split(tensor=2, transport="sockets", wire_format="int8"),
    "pipeline 2 × tensor 2": Split(pipeline=2, tensor=2),
}
# A worker reports its counters half a second after its last step.
SETTLED_S = 1.2
WIDTH = 110


class Row(msgspec.Struct, kw_only=True):
    """Messages per step and bytes per token of all workers together, and the least of each."""

    split: str
    load: str
    between: str
    messages: float
    least_messages: float
    num_bytes: float
    least_bytes: float
    bytes_per_layer: float


class Sent(msgspec.Struct, kw_only=True, frozen=True):
    num_bytes: float
    num_messages: float


def loads(num_tokens: int) -> list[Work]:
    return [
        Work(name="1 stream", num_streams=1, prompt_tokens=1, max_tokens=num_tokens),
        Work(name="16 streams", num_streams=16, prompt_tokens=1, max_tokens=num_tokens),
        Work(name="prompt 512", num_streams=1, prompt_tokens=512, max_tokens=1),
    ]


def least_between_stages(seats: Sequence[WorkerStats], num_steps: int, token_bytes: int) -> Sent:
    """What enters each stage but the first; `token_bytes` are the states of all tokens."""
    receivers = sum(seat.stage > 0 for seat in seats)
    return Sent(num_bytes=receivers * token_bytes, num_messages=receivers * num_steps)


def least_between_ranks(
    seats: Sequence[WorkerStats], num_steps: int, token_bytes: int, logit_bytes: Sequence[int]
) -> Sent:
    """`logit_bytes` are those of each rank for all sampled tokens."""
    num_ranks = Counter(seat.stage for seat in seats)
    last = max(num_ranks)
    sent_bytes, messages = 0, 0
    for seat in seats:
        others = num_ranks[seat.stage] - 1
        sums = 2 * (seat.layers[1] - seat.layers[0]) + (seat.stage == 0)
        sent_bytes += others * sums * token_bytes
        messages += others * sums * num_steps
        if others and seat.stage == last and seat.rank > 0:
            sent_bytes += logit_bytes[seat.rank]
            messages += num_steps
    return Sent(num_bytes=sent_bytes, num_messages=messages)


def settled(engine: AnyEngine) -> dict[tuple[int, int], WorkerStats]:
    time.sleep(SETTLED_S)
    return {(seat.stage, seat.rank): seat for seat in engine.stats().workers}


def grown(
    before: Mapping[tuple[int, int], WorkerStats],
    after: Mapping[tuple[int, int], WorkerStats],
    kind: str,
) -> Sent:
    def growth(name: str) -> int:
        return sum(getattr(after[seat], name) - getattr(before[seat], name) for seat in after)

    return Sent(num_bytes=growth(f"{kind}_bytes"), num_messages=growth(f"{kind}_messages"))


def measure(contestant: Contestant, model: DecoderConfig, work: Work, item_bytes: int) -> list[Row]:
    engine = contestant.deployment.engine
    before = settled(engine)
    contestant.run(work, seed=1)
    after = settled(engine)
    seats = list(after.values())
    num_steps = after[0, 0].steps - before[0, 0].steps
    num_tokens = work.num_streams * (work.prompt_tokens + work.max_tokens - 1)
    token_bytes = num_tokens * model.hidden_size * item_bytes
    ranks = 1 + max(seat.rank for seat in seats)
    sampled_bytes = work.num_streams * work.max_tokens * item_bytes
    slices = tensor_slices(model.dims, [1.0] * ranks)
    logit_bytes = [len(part.vocab) * sampled_bytes for part in slices]
    leasts = {
        "stage": least_between_stages(seats, num_steps, token_bytes),
        "rank": least_between_ranks(seats, num_steps, token_bytes, logit_bytes),
    }
    rows = []
    for kind, least in leasts.items():
        sent = grown(before, after, kind)
        if sent.num_messages == 0 == least.num_messages:
            continue
        rows.append(
            Row(
                split=contestant.name,
                load=work.name,
                between=f"{kind}s",
                messages=round(sent.num_messages / num_steps, 2),
                least_messages=round(least.num_messages / num_steps, 2),
                num_bytes=round(sent.num_bytes / num_tokens, 1),
                least_bytes=round(least.num_bytes / num_tokens, 1),
                bytes_per_layer=round(sent.num_bytes / num_tokens / model.num_layers, 1),
            )
        )
    return rows


def measure_split(name: str, model: DecoderConfig, works: Sequence[Work]) -> list[Row]:
    config = EngineConfig(
        model=MODEL, kv_memory_bytes=KV_BYTES, prefix_caching=False, split=SPLITS[name]
    )
    item_bytes = choose_scheme(config.dtype, config.quantize).dtype.itemsize
    contestant = Contestant(name, lambda: deploy(config))
    try:
        contestant.run(works[0], seed=0)
        return [row for work in works for row in measure(contestant, model, work, item_bytes)]
    finally:
        contestant.deployment.close()


def show(rows: Sequence[Row]) -> None:
    table = Table(
        "split",
        "load",
        "between",
        "messages/step",
        "least",
        "bytes/token",
        "least",
        "÷ least",
        "per layer",
    )
    for column in table.columns[3:]:
        column.justify = "right"
    previous = rows[0].split
    for row in rows:
        if row.split != previous:
            table.add_section()
        previous = row.split
        table.add_row(
            row.split,
            row.load,
            row.between,
            f"{row.messages:g}",
            f"{row.least_messages:g}",
            f"{row.num_bytes:,.0f}",
            f"{row.least_bytes:,.0f}",
            f"{row.num_bytes / row.least_bytes:.3f}",
            f"{row.bytes_per_layer:,.0f}",
        )
    Console(width=WIDTH).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="decoded in each stream (64)")
    parser.add_argument("--only", default="", help="splits whose name holds this")
    options = parser.parse_args()
    source = open_source(resolve(MODEL))
    model = decoder_config(source.config)
    source.close()
    rows = []
    for name in SPLITS:
        if options.only in name:
            Console(stderr=True).print(name)
            rows += measure_split(name, model, loads(options.tokens))
    show(rows)
    print(json.dumps({"benchmark": "wire", "rows": msgspec.to_builtins(rows)}))


if __name__ == "__main__":
    main()
