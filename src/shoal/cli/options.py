"""Options that several commands share, spelt and explained once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from shoal.config import DType, KVDType, Quantize, parse_bytes
from shoal.errors import ConfigError, InvalidRequest

MODEL_PANEL = "Model"
SAMPLING_PANEL = "Sampling"

MODEL_HELP = (
    "A catalogue name (see 'shoal models'), a GGUF file, a Hugging Face folder or id, "
    "or an fsspec URL such as s3://bucket/folder."
)


def kv_memory_bytes(text: str) -> int:
    """Parser of --kv-memory; a wrong amount is a usage error."""
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise typer.BadParameter(error.message) from error


@contextmanager
def usage_errors() -> Iterator[None]:
    """Show a parameter out of range as wrong usage, naming the option it came from."""
    try:
        yield
    except (InvalidRequest, ConfigError) as error:
        hint = f"'--{error.param.replace('_', '-')}'" if error.param else None
        raise typer.BadParameter(error.message, param_hint=hint) from error


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
OptionalModelArgument = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)]

DTypeOption = Annotated[
    DType,
    typer.Option(
        help="Type of weights and activations; a type named here switches --quantize auto off.",
        rich_help_panel=MODEL_PANEL,
    ),
]
QuantizeOption = Annotated[
    Quantize,
    typer.Option(
        help="Bits of the weights. auto: 4 as in the file or 8 for a few rows, 16 for many. "
        "int8 and int4 trade quality for speed.",
        rich_help_panel=MODEL_PANEL,
    ),
]
KvDtypeOption = Annotated[
    KVDType,
    typer.Option(
        help="Type of keys and values in the cache. auto: float16 with the native kernels, unless "
        "--dtype names a type; int8 takes half of that.",
        rich_help_panel=MODEL_PANEL,
    ),
]
MaxContextOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="TOKENS",
        help="Longest prompt and answer together. [dim]default: what the model was trained for[/]",
        rich_help_panel=MODEL_PANEL,
    ),
]
KvMemoryOption = Annotated[
    int | None,
    typer.Option(
        parser=kv_memory_bytes,
        metavar="SIZE",
        help="Memory for the KV cache, such as 512M or 2GiB. [dim]default: from free memory[/]",
        rich_help_panel=MODEL_PANEL,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="CPU threads. [dim]default: one for each core this process may use[/]",
        rich_help_panel=MODEL_PANEL,
    ),
]
AcceptTermsOption = Annotated[
    bool,
    typer.Option(
        "--accept-terms",
        envvar="SHOAL_ACCEPT_TERMS",
        help="Accept the licence terms of a model that asks for it (Gemma).",
        rich_help_panel=MODEL_PANEL,
    ),
]
MaxTokensOption = Annotated[
    int, typer.Option(rich_help_panel=SAMPLING_PANEL, help="Longest answer.")
]
TemperatureOption = Annotated[
    float, typer.Option(rich_help_panel=SAMPLING_PANEL, help="0 takes the likeliest token.")
]
TopPOption = Annotated[
    float,
    typer.Option(rich_help_panel=SAMPLING_PANEL, help="Likeliest tokens of this mass; 1: off."),
]
TopKOption = Annotated[
    int, typer.Option(rich_help_panel=SAMPLING_PANEL, help="Draw from that many; 0: off.")
]
SeedOption = Annotated[
    int | None,
    typer.Option(rich_help_panel=SAMPLING_PANEL, help="The same seed gives the same text."),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Talk to the server at this address, such as http://127.0.0.1:8000, "
        "and load no model here.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON record.")]
