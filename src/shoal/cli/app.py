"""The `shoal` command. Nothing heavy is imported here, so that --help is quick."""

from __future__ import annotations

import signal
from importlib.metadata import version
from typing import Annotated

import typer

from shoal.cli import (
    bench,
    chaos,
    chat,
    drain,
    evaluate,
    events,
    generate,
    head,
    join,
    models,
    plan,
    profile,
    pull,
    rebalance,
    restart,
    serve,
    status,
)
from shoal.cli.group import ShoalGroup
from shoal.cli.token import token_app

USE_PANEL = "Use a model"
FETCH_PANEL = "Get a model"
CLUSTER_PANEL = "Many machines"
MEASURE_PANEL = "Measure"

EXAMPLES = """Start here:

  shoal chat smollm2-135m          talk to a small model in this terminal

  shoal serve smollm2-135m         the OpenAI API at http://127.0.0.1:8000

'shoal COMMAND --help' has examples of each command.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

app = typer.Typer(
    name="shoal",
    cls=ShoalGroup,
    help="[bold]Shoal[/] runs language models on ordinary machines, behind the OpenAI API.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {version('shoal')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="SHOAL_DEBUG", help="Show the traceback of every error."),
    ] = False,
) -> None:
    """Only declares the options: the group reads `debug` when a command fails."""
    del show_version, debug


app.command(rich_help_panel=USE_PANEL, epilog=serve.EPILOG)(serve.serve)
app.command(rich_help_panel=USE_PANEL, epilog=chat.EPILOG)(chat.chat)
app.command(rich_help_panel=USE_PANEL, epilog=generate.EPILOG)(generate.generate)
app.command(rich_help_panel=FETCH_PANEL, epilog=pull.EPILOG)(pull.pull)
app.command(rich_help_panel=FETCH_PANEL, epilog=models.EPILOG)(models.models)
app.command(rich_help_panel=MEASURE_PANEL, epilog=bench.EPILOG)(bench.bench)
app.command(rich_help_panel=MEASURE_PANEL, epilog=chaos.EPILOG)(chaos.chaos)
app.command(rich_help_panel=MEASURE_PANEL, epilog=profile.EPILOG)(profile.profile)
app.command(rich_help_panel=MEASURE_PANEL, epilog=plan.EPILOG)(plan.plan)

app.command(rich_help_panel=CLUSTER_PANEL, epilog=head.EPILOG)(head.head)
app.command(rich_help_panel=CLUSTER_PANEL, epilog=join.EPILOG)(join.join)
app.command(rich_help_panel=CLUSTER_PANEL, epilog=status.EPILOG)(status.status)
app.command(rich_help_panel=CLUSTER_PANEL, epilog=events.EPILOG)(events.events)
app.command(rich_help_panel=CLUSTER_PANEL, epilog=drain.EPILOG)(drain.drain)
app.command(rich_help_panel=CLUSTER_PANEL, epilog=rebalance.EPILOG)(rebalance.rebalance)
app.command(rich_help_panel=CLUSTER_PANEL, epilog=restart.EPILOG)(restart.restart)
app.add_typer(token_app, name="token", rich_help_panel=CLUSTER_PANEL)

eval_app = typer.Typer(no_args_is_help=True, help="Measure the quality of a model.")
eval_app.command(epilog=evaluate.EPILOG)(evaluate.perplexity)
app.add_typer(eval_app, name="eval", rich_help_panel=MEASURE_PANEL)


@eval_app.callback()
def _keep_as_group() -> None:
    """Measure the quality of a model."""


def main() -> None:
    signal.signal(signal.SIGTERM, _end_in_order)
    app(prog_name="shoal")


def _end_in_order(number: int, _frame: object) -> None:
    """Until a command has its own way: what it has begun is cleaned up."""
    raise SystemExit(128 + number)
