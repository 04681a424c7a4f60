"""Where the command line writes: answers to stdout, everything else to stderr."""

from __future__ import annotations

import sys

import msgspec
from rich.console import Console
from rich.markup import escape

_CONTROL_CHARACTERS = dict.fromkeys(set(range(32)) - {ord("\n"), ord("\t")} | {127})


def out_console() -> Console:
    return Console(highlight=False)


def err_console() -> Console:
    return Console(stderr=True, highlight=False)


def note(message: str) -> None:
    """A line about what is going on; dim, on stderr."""
    err_console().print(f"[dim]{escape(message)}[/]", soft_wrap=True)


def fail(message: str) -> None:
    """The one red line that a failed command ends with."""
    err_console().print(f"[bold red]error:[/] [red]{escape(message)}[/]", soft_wrap=True)


def write(text: str) -> None:
    """A piece of an answer to stdout, at once.

    On a terminal without control characters: a model must not move the cursor or set colours.
    """
    if sys.stdout.isatty():
        text = text.translate(_CONTROL_CHARACTERS)
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(record: object) -> None:
    """One JSON record on one line of stdout."""
    sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
    sys.stdout.flush()


def human_bytes(num_bytes: int) -> str:
    """`98.2 MB`; decimal units, as package indexes and disks count."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"
