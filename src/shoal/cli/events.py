"""`shoal events`: what a running server has lost, and how it got over it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from shoal.cli.cluster_options import StateOption
from shoal.cli.console import note, out_console, write_json
from shoal.cli.operating import PidOption, ServedModelOption, called, find_server
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.engine.api import Incident
    from shoal.fleet.operator_client import OperatorClient
    from shoal.fleet.status import FleetStatus

EPILOG = """Examples:

  shoal events

  shoal events --follow --last 0       only what happens from now on, until Ctrl-C

  shoal events --json | jq .phases.total

Phases are in seconds: silence (before it was noticed), start, load, form, recompute. The head
keeps the latest; /metrics counts all of them as shoal_recoveries_total.
"""

_REFRESH_S = 1.0
_COLOURS = {"recovered": "green", "given up": "red", "under way": "yellow"}


def events(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new ones as they come.")
    ] = False,
    last: Annotated[int, typer.Option(min=0, metavar="N", help="Only the latest N.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
    model: ServedModelOption = None,
    pid: PidOption = None,
    state: StateOption = None,
) -> None:
    """Tell how a running server got over lost workers, drains and rebalances.

    Type it on the machine where 'shoal serve' runs.
    """
    serving = find_server(model, pid, state)
    if not serving.control:
        raise ConfigError(
            f"{serving.model} (pid {serving.pid}) runs whole in one process: it has no workers to "
            "lose"
        )
    # Ctrl-C is how --follow ends.
    with called(serving, state) as client, suppress(KeyboardInterrupt) if follow else nullcontext():
        known = incidents_of(client.status(note))
        if not known and not follow:
            note("nothing has happened since the server started")
        shown = known[len(known) - min(last, len(known)) :]
        _show(shown, as_json)
        for new in _news(client, known) if follow else ():
            _show(new, as_json)


def incidents_of(fleet: FleetStatus) -> list[Incident]:
    """Of all replicas, oldest first."""
    every = [each for replica in fleet.replicas for each in replica.stats.incidents]
    return sorted(every, key=lambda each: each.began_s)


def _news(client: OperatorClient, known: Sequence[Incident]) -> Iterator[list[Incident]]:
    """Without end: those that have begun, and those that have ended since they were shown."""
    outcomes = {(each.replica, each.number): each.outcome for each in known}
    while True:
        time.sleep(_REFRESH_S)
        news = [
            each
            for each in incidents_of(client.status())
            if outcomes.get((each.replica, each.number)) != each.outcome
        ]
        outcomes |= {(each.replica, each.number): each.outcome for each in news}
        yield news


def _show(incidents: Sequence[Incident], as_json: bool) -> None:
    if as_json:
        for each in incidents:
            write_json(each)
        return
    # With torch above it, which --help need not wait for.
    from shoal.engine.story import told  # noqa: PLC0415

    console = out_console()
    for each in incidents:
        began = datetime.fromtimestamp(each.began_s).astimezone()
        when = f"{began:%Y-%m-%d %H:%M:%S}"
        if not console.is_terminal:  # one line each, whatever their length
            console.print(f"{when}  {told(each)}", soft_wrap=True, markup=False)
            continue
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        colour = _COLOURS[each.outcome]
        grid.add_row(f"[{colour}]{when}[/]", escape(told(each)))
        console.print(grid)
