"""Options that say how a model is divided over workers."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.config import Route, Split, Transport, WireFormat
from shoal.errors import ConfigError

SPLIT_PANEL = "Splitting over workers"


class Numbers:
    """A list such as 20/10; not a tuple, of which the parser of options would want each alone."""

    def __init__(self, text: str) -> None:
        self.values = tuple(float(part) for part in text.split("/"))


def numbers(text: str) -> Numbers:
    """Parser of such lists; a wrong one is a usage error."""
    try:
        return Numbers(text)
    except ValueError as error:
        raise typer.BadParameter(f"'{text}' is not a list of numbers such as 20/10") from error


PipelineOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Stages, one after the other, that hold one range of layers each.",
        rich_help_panel=SPLIT_PANEL,
    ),
]
TensorOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Ranks, side by side, that hold one slice of every layer each.",
        rich_help_panel=SPLIT_PANEL,
    ),
]
ReplicasOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Whole copies of the model, each split as above.",
        rich_help_panel=SPLIT_PANEL,
    ),
]
LayersOption = Annotated[
    Numbers | None,
    typer.Option(
        parser=numbers,
        metavar="A/B/…",
        help="Layers of each stage, such as 20/10. [dim]default: by cores, the last one fewer[/]",
        rich_help_panel=SPLIT_PANEL,
    ),
]
SharesOption = Annotated[
    Numbers | None,
    typer.Option(
        parser=numbers,
        metavar="A/B/…",
        help="Relative sizes of the ranks' slices, such as 70/30. [dim]default: by cores[/]",
        rich_help_panel=SPLIT_PANEL,
    ),
]
RouteOption = Annotated[
    Route,
    typer.Option(
        help="Which replica gets a request; prefix: where its beginning is cached, unless busy.",
        rich_help_panel=SPLIT_PANEL,
    ),
]
WireFormatOption = Annotated[
    WireFormat,
    typer.Option(
        "--wire",
        help="How activations travel between workers; int8 is about a quarter of the bytes, and "
        "shared memory stays exact.",
        rich_help_panel=SPLIT_PANEL,
    ),
]
TransportOption = Annotated[
    Transport,
    typer.Option(
        help="How the ranks of a stage add up. auto: shared memory on one machine, else sockets.",
        rich_help_panel=SPLIT_PANEL,
    ),
]


def make_split(
    pipeline: int = 1,
    tensor: int = 1,
    replicas: int = 1,
    layers: Numbers | None = None,
    shares: Numbers | None = None,
    route: Route = "prefix",
    wire: WireFormat = "exact",
    transport: Transport = "auto",
) -> Split:
    """Lists say how many parts there are where the number is left at 1. Raises ConfigError."""
    if layers is not None and pipeline == 1:
        pipeline = len(layers.values)
    if shares is not None and tensor == 1:
        tensor = len(shares.values)
    return Split(
        pipeline=pipeline,
        tensor=tensor,
        replicas=replicas,
        layers=None if layers is None else tuple(map(_whole, layers.values)),
        shares=None if shares is None else shares.values,
        route=route,
        wire_format=wire,
        transport=transport,
    )


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ConfigError(f"a stage holds whole layers, not {number:g}", param="layers")
    return int(number)
