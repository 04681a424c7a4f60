"""How long streams wait when a worker dies: `python bench/recovery.py [--rounds N] [--kills N]`.

Method: the embedded model in processes of this machine, 16 streams kept open without HTTP. A round
waits until all of them move, strikes one worker (each seat in turn), and takes, over all streams,
the longest time between two pieces that spans the strike. `notice` is from the strike to the
incident's beginning, on one clock; the other phases are those that the incident tells, `decide` is
what they leave of its total, `tokens` what the open streams knew (a killed worker's cache outlives
it, so little of that is computed again).
`recompute` ends with the first token of any stream, the gap with that of the last one. Shown are
medians over the rounds, of the gap also the worst. With a warm spare, a round begins when a spare
has read all shards again.
`--kills N` strikes N times in a row instead, in float32, the next one as soon as all streams have
got some tokens, and holds every answer against that of a calm run.
Limits: gap with a warm spare ≤ 1.0 s, restarted ≤ 6 s, frozen: noticing plus that of a spare; in a
row: 0 broken, 0 lost or repeated tokens, 0 different, memory and open files flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import msgspec
import psutil
from msgspec import structs
from open_streams import Streams, greedy_only
from recovery_row import strike_in_a_row
from rich.console import Console
from rich.table import Table

from shoal.config import EngineConfig, Split
from shoal.evaluate.chaos_prompts import make_questions
from shoal.evaluate.chaos_report import divide_gaps
from shoal.fleet.fleet import Fleet
from shoal.fleet.start_local import start_local_fleet

MODEL = "smollm2-135m"
KV_BYTES = 256 * 2**20
NUM_STREAMS = 16
MAX_TOKENS = 64
TABLE_COLUMNS = 130
SPLITS = {"2x2": Split(pipeline=2, tensor=2), "2": Split(pipeline=2)}
PHASES = ("notice", "decide", "start", "load", "form", "recompute")

OTHERS = {
    "vLLM": "shuts the executor down; every open stream gets an error",
    "SGLang": "kills its process tree",
    "llama.cpp RPC": "aborts the head process",
    "exo": "deletes the instance and closes the streams",
    "distributed-llama": "rebuilds everything",
    "Petals": "replays a span's inputs to a new server; no HTTP API, unmaintained",
    "Dynamo": "replays prompt and tokens on another full replica; off by default",
}

How = Literal["kill", "freeze"]


class Setting(msgspec.Struct, frozen=True):
    """`limit_s` is what the issue asks of the longest gap; noticing comes on top if frozen."""

    name: str
    how: How
    spares: int
    limit_s: float


SETTINGS = (
    Setting("SIGKILL, warm spare", "kill", 1, 1.0),
    Setting("SIGSTOP, warm spare", "freeze", 1, 1.0),
    Setting("SIGKILL, restarted", "kill", 0, 6.0),
    Setting("SIGSTOP, restarted", "freeze", 0, 6.0),
)


class Round(msgspec.Struct, frozen=True):
    """Seconds. `gap_s` is the longest of any stream."""

    gap_s: float
    num_tokens: int
    phases: dict[str, float]


@contextmanager
def fleet_of(split: Split, spares: int, *, exact: bool) -> Iterator[Fleet]:
    config = EngineConfig(
        model=MODEL,
        dtype="float32" if exact else "auto",
        quantize="none" if exact else "auto",
        kv_memory_bytes=KV_BYTES,
        split=split,
        spares=spares,
    )
    fleet = start_local_fleet(config)
    try:
        yield fleet
    finally:
        fleet.close()


async def measure(fleet: Fleet, settings: Sequence[Setting], num_rounds: int) -> list[list[Round]]:
    """The rounds of each setting, after one that is not counted."""
    questions = greedy_only(make_questions(NUM_STREAMS, max_tokens=MAX_TOKENS, seed=0))
    streams = Streams(fleet, questions, NUM_STREAMS)
    rounds: list[list[Round]] = [[] for _ in settings]
    async with streams.kept_open():
        for number in range(num_rounds + 1):
            for setting, taken in zip(settings, rounds, strict=True):
                one = await strike(streams, setting, seat=number)
                print(f"  {setting.name}, round {number}: {one.gap_s:.2f} s", flush=True)
                if number:
                    taken.append(one)
    if streams.tally.broken:
        raise RuntimeError(f"a stream broke: {streams.tally.broken[0]}")
    return rounds


async def strike(streams: Streams, setting: Setting, seat: int) -> Round:
    await streams.spares_ready(setting.spares)
    await streams.moved_on(4)
    last = streams.last_incident()
    targets = streams.targets()
    victim = psutil.Process(targets[seat % len(targets)].pid)
    waiting, num_tokens = list(streams.asker.open.values()), streams.asker.num_known_tokens()
    struck_s, struck_at = time.perf_counter(), time.time()
    if setting.how == "kill":
        victim.kill()
    else:
        victim.suspend()
    incident = await streams.mended(last)
    await streams.moved_on(3)
    hit, _ = divide_gaps(waiting, [struck_s])
    phases = {name: incident.phases.get(name, 0.0) for name in PHASES[2:]}
    phases["notice"] = incident.began_s - struck_at
    phases["decide"] = incident.phases["total"] - sum(phases[name] for name in PHASES[2:])
    return Round(gap_s=max(hit), num_tokens=num_tokens, phases=phases)


def table_of(split: str, rows: Sequence[tuple[Setting, list[Round]]]) -> Table:
    title = f"{MODEL}, pipeline × tensor {split}, {NUM_STREAMS} streams; seconds"
    names = ("longest gap", "worst", "limit", "tokens", *PHASES)
    table = Table("a worker dies by", *names, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for setting, rounds in rows:
        row = record_of(split, setting, rounds)
        limit = f"≤ {setting.limit_s:g}" + (" + notice" if setting.how == "freeze" else "")
        cells = [f"{row[name]:.2f}" for name in ("gap_s", "worst_gap_s")]
        cells += [limit, f"{row['tokens']:.0f}"]
        table.add_row(setting.name, *cells, *(f"{row[name]:.3f}" for name in PHASES))
    return table


def record_of(split: str, setting: Setting, rounds: Sequence[Round]) -> dict[str, Any]:
    gaps_s = [each.gap_s for each in rounds]
    medians = {name: statistics.median(each.phases[name] for each in rounds) for name in PHASES}
    return {
        "split": split,
        "setting": setting.name,
        "rounds": len(rounds),
        "gap_s": statistics.median(gaps_s),
        "worst_gap_s": max(gaps_s),
        "tokens": statistics.median(each.num_tokens for each in rounds),
        **medians,
    }


def others_table() -> Table:
    table = Table("", "when a worker dies", title="the others")
    for name, words in OTHERS.items():
        table.add_row(name, words)
    return table


def measure_all(splits: Sequence[str], num_rounds: int, *, exact: bool) -> None:
    console, records = Console(width=TABLE_COLUMNS), list[dict[str, Any]]()
    tables = [others_table()]
    for split in splits:
        rows: list[tuple[Setting, list[Round]]] = []
        for spares in (1, 0):
            settings = [each for each in SETTINGS if each.spares == spares]
            with fleet_of(SPLITS[split], spares, exact=exact) as fleet:
                rounds = asyncio.run(measure(fleet, settings, num_rounds))
            rows += zip(settings, rounds, strict=True)
        tables.insert(-1, table_of(split, rows))
        records += [record_of(split, setting, taken) for setting, taken in rows]
    for table in tables:
        console.print(table)
    print(json.dumps({"bench": "recovery", "exact": exact, "rows": records}))


def kill_in_a_row(split: str, num_kills: int, spares: int, seed: int) -> bool:
    questions = make_questions(NUM_STREAMS, max_tokens=48, seed=seed)
    with fleet_of(SPLITS[split], spares, exact=True) as fleet:
        streams = Streams(fleet, questions, NUM_STREAMS)
        done = asyncio.run(strike_in_a_row(streams, num_kills, seed))
    record = {"bench": "recovery in a row", "split": split, "spares": spares}
    print(json.dumps(record | structs.asdict(done)))
    return done.ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--split", choices=SPLITS, help="only this one; 2x2 for --kills")
    parser.add_argument("--exact", action="store_true", help="float32 kernels for the rounds too")
    parser.add_argument("--kills", type=int, default=0, help="so many in a row instead")
    parser.add_argument("--spares", type=int, default=1, help="for --kills")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.kills:
        ok = kill_in_a_row(asked.split or "2x2", asked.kills, asked.spares, asked.seed)
        raise SystemExit(0 if ok else 1)
    splits = [asked.split] if asked.split else list(SPLITS)
    measure_all(splits, asked.rounds, exact=asked.exact)


if __name__ == "__main__":
    main()
