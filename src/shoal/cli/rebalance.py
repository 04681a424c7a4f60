"""`shoal rebalance`: the model is placed anew over the nodes that there are now."""

from __future__ import annotations

from shoal.cli.cluster_options import StateOption
from shoal.cli.operating import PidOption, ServedModelOption, move_work

EPILOG = """Examples:

  shoal rebalance            after a machine has joined
"""


def rebalance(
    model: ServedModelOption = None,
    pid: PidOption = None,
    state: StateOption = None,
) -> None:
    """Place the model anew over all nodes that are there and not drained; no stream breaks.

    Type it on the machine where 'shoal serve' runs. It ends when all has moved.
    The number of replicas stays: only starting 'shoal serve' anew changes that.
    """
    move_work(lambda client, report: client.rebalance(report), model, pid, state)
