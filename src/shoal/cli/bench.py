"""`shoal bench`: throughput and latency of a model here, or of a running server."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from shoal.cli.bench_targets import EngineTarget, ServerTarget, async_client
from shoal.cli.chat_backend import http_client
from shoal.cli.client import base_url, network_errors, served_model
from shoal.cli.console import err_console, fail, note, out_console, write_json
from shoal.cli.loading import LoadOptions, open_llm
from shoal.cli.options import (
    AcceptTermsOption,
    DTypeOption,
    KvDtypeOption,
    KvMemoryOption,
    OptionalModelArgument,
    QuantizeOption,
    ThreadsOption,
    UrlOption,
    usage_errors,
)
from shoal.cli.split_options import PipelineOption, ReplicasOption, TensorOption, make_split
from shoal.evaluate.latency import LoadReport, Percentiles, Trace, summarise
from shoal.evaluate.load import LoadSpec, Target, cut_prompts, run_load
from shoal.evaluate.perplexity import english_text

LOAD_PANEL = "Load"

EPILOG = """Examples:

  shoal bench smollm2-135m                              one process, no HTTP

  shoal bench --url http://127.0.0.1:8000 --concurrency 32 --requests 128

  shoal bench --url http://127.0.0.1:8000 --rate 2.5    2.5 requests a second

Answers run to their full length (ignore_eos), so token counts are exact. Against a server,
give each run its own --seed: the prompts of an earlier run are in its prefix cache.
"""

RequestsOption = Annotated[
    int, typer.Option(min=1, help="Requests to send.", rich_help_panel=LOAD_PANEL)
]
ConcurrencyOption = Annotated[
    int, typer.Option(min=1, help="Requests open at a time.", rich_help_panel=LOAD_PANEL)
]
RateOption = Annotated[
    float | None,
    typer.Option(
        metavar="PER_SECOND",
        help="Send at random times at this mean rate instead, however many are open.",
        rich_help_panel=LOAD_PANEL,
    ),
]
PromptTokensOption = Annotated[
    int, typer.Option(min=1, help="Length of each prompt.", rich_help_panel=LOAD_PANEL)
]
AnswerTokensOption = Annotated[
    int, typer.Option(min=1, help="Length of each answer.", rich_help_panel=LOAD_PANEL)
]
LoadSeedOption = Annotated[
    int, typer.Option(help="Chooses prompts and sending times.", rich_help_panel=LOAD_PANEL)
]


def bench(
    model: OptionalModelArgument = None,
    url: UrlOption = None,
    requests: RequestsOption = 32,
    concurrency: ConcurrencyOption = 8,
    rate: RateOption = None,
    prompt_tokens: PromptTokensOption = 128,
    max_tokens: AnswerTokensOption = 64,
    seed: LoadSeedOption = 0,
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    kv_memory: KvMemoryOption = None,
    threads: ThreadsOption = None,
    accept_terms: AcceptTermsOption = False,
    pipeline: PipelineOption = 1,
    tensor: TensorOption = 1,
    replicas: ReplicasOption = 1,
) -> None:
    """Measure throughput and latency. The last line is one JSON record.

    With --url, MODEL is the name the server gives it; without one, its first. Exit status 1
    when a request failed.
    """
    if model is None and url is None:
        raise typer.BadParameter("name a MODEL to load, or a server with --url")
    with usage_errors():
        spec = LoadSpec(
            num_requests=requests,
            concurrency=concurrency,
            rate_per_s=rate,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            seed=seed,
        )
        address = base_url(url) if url is not None else None
    if address is not None:
        record, report = _bench_server(address, model, spec)
    else:
        options = LoadOptions(
            dtype=dtype,
            quantize=quantize,
            kv_dtype=kv_dtype,
            kv_memory=kv_memory,
            num_threads=threads,
            split=make_split(pipeline=pipeline, tensor=tensor, replicas=replicas),
            accept_terms=accept_terms,
        )
        record, report = _bench_model(model or "", options, spec)
    out_console().print(_table(report))
    for error, count in report.errors.items():
        fail(f"{count} × {error}")
    write_json({**record, "load": spec, **msgspec.structs.asdict(report)})
    if report.num_errors:
        raise typer.Exit(1)


def _bench_model(
    model: str, options: LoadOptions, spec: LoadSpec
) -> tuple[dict[str, Any], LoadReport]:
    with open_llm(model, options) as llm:
        note(llm.info.description)
        report = asyncio.run(_measure(EngineTarget(llm), spec))
        record = {"bench": "in process", "model": llm.info.name}
        return record | {"description": llm.info.description}, report


def _bench_server(url: str, model: str | None, spec: LoadSpec) -> tuple[dict[str, Any], LoadReport]:
    with http_client(url) as client, network_errors(url):
        served = served_model(client, model)

    async def measure() -> LoadReport:
        async with async_client(url) as client:
            return await _measure(ServerTarget(client, served.name), spec)

    report = asyncio.run(measure())
    return {"bench": "server", "url": url, "model": served.name}, report


async def _measure(target: Target, spec: LoadSpec) -> LoadReport:
    tokens = await target.tokenize(english_text())
    await _warm_up(target, tokens, spec)
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn())
    console = err_console()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("requests", total=spec.num_requests)

        def count(_: Trace) -> None:
            progress.advance(task)

        return summarise(await run_load(target, cut_prompts(tokens, spec), spec, on_done=count))


async def _warm_up(target: Target, tokens: list[int], spec: LoadSpec) -> None:
    """One unmeasured request: the first one pays for memory and threads not yet there.

    Read backwards, the text shares no prefix with the prompts that are measured.
    """
    one = msgspec.structs.replace(spec, num_requests=1, rate_per_s=None, max_tokens=4)
    await run_load(target, cut_prompts(tokens[::-1], one), one)


def _table(report: LoadReport) -> Table:
    table = Table("", "mean", "p50", "p90", "p99")
    for column in table.columns[1:]:
        column.justify = "right"
    _add(table, "first token, ms", report.ttft)
    _add(table, "between tokens, ms", report.gap)
    _add(table, "per token and request, ms", report.tpot)
    _add(table, "whole request, ms", report.latency)
    table.caption_justify = "left"
    table.caption = (
        f"{report.num_requests} requests in {report.elapsed_s:.2f} s, {report.num_errors} errors\n"
        f"{report.output_tokens_per_s:.1f} output tokens/s, "
        f"{report.total_tokens_per_s:.1f} with prompts, {report.requests_per_s:.2f} requests/s\n"
        f"{report.num_prompt_tokens} prompt tokens ({report.num_cached_tokens} cached), "
        f"{report.num_output_tokens} output tokens"
    )
    return table


def _add(table: Table, label: str, times: Percentiles | None) -> None:
    if times is None:
        table.add_row(label, *["-"] * 4)
        return
    values = (times.mean_ms, times.p50_ms, times.p90_ms, times.p99_ms)
    table.add_row(label, *(f"{value:.1f}" for value in values))
