"""`shoal drain`: work leaves a node while streams go on."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.cluster_options import StateOption
from shoal.cli.operating import PidOption, ServedModelOption, move_work

EPILOG = """Examples:

  shoal drain rack2                          then stop 'shoal join' there

  shoal drain rack2 --model smollm2-135m     where several models are served
"""


def drain(
    node: Annotated[str, typer.Argument(metavar="NODE", help="As 'shoal status' calls it.")],
    model: ServedModelOption = None,
    pid: PidOption = None,
    state: StateOption = None,
) -> None:
    """Move the work away from a node; no stream breaks.

    Type it on the machine where 'shoal serve' runs. It ends when all has moved.
    The node gets nothing more until it leaves the cluster and joins again.
    """
    move_work(lambda client, report: client.drain(node, report), model, pid, state)
