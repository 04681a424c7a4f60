"""Brings a model to this machine, with a progress bar when there is something to wait for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from shoal.cli.console import err_console, note
from shoal.cli.terms import require_terms
from shoal.weights.cache import Progress as Report

if TYPE_CHECKING:
    from shoal.weights.source import ModelFiles


def fetch(name: str, *, accept_terms: bool = False) -> ModelFiles:
    """The files of model `name`, fetched where they are not here yet. Raises SourceError."""
    # Finding a model may need huggingface_hub and fsspec, which `--help` must not wait for.
    from shoal.weights.source import resolve  # noqa: PLC0415

    require_terms(name, accepted=accept_terms, report=_say_once())
    with reporting() as report:
        return resolve(name, report=report)


@contextmanager
def reporting() -> Iterator[Report]:
    """A progress callback that draws a bar on a terminal, and else says each thing once."""
    console = err_console()
    if not console.is_terminal:
        yield _say_once()
        return
    with _bar() as progress:
        yield _draw(progress)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err_console(),
        transient=True,
    )


def _draw(progress: Progress) -> Report:
    tasks: dict[str, TaskID] = {}

    def report(what: str, done_bytes: int, total_bytes: int | None) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total_bytes)
        progress.update(tasks[what], completed=done_bytes, total=total_bytes)

    return report


def _say_once() -> Report:
    said: set[str] = set()

    def report(what: str, done_bytes: int, total_bytes: int | None) -> None:
        del done_bytes, total_bytes
        if what not in said:
            said.add(what)
            note(what)

    return report
