"""`shoal head`: this machine begins a cluster, or takes its own up again."""

from __future__ import annotations

import platform
import time
from typing import Annotated

import typer

from shoal.cli.cluster_options import NameOption, StateOption, TtlOption
from shoal.cli.console import note
from shoal.cli.signals import stop_on_signal
from shoal.cli.token import print_join_command
from shoal.fleet.state import DEFAULT_PORT, state_folder

EPILOG = """Examples:

  shoal head                  prints the command to paste on other machines

  shoal head --address 10.0.0.5 --name rack1 --ttl 24h

Then, in another terminal of this machine:

  shoal serve smollm2-135m --cluster

Needs Ray on every machine, which Shoal's extra 'cluster' brings.
"""


def head(
    address: Annotated[
        str | None,
        typer.Option(
            metavar="IP",
            help="Where the others reach this machine. [dim]default: its main address[/]",
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(min=1024, max=65533, help="For joining; the two ports after it are Ray's."),
    ] = DEFAULT_PORT,
    name: NameOption = None,
    ttl: TtlOption = 3600.0,
    uses: Annotated[
        int, typer.Option(min=0, metavar="N", help="Machines that may join with it; 0: any.")
    ] = 0,
    with_token: Annotated[
        bool,
        typer.Option(
            "--token/--no-token", help="Print a token, or leave that to 'shoal token create'."
        ),
    ] = True,
    state: StateOption = None,
) -> None:
    """Begin a cluster, or take it up again, and let machines join. Runs until Ctrl-C."""
    from shoal.fleet.head_service import HeadService, main_address  # noqa: PLC0415  # heavy

    folder = state_folder(state)
    with folder.held(), stop_on_signal() as stop:
        service = HeadService(
            folder,
            address=address or main_address(),
            port=port,
            node=name or platform.node().split(".")[0],
            report=_report,
        )
        try:
            if service.start(stop):
                if with_token:
                    print_join_command(folder, service.membership, ttl, uses or None)
                service.run(stop)
        finally:
            note("stopping")
            service.close()


def _report(message: str) -> None:
    note(f"{time.strftime('%H:%M:%S')} {message}")
