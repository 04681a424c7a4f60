"""`shoal chaos`: kills the workers of a running server, and sees what its clients notice."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from msgspec import structs

from shoal.cli.chaos_table import report_view
from shoal.cli.client import base_url
from shoal.cli.cluster_options import StateOption, duration_s
from shoal.cli.console import fail, note, out_console, write_json
from shoal.cli.group import EXIT_FAILED
from shoal.cli.operating import PidOption, ServedModelOption, called, find_server
from shoal.errors import ConfigError
from shoal.evaluate.chaos import ChaosPlan, How

EPILOG = """Examples:

  shoal serve smollm2-135m --pipeline 2 --dtype float32 --quantize none

  shoal chaos --kill-every 5s --for 10m         in another terminal

  shoal chaos --how mix --streams 32 --seed 7

Texts are promised to be equal for float32 only: the faster kernels round, and how they round
depends on how many streams are computed together. The last line is one JSON record.

Exit status: 1 if a stream broke, an answer differs from the calm run's, or the server is not well.
"""


KillEveryOption = Annotated[
    float,
    typer.Option(parser=duration_s, metavar="TIME", help="On average.", show_default="5s"),
]
ForOption = Annotated[
    float,
    typer.Option(
        "--for",
        parser=duration_s,
        metavar="TIME",
        help="Then what is open may end.",
        show_default="1m",
    ),
]
StreamsOption = Annotated[int, typer.Option(min=1, help="Requests open at a time.")]
HowOption = Annotated[
    How, typer.Option(help="kill: SIGKILL; freeze: SIGSTOP for 0.2 to 4 s; mix: either.")
]
AnswerTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer.")]
ChaosSeedOption = Annotated[int, typer.Option(help="Chooses prompts, victims and moments.")]
ApiOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Its API. [dim]default: as it says itself[/]"),
]


def chaos(
    kill_every: KillEveryOption = 5.0,
    run_for: ForOption = 60.0,
    streams: StreamsOption = 16,
    how: HowOption = "kill",
    max_tokens: AnswerTokensOption = 64,
    seed: ChaosSeedOption = 0,
    url: ApiOption = None,
    model: ServedModelOption = None,
    pid: PidOption = None,
    state: StateOption = None,
) -> None:
    """Kill workers of a running server under load; compare all answers with a calm run's.

    Type it on the machine where 'shoal serve' runs. Only workers on this machine are killed.
    Not for a server that people use. Ctrl-C ends it early, with its report.
    """
    # HTTP, Prometheus and processes: --help need not wait for them.
    from shoal.cli.chaos_run import check_targets, run_chaos  # noqa: PLC0415

    serving = find_server(model, pid, state)
    if not serving.control:
        raise ConfigError(
            f"{serving.model} (pid {serving.pid}) runs whole in one process: there is no worker "
            "to kill. Serve it with --pipeline, --tensor or --replicas"
        )
    if url is not None:
        serving = structs.replace(serving, url=base_url(url))
    plan = ChaosPlan(
        every_s=kill_every,
        for_s=run_for,
        num_streams=streams,
        how=how,
        max_tokens=max_tokens,
        seed=seed,
    )
    with called(serving, state) as client:
        fleet = client.status(note)
        check_targets(fleet)
        report = asyncio.run(run_chaos(plan, serving, fleet, client))
    out_console().print(report_view(report, plan, fleet.description))
    for text in (*report.problems, *report.examples):
        fail(text)
    record = {"bench": "chaos", "model": serving.model, "description": fleet.description}
    write_json({**record, "plan": plan, "ok": report.ok, **structs.asdict(report)})
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)
