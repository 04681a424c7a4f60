"""`shoal restart`: all workers of a running server are replaced while streams go on."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.cluster_options import StateOption
from shoal.cli.operating import PidOption, ServedModelOption, move_work

EPILOG = """Examples:

  shoal restart                    one replica after the other

  shoal restart --at-once          all together: sooner, but with twice the memory

The new workers of a replica load beside the old ones: its machines must have room for its weights
and its KV cache a second time. If they have not, nothing changes; drain the machines one by one
instead, or start the server anew.
"""

_ALL = 2**16


def restart(
    rolling: Annotated[
        bool,
        typer.Option(
            "--rolling/--at-once", help="One replica after the other, or all at the same time."
        ),
    ] = True,
    model: ServedModelOption = None,
    pid: PidOption = None,
    state: StateOption = None,
) -> None:
    """Replace all workers of a running server by new processes; no stream breaks.

    Type it on the machine where 'shoal serve' runs. It ends when all have taken over.
    The server itself goes on as it is, and so do its open connections.
    """
    together = 1 if rolling else _ALL
    move_work(lambda client, report: client.restart(together, report), model, pid, state)
