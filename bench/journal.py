"""What the head's journal costs per token: `python bench/journal.py [--rounds N]`.

Method: one engine in float32 (no prefix cache), and before it two real servers that differ in the
journal only: none, and SQLite on this machine's disk. A client in a process of its own opens so
many streams at once, of 16 prompt tokens and NUM_TOKENS answer tokens each, at one server and
then at the other, in turns that begin with either; a rate is all tokens by the time from the first
request to the last token. A ratio is of one round, so that a machine that slows down slows both;
shown are medians and the ratios' range. Beside it, the journal alone: microseconds of processor
time for a token when nothing else runs, in groups as large as there are streams.
Limit: 2 % of throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

import httpx
from rich.console import Console
from rich.table import Table

from shoal.config import EngineConfig
from shoal.engine.api import AsyncEngine, Delta
from shoal.engine.local import start_engine
from shoal.journal.api import Accepted, Journal
from shoal.journal.writer import SqliteJournal
from shoal.request import SamplingParams
from shoal.server.app import create_app
from shoal.server.run import bind, make_server, url_of

MODEL = "smollm2-135m"
STREAMS = (1, 16, 32)
PROMPT_TOKENS = 16
KV_BYTES = 512 * 2**20
LIMIT = 0.02


@contextmanager
def served(engine: AsyncEngine, journal: Journal | None) -> Iterator[str]:
    listener = bind("127.0.0.1", 0)
    server = make_server(create_app(engine, journal=journal), grace_s=5)
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join()


def measure(url: str, num_streams: int, num_tokens: int, seed: int) -> float:
    """Tokens per second, as a process of its own sees them."""
    numbers = map(str, (num_streams, num_tokens, seed))
    command = [sys.executable, __file__, "--client", url, *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


async def load(url: str, num_streams: int, num_tokens: int, seed: int) -> float:
    limits = httpx.Limits(max_connections=num_streams)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        start_s = time.perf_counter()
        await asyncio.gather(
            *(read(client, url, seed * 1000 + i, num_tokens) for i in range(num_streams))
        )
        return num_streams * num_tokens / (time.perf_counter() - start_s)


async def read(client: httpx.AsyncClient, url: str, number: int, num_tokens: int) -> None:
    body = {
        "model": MODEL,
        "prompt": [1000 + (number * 31 + i * 7) % 20000 for i in range(PROMPT_TOKENS)],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    num_read = 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                num_read += len(json.loads(line[6:])["choices"][0]["token_ids"])
    assert num_read == num_tokens, f"{num_read} of {num_tokens} tokens came"


def journal_alone_us(folder: Path, num_streams: int, num_steps: int = 200) -> float:
    """Processor time per token of writing steps of so many streams, one after the other."""
    journal = SqliteJournal(folder / f"alone-{num_streams}.sqlite", MODEL)

    async def write() -> None:
        accepted = [
            Accepted(
                response_id=f"cmpl-{i:032x}",
                endpoint="/v1/completions",
                model=MODEL,
                created_s=0,
                body={"prompt": "x" * 64},
                prompts=[[1] * PROMPT_TOKENS],
                params=[SamplingParams(seed=i)],
            )
            for i in range(num_streams)
        ]
        for one in accepted:
            journal.accept(one, lambda _: None)
        for step in range(num_steps):
            for one in accepted:
                delta = Delta(index=0, text=" word", token_ids=[step])
                journal.append(one.response_id, step, [(0, delta)], lambda _: None)
            await journal.find("")

    start_s = time.process_time()
    asyncio.run(write())
    used_s = time.process_time() - start_s
    journal.close()
    return used_s / (num_steps * num_streams) * 1e6


def compare(rounds: int, num_tokens: int, folder: Path) -> dict[int, list[tuple[float, float]]]:
    """By the number of streams: rates without and with a journal, a pair for each round."""
    config = EngineConfig(
        model=MODEL, dtype="float32", kv_memory_bytes=KV_BYTES, prefix_caching=False
    )
    rates: dict[int, list[tuple[float, float]]] = {number: [] for number in STREAMS}
    with ExitStack() as stack:
        engine = start_engine(config)
        stack.callback(engine.close)
        journal = SqliteJournal(folder / "journal.sqlite", MODEL)
        stack.callback(journal.close)
        without = stack.enter_context(served(engine, None))
        with_it = stack.enter_context(served(engine, journal))
        for url in (without, with_it):
            measure(url, 4, 8, seed=0)
        for number in range(1, rounds + 1):
            for num_streams in STREAMS:
                turns = (without, with_it) if number % 2 else (with_it, without)
                # The same prompts for both: different tokens cost different time.
                seen = {url: measure(url, num_streams, num_tokens, number) for url in turns}
                rates[num_streams].append((seen[without], seen[with_it]))
        assert journal.trouble is None, journal.trouble
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.client:
        url, *numbers = asked.client
        print(asyncio.run(load(url, *map(int, numbers))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone_us = {number: journal_alone_us(folder, number) for number in STREAMS}
        rates = compare(asked.rounds, asked.tokens, folder)
    report(rates, alone_us, asked.rounds, asked.tokens)


def report(
    rates: dict[int, list[tuple[float, float]]],
    alone_us: dict[int, float],
    rounds: int,
    num_tokens: int,
) -> None:
    table = Table("streams", "tokens/s without", "with", "ratio", "range", "alone, us/token")
    summary = {}
    for number, pairs in rates.items():
        ratios = [with_it / without for without, with_it in pairs]
        row = {
            "without": round(statistics.median(pair[0] for pair in pairs), 2),
            "with": round(statistics.median(pair[1] for pair in pairs), 2),
            "ratio": round(statistics.median(ratios), 4),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "alone_us": round(alone_us[number], 1),
        }
        summary[number] = row
        table.add_row(str(number), *map(str, row.values()))
    Console().print(table)
    kept = all(row["ratio"] >= 1 - LIMIT for row in summary.values())  # type: ignore[operator]
    result = {"bench": "journal", "rounds": rounds, "tokens": num_tokens, "limit": LIMIT}
    print(json.dumps(result | {"within_limit": kept, "streams": summary}))


if __name__ == "__main__":
    main()
