"""The options about losses: how soon they are noticed, and what stands ready."""

from __future__ import annotations

from typing import Annotated, TypedDict

import typer

from shoal.config import DEAD_AFTER_S

RECOVERY_PANEL = "When something dies"
HOLD_S = 60.0

SparesOption = Annotated[
    int,
    typer.Option(
        help="Worker processes that stand by for lost ones, with the weights read as far as "
        "memory allows.",
        rich_help_panel=RECOVERY_PANEL,
    ),
]
DeadAfterOption = Annotated[
    float,
    typer.Option(
        help="Seconds without a heartbeat after which a worker is replaced.",
        rich_help_panel=RECOVERY_PANEL,
    ),
]
RecoveryTimeoutOption = Annotated[
    float,
    typer.Option(
        help="Seconds that requests wait for workers when none can be had; then they are told to "
        "come again.",
        rich_help_panel=RECOVERY_PANEL,
    ),
]
HoldOption = Annotated[
    float,
    typer.Option(
        help="Seconds that workers wait, weights loaded, for a new 'shoal serve' on the same port "
        "when this one dies; 0 ends them with it.",
        rich_help_panel=RECOVERY_PANEL,
    ),
]


class Recovering(TypedDict):
    """What an `EngineConfig` says of losses."""

    spares: int
    dead_after_s: float
    recovery_timeout_s: float
    hold_s: float


def recovering(
    spares: int, dead_after_s: float, recovery_timeout_s: float, hold_s: float, port: int
) -> Recovering:
    return Recovering(
        spares=spares,
        dead_after_s=dead_after_s,
        recovery_timeout_s=recovery_timeout_s,
        # A server on a port that the system chose cannot be found again.
        hold_s=hold_s if port else 0.0,
    )


__all__ = [
    "DEAD_AFTER_S",
    "HOLD_S",
    "DeadAfterOption",
    "HoldOption",
    "RecoveryTimeoutOption",
    "SparesOption",
    "recovering",
]
