"""`--journal` and `--grace`: what becomes of open responses when the server ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.stored import size_of
from shoal.config import EngineConfig
from shoal.fleet.state import StateFolder

if TYPE_CHECKING:
    from shoal.journal.writer import SqliteJournal
    from shoal.weights.source import ModelFiles

ENDING_PANEL = "When the server ends"
OFF = "off"

JournalOption = Annotated[
    str | None,
    typer.Option(
        "--journal",
        metavar="PATH|off",
        help="Where requests and their tokens are kept while they are needed, so that a server "
        "that is started again goes on with them. "
        "[dim]default: journal/MODEL-PORT.sqlite in --state; off with --port 0[/]",
        rich_help_panel=ENDING_PANEL,
    ),
]
GraceOption = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="SECONDS",
        help="How long open requests may go on after Ctrl-C or SIGTERM, unless a second one comes. "
        "What is open then is left to the next server, through the journal.",
        rich_help_panel=ENDING_PANEL,
    ),
]


@contextmanager
def opened_journal(
    chosen: str | None, state: StateFolder, files: ModelFiles, config: EngineConfig, port: int
) -> Iterator[SqliteJournal | None]:
    """None when it is off. Raises ConfigError when another server has it."""
    name = config.served_name or files.name
    path = journal_path(chosen, state, name, port)
    if path is None:
        yield None
        return
    # It brings the engine's interface, which `--help` need not wait for.
    from shoal.journal.writer import SqliteJournal  # noqa: PLC0415

    size = size_of(files.path)
    model = (
        f"{name}, {size} bytes, dtype {config.dtype}, quantize {config.quantize}, "
        f"KV cache {config.kv_dtype}"
    )
    journal = SqliteJournal(path, model)
    try:
        yield journal
    finally:
        journal.close()


def journal_path(chosen: str | None, state: StateFolder, name: str, port: int) -> Path | None:
    """`port` as it was asked for: a server on any free port does not find its journal again."""
    if chosen == OFF or (chosen is None and port == 0):
        return None
    if chosen is not None:
        return Path(chosen).expanduser().absolute()
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return state.path / "journal" / f"{plain}-{port}.sqlite"
