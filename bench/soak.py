"""Whether a server stays whole and flat: `python bench/soak.py [--requests N]`.

Method: starts `shoal serve` as a child process and sends it short requests of every kind, first
one of each alone and then all at a fixed concurrency: whole, streamed, several samples, embeddings,
streams whose client leaves, and wrong ones. After every 200 it prints the server's resident memory,
open files and threads. A request counts as an error when its answer is not of the kind its question
deserves. The growth in the last line is from the first report after a quarter of the requests, when
caches are warm, to the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import msgspec
import psutil
from rich.console import Console
from rich.table import Table
from server_process import served

REPORT_EVERY = 200
IDLE_LIMIT_S = 30
NUM_KINDS = 8

Body = dict[str, Any]


class Row(msgspec.Struct, kw_only=True):
    """The server after so many requests."""

    num_requests: int
    seconds: float
    rss_mib: float
    num_fds: int
    num_threads: int
    num_errors: int


class Asker:
    """Sends request `number`; says what was wrong with the answer, or nothing."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model
        self._kinds: list[tuple[str, Callable[[int], Awaitable[str]]]] = [
            ("whole", self._whole),
            ("streamed", self._streamed),
            ("chat", self._chat),
            ("left", self._left),
            ("samples", self._samples),
            ("embedding", self._embedding),
            ("left early", self._left_early),
            ("wrong", self._wrong),
        ]

    async def ask(self, number: int) -> str:
        """Empty when all was well."""
        kind, send = self._kinds[number % NUM_KINDS]
        try:
            problem = await send(number)
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}: {error}"
        return f"{kind}: {problem}" if problem else ""

    def _body(self, number: int, **options: Any) -> Body:
        prompt = f"Note {number}: the {['cat', 'sea', 'old clock'][number % 3]}"
        return {"model": self._model, "prompt": prompt, "max_tokens": 8, "ignore_eos": True} | (
            options
        )

    async def _post(self, path: str, body: Body) -> tuple[int, Body]:
        answer = await self._client.post(path, json=body)
        return answer.status_code, answer.json()

    async def _whole(self, number: int) -> str:
        status, body = await self._post("/v1/completions", self._body(number, logprobs=1))
        return "" if status == 200 and body["usage"]["completion_tokens"] == 8 else f"{body}"

    async def _samples(self, number: int) -> str:
        status, body = await self._post("/v1/completions", self._body(number, n=3, max_tokens=4))
        return "" if status == 200 and len(body["choices"]) == 3 else f"{body}"

    async def _embedding(self, number: int) -> str:
        asked = {"model": self._model, "input": f"Sentence {number} about something"}
        status, body = await self._post("/v1/embeddings", asked)
        return "" if status == 200 and len(body["data"]) == 1 else f"{body}"

    async def _streamed(self, number: int) -> str:
        body = self._body(number, stream=True, stream_options={"include_usage": True})
        lines = await self._lines("/v1/completions", body)
        if not lines or lines[-1] != "[DONE]":
            return f"ended with {lines[-1:]}"
        usage = json.loads(lines[-2])["usage"]
        return "" if usage["completion_tokens"] == 8 else f"{usage}"

    async def _chat(self, number: int) -> str:
        question = {"role": "user", "content": f"Say the number {number}."}
        body = {"model": self._model, "messages": [question], "max_tokens": 8, "stream": True}
        lines = await self._lines("/v1/chat/completions", body)
        return "" if lines and lines[-1] == "[DONE]" else f"ended with {lines[-1:]}"

    async def _left(self, number: int) -> str:
        """In the middle of a stream that would be long."""
        body = self._body(number, stream=True, max_tokens=1000)
        lines = await self._lines("/v1/completions", body, at_most=3)
        return "" if len(lines) == 3 else f"got {lines}"

    async def _left_early(self, number: int) -> str:
        """Before there is an answer."""
        try:
            await self._client.post(
                "/v1/completions", json=self._body(number, max_tokens=1000), timeout=0.2
            )
        except httpx.TimeoutException:
            return ""
        return "an answer of 1000 tokens in 0.2 s"

    async def _wrong(self, number: int) -> str:
        wrong = (
            ({"temperature": -1}, 400),
            ({"model": "no such model"}, 404),
            ({"prompt": [10**9]}, 400),
            ({"max_tokens": 10**8}, 400),
            ({"nonsense": number}, 400),
        )
        options, expected = wrong[number // NUM_KINDS % len(wrong)]
        status, body = await self._post("/v1/completions", self._body(number, **options))
        return "" if status == expected else f"{options} got {status}: {body}"

    async def _lines(self, path: str, body: Body, at_most: int | None = None) -> list[str]:
        lines: list[str] = []
        async with self._client.stream("POST", path, json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    lines.append(line.removeprefix("data: "))
                if len(lines) == at_most:
                    break
        return lines


class Soak:
    """Sends numbered requests, so many at once, and watches the server meanwhile."""

    def __init__(self, asker: Asker, server: psutil.Process, num_requests: int) -> None:
        self._asker = asker
        self._server = server
        self._numbers = iter(range(num_requests))
        self._num_done = 0
        self._start_s = time.monotonic()
        self.errors: Counter[str] = Counter()
        self.rows: list[Row] = []

    async def run(self, concurrency: int) -> None:
        await asyncio.gather(*(self._one_after_another() for _ in range(concurrency)))

    def report(self) -> None:
        row = Row(
            num_requests=self._num_done,
            seconds=time.monotonic() - self._start_s,
            rss_mib=self._server.memory_info().rss / 2**20,
            num_fds=self._server.num_fds(),
            num_threads=self._server.num_threads(),
            num_errors=self.errors.total(),
        )
        self.rows.append(row)
        print(
            f"{row.num_requests:6} requests {row.seconds:7.1f} s  {row.rss_mib:7.1f} MiB  "
            f"{row.num_fds:4} fds  {row.num_threads:3} threads  {row.num_errors:3} errors",
            flush=True,
        )

    async def _one_after_another(self) -> None:
        for number in self._numbers:
            if problem := await self._asker.ask(number):
                self.errors[problem[:200]] += 1
            self._num_done += 1
            if self._num_done % REPORT_EVERY == 0:
                self.report()


async def soak(
    url: str, server: psutil.Process, *, model: str, num_requests: int, concurrency: int
) -> tuple[Soak, dict[str, int]]:
    """The soak when all is over, and the server's `/health` then."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        asker = Asker(client, model)
        # One by one first: few rows and many run in different kernels, and all should be warm.
        for number in range(NUM_KINDS):
            await asker.ask(number)
        running = Soak(asker, server, num_requests)
        running.report()
        await running.run(concurrency)
        health = await _idle_health(client)
    await asyncio.sleep(1)  # for the server to notice that our connections are gone
    running.report()
    return running, health


async def _idle_health(client: httpx.AsyncClient) -> dict[str, int]:
    """`/health` once nothing runs any more, or after waiting for that in vain."""
    deadline_s = time.monotonic() + IDLE_LIMIT_S
    while True:
        health: dict[str, int] = (await client.get("/health")).json()
        if not health["running"] + health["waiting"] or time.monotonic() > deadline_s:
            return health
        await asyncio.sleep(0.2)


def record_of(done: Soak, health: dict[str, int]) -> Body:
    last = done.rows[-1]
    warm = next(r for r in done.rows if r.num_requests >= last.num_requests / 4)
    return {
        "bench": "soak",
        "num_requests": last.num_requests,
        "seconds": round(last.seconds, 1),
        "num_errors": last.num_errors,
        "num_left_running": health["running"] + health["waiting"],
        "warm_after": warm.num_requests,
        "rss_warm_mib": round(warm.rss_mib, 1),
        "rss_end_mib": round(last.rss_mib, 1),
        "rss_growth_percent": round(100 * (last.rss_mib / warm.rss_mib - 1), 2),
        "fds": [done.rows[0].num_fds, warm.num_fds, last.num_fds],
        "threads": [done.rows[0].num_threads, warm.num_threads, last.num_threads],
    }


def show_errors(errors: Counter[str]) -> None:
    table = Table("times", "error")
    for error, times in errors.most_common(10):
        table.add_row(str(times), error)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    with served(options.model, ["--kv-memory", "512MiB"]) as server:
        done, health = asyncio.run(
            soak(
                server.url,
                server.process,
                model=options.model,
                num_requests=options.requests,
                concurrency=options.concurrency,
            )
        )
    if done.errors:
        show_errors(done.errors)
    print(json.dumps(record_of(done, health)))


if __name__ == "__main__":
    main()
