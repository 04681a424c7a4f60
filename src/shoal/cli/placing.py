"""Where `shoal serve` runs a model: in its own process, on this machine's cores, on a cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from shoal.cli.console import note
from shoal.cli.fetching import reporting
from shoal.cli.split_options import SPLIT_PANEL
from shoal.cluster.goal import Goal
from shoal.cluster.prediction import Objective
from shoal.config import EngineConfig
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.fleet.deployment import Deployment

CLUSTER_PANEL = "Cluster"
# When a forecast can be judged.
_MINUTE_S = 60.0

Placement = Literal["auto", "split"]

PlacementOption = Annotated[
    Placement | None,
    typer.Option(
        help="auto: measure, and let the planner decide (on one machine: run whole); split: as "
        "the options here say. [dim]default: auto on a cluster without such options, else split[/]",
        rich_help_panel=SPLIT_PANEL,
    ),
]
ClusterOption = Annotated[
    bool,
    typer.Option(
        "--cluster",
        help="Run on the machines of the cluster that this one is in ('shoal head' or "
        "'shoal join' must be running here).",
        rich_help_panel=CLUSTER_PANEL,
    ),
]
ObjectiveOption = Annotated[
    Objective,
    typer.Option(
        help="What --placement auto aims at: one stream, many, or both.",
        rich_help_panel=CLUSTER_PANEL,
    ),
]
PlaintextOption = Annotated[
    bool,
    typer.Option(
        "--insecure-plaintext",
        help="No encryption and no certificates between machines. For measuring only.",
        rich_help_panel=CLUSTER_PANEL,
    ),
]


class Where(msgspec.Struct, frozen=True):
    placement: Placement | None = None
    cluster: bool = False
    objective: Objective = "balanced"
    insecure_plaintext: bool = False
    state: Path | None = None

    def __post_init__(self) -> None:
        if self.insecure_plaintext and not self.cluster:
            raise ConfigError(
                "--insecure-plaintext is about traffic between machines: it goes with --cluster"
            )

    def goal(self, config: EngineConfig) -> Goal | None:
        """None if the user has decided how to split."""
        is_free = config.split.num_workers == 1
        if self.placement == "auto" and not is_free:
            raise ConfigError(
                "--placement auto decides how to split: leave --pipeline, --tensor and "
                "--replicas out"
            )
        if self.placement == "auto" or (self.placement is None and self.cluster and is_free):
            return Goal(objective=self.objective)
        return None


def deploy_at(config: EngineConfig, where: Where, port: int) -> Deployment:
    """Start a model there, saying what is decided. Raises ShoalError when it cannot.

    The next server of the model on the same port may take its workers over.
    """
    # torch takes seconds to import, which `--help` must not wait for.
    from shoal.fleet.deployment import deploy  # noqa: PLC0415

    goal = where.goal(config)
    key = f"{config.served_name or config.model} on port {port}" if config.hold_s else None
    if where.cluster:
        return _deploy_on_cluster(config, where, goal, key)
    if goal is not None:
        _explain_this_machine(config, goal)
    return deploy(config, session_key=key)


def _deploy_on_cluster(
    config: EngineConfig, where: Where, goal: Goal | None, session_key: str | None
) -> Deployment:
    from shoal.fleet.start_cluster import start_cluster_fleet  # noqa: PLC0415
    from shoal.fleet.state import state_folder  # noqa: PLC0415

    if where.insecure_plaintext:
        note(
            "[bold red]INSECURE:[/] prompts, answers and weights cross the network unencrypted, "
            "and anybody on it can join in or change them (--insecure-plaintext)"
        )
    with reporting() as report:
        fleet = start_cluster_fleet(
            config,
            state_folder(where.state),
            goal,
            insecure_plaintext=where.insecure_plaintext,
            session_key=session_key,
            report=report,
            say=note,
        )
    for reason in fleet.placed.reasons:
        note(reason)
    return fleet


def _explain_this_machine(config: EngineConfig, goal: Goal) -> None:
    from shoal.fleet.start_local import explain_this_machine  # noqa: PLC0415

    note("measuring this machine")
    for reason in explain_this_machine(config, goal):
        note(reason)


@contextmanager
def judged_after_a_minute(deployment: Deployment) -> Iterator[None]:
    """Say then how the planner's prediction compares with what was measured."""

    def judge() -> None:
        if text := deployment.forecast():
            note(text)

    timer = threading.Timer(_MINUTE_S, judge)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
