"""`shoal join`: this machine becomes a node of a cluster."""

from __future__ import annotations

import platform
from typing import Annotated

import typer

from shoal.cli.cluster_options import NameOption, StateOption
from shoal.cli.console import note
from shoal.cli.signals import stop_on_signal
from shoal.fleet.state import DEFAULT_PORT, state_folder

EPILOG = """Examples:

  shoal join 10.0.0.5 --token shoal-…     as 'shoal head' printed it

  shoal join 10.0.0.5                     again later: the certificate is kept

Ctrl-C leaves the cluster; before that, 'shoal drain NODE' moves the work away.
"""


def join(
    head: Annotated[str, typer.Argument(metavar="ADDRESS", help="Where 'shoal head' runs.")],
    token: Annotated[
        str | None,
        typer.Option(envvar="SHOAL_TOKEN", help="Needed the first time; 'shoal head' prints it."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65533, help="The head's port.")] = DEFAULT_PORT,
    name: NameOption = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="IP",
            help="Where the others reach this machine. "
            "[dim]default: its address on the way to the head[/]",
        ),
    ] = None,
    state: StateOption = None,
) -> None:
    """Lend this machine to a cluster, as one of its nodes. Runs until Ctrl-C."""
    from shoal.fleet.join_service import JoinService, become_node  # noqa: PLC0415  # heavy

    folder = state_folder(state)
    with folder.held(), stop_on_signal() as stop:
        membership = become_node(
            folder,
            head=head,
            port=port,
            token=token,
            node=name,
            address=address,
            default_name=platform.node().split(".")[0],
            report=note,
        )
        service = JoinService(folder, membership, head=head, report=note)
        try:
            service.run(stop)
        finally:
            note("leaving the cluster")
            service.close()
