"""The options about steps: how much is in them, who waits, and what is guessed."""

from __future__ import annotations

from typing import Annotated, TypedDict

import typer

SCHEDULING_PANEL = "Scheduling"

MaxRunningOption = Annotated[
    int, typer.Option(help="Requests computed together.", rich_help_panel=SCHEDULING_PANEL)
]
MaxWaitingOption = Annotated[
    int,
    typer.Option(
        help="Requests that may queue; more are answered 429.", rich_help_panel=SCHEDULING_PANEL
    ),
]
MaxStepTokensOption = Annotated[
    int,
    typer.Option(
        help="Tokens of one step: more is faster for long prompts, less is smoother for the rest.",
        rich_help_panel=SCHEDULING_PANEL,
    ),
]
NoPrefixCacheOption = Annotated[
    bool,
    typer.Option(
        "--no-prefix-cache",
        help="Compute every prompt anew, even what is in the KV cache.",
        rich_help_panel=SCHEDULING_PANEL,
    ),
]
SpeculateOption = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Tokens of an answer to guess from what it repeats, and to compute in one step; "
        "answers stay as they are. 0 guesses none.",
        rich_help_panel=SCHEDULING_PANEL,
    ),
]
DraftModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A smaller model with the same tokens that guesses instead, where that saves time; "
        "up to 4 tokens, or what --speculate says.",
        rich_help_panel=SCHEDULING_PANEL,
    ),
]
StallAfterOption = Annotated[
    float,
    typer.Option(
        help="Seconds that work may wait without a finished step before /health fails, and that "
        "a step may take on other workers.",
        rich_help_panel=SCHEDULING_PANEL,
    ),
]


class Scheduling(TypedDict):
    """What an `EngineConfig` says of steps."""

    max_step_tokens: int
    max_running: int
    max_waiting: int
    prefix_caching: bool


def scheduling(
    max_step_tokens: int, max_running: int, max_waiting: int, no_prefix_cache: bool
) -> Scheduling:
    return Scheduling(
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        max_waiting=max_waiting,
        prefix_caching=not no_prefix_cache,
    )
