"""A real server under load: `python -m bench.serve [--workload NAME] [-- OPTIONS OF THE SERVER]`.

Method: `shoal serve` in a process of its own, asked over HTTP by this one. For each rate, requests
arrive at random (Poisson, seeded) times for `--seconds`, however many are open; then all of them
end. Before that, the lowest rate warms the server up: it goes on taking memory when it is ready.
Answers run to their full length. Latency is the client's, from sending to each token's
arrival; a rate's figures are of all its requests, those of the beginning and the end included.
Goodput is how many requests kept the limits of `--goodput` (names and units as vLLM's). `late` is
how much later than planned requests were sent: this client's own fault, 99 of 100.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from bench.goodput import Goodput, Limits, goodput, parse_limits
from bench.machine import describe_machine
from bench.server_process import served
from bench.serving_loads import (
    WORKLOADS,
    Sent,
    Workload,
    conversations_of,
    num_conversations,
    send_all,
)
from shoal.cli.bench_targets import ServerTarget, async_client
from shoal.evaluate.latency import LoadReport, Percentiles, percentiles, summarise
from shoal.evaluate.perplexity import english_text
from shoal.worker.profile import usable_cores

_PERCENTILES = ("p50_ms", "p90_ms", "p99_ms")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One rate."""

    rate_per_s: float
    report: LoadReport
    goodput: Goodput
    late_ms: float

    @property
    def cached_share(self) -> float:
        """Of all prompt tokens, as the server reports them."""
        return self.report.num_cached_tokens / max(1, self.report.num_prompt_tokens)


def row_of(rate_per_s: float, sent: Sent, limits: Limits) -> Row:
    report = summarise(sent.traces)
    late = percentiles(sent.late_s)
    assert late is not None
    return Row(
        rate_per_s=rate_per_s,
        report=report,
        goodput=goodput(sent.traces, limits, report.elapsed_s),
        late_ms=late.p99_ms,
    )


async def sweep(
    url: str,
    model: str,
    workload: Workload,
    rates: Sequence[float],
    *,
    seconds: float,
    warm_up_s: float,
    limits: Limits,
    seed: int,
) -> list[Row]:
    """Rate by rate, after a warm-up at the lowest; no question of one is cached for another."""
    planned = [(min(rates), warm_up_s), *((rate, seconds) for rate in rates)]
    numbers = [num_conversations(workload, rate, for_s) for rate, for_s in planned]
    async with async_client(url) as client:
        target = ServerTarget(client, model)
        text = await target.tokenize(english_text())
        conversations = conversations_of(workload, sum(numbers), text)
        rows = []
        for turn, ((rate, _), number) in enumerate(zip(planned, numbers, strict=True)):
            some, conversations = conversations[:number], conversations[number:]
            sent = await send_all(
                target,
                some,
                rate_per_s=rate,
                answer_tokens=workload.answer_tokens,
                seed=seed + turn,
            )
            rows.append(row_of(rate, sent, limits))
    return rows[1:]


def table_of(rows: Sequence[Row], limits: Limits) -> Table:
    title = "times in ms: p50 / p90 / p99; good: " + ", ".join(
        f"{name} ≤ {limit_ms:g} ms" for name, limit_ms in limits.items()
    )
    times = ("first token", "between tokens", "per token and request")
    rates = ("tokens/s", "good", "good/s", "cached", "late", "errors")
    table = Table("requests/s", "requests", *times, *rates, title=title)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        report = row.report
        table.add_row(
            f"{row.rate_per_s:g}",
            str(report.num_requests),
            *(_cell(times) for times in (report.ttft, report.gap, report.tpot)),
            f"{report.output_tokens_per_s:.1f}",
            f"{row.goodput.share:.0%}",
            f"{row.goodput.requests_per_s:.2f}",
            f"{row.cached_share:.0%}",
            f"{row.late_ms:.0f}",
            str(report.num_errors),
        )
    return table


def _cell(times: Percentiles | None) -> str:
    if times is None:
        return "-"
    return " / ".join(f"{getattr(times, name):,.0f}" for name in _PERCENTILES)


def record_of(row: Row) -> dict[str, Any]:
    return {
        "rate_per_s": row.rate_per_s,
        "cached_share": row.cached_share,
        "late_ms": row.late_ms,
        "goodput": msgspec.to_builtins(row.goodput),
        **msgspec.to_builtins(row.report),
    }


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="plain")
    parser.add_argument("--rates", nargs="+", type=float, help="requests per second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals, for each rate")
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds not counted, before")
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=["ttft:1000", "tpot:100"],
        metavar="NAME:MS",
        help="limits: ttft, tpot, e2el (ttft:1000 tpot:100)",
    )
    parser.add_argument("--seed", type=int, default=0)
    for name in ("question-tokens", "answer-tokens", "shared-tokens", "num-turns"):
        parser.add_argument(f"--{name}", type=int, help="if not the workload's own")
    parser.add_argument("server", nargs="*", help="after --: options of shoal serve")
    return parser.parse_args()


def workload_of(options: argparse.Namespace) -> Workload:
    named = WORKLOADS[options.workload]
    names = ("question_tokens", "answer_tokens", "shared_tokens", "num_turns")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    rates = tuple(options.rates or named.rates)
    return msgspec.structs.replace(named, rates=rates, **given)


def main() -> None:
    options = options_of()
    workload, limits = workload_of(options), parse_limits(options.goodput)
    with served(options.model, options.server) as server:
        rows = asyncio.run(
            sweep(
                server.url,
                options.model,
                workload,
                workload.rates,
                seconds=options.seconds,
                warm_up_s=options.warm_up,
                limits=limits,
                seed=options.seed,
            )
        )
    machine = describe_machine(usable_cores())
    console = Console(width=160)
    console.print(f"{options.model}, {workload.name}; {machine}", highlight=False)
    console.print(table_of(rows, limits))
    for error in sorted({error for row in rows for error in row.report.errors}):
        console.print(f"error: {error}", markup=False)
    record = {
        "benchmark": "serve",
        "machine": machine,
        "model": options.model,
        "workload": msgspec.to_builtins(workload),
        "server": options.server,
        "limits": limits,
        "seconds": options.seconds,
        "rows": [record_of(row) for row in rows],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
