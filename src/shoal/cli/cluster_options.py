"""Options that the commands of a cluster share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.errors import ConfigError
from shoal.fleet.durations import parse_duration_s
from shoal.fleet.state import STATE_VARIABLE


def duration_s(text: str | float) -> float:
    """Parser of options; a wrong duration is a usage error."""
    if isinstance(text, float):
        return text
    try:
        return parse_duration_s(text)
    except ConfigError as error:
        raise typer.BadParameter(error.message) from error


StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state",
        envvar=STATE_VARIABLE,
        metavar="DIR",
        help="Where this machine's certificate and secrets lie. "
        "[dim]default: ~/.local/state/shoal/cluster[/]",
    ),
]
TtlOption = Annotated[
    float,
    typer.Option(
        "--ttl",
        parser=duration_s,
        metavar="TIME",
        help="How long the token is good for, such as 30m, 24h or 7d.",
        show_default="1h",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option(
        metavar="NODE", help="What this machine is called. [dim]default: its host name[/]"
    ),
]
