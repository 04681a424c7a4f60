"""What `shoal status`, `shoal drain` and the like share: which server, and its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from shoal.cli.console import err_console, note, out_console
from shoal.errors import ConfigError
from shoal.fleet.state import state_folder

if TYPE_CHECKING:
    from shoal.fleet.operator_client import OperatorClient, Report
    from shoal.fleet.serving_file import Serving

ServedModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="The server of this model, if several run."),
]
PidOption = Annotated[
    int | None, typer.Option("--pid", help="The server with this process id, if several run.")
]


def find_server(model: str | None, pid: int | None, state: Path | None) -> Serving:
    """Raises ConfigError."""
    from shoal.fleet.serving_file import find  # noqa: PLC0415  # keeps --help quick

    return find(state_folder(state), model=model, pid=pid)


@contextmanager
def called(serving: Serving, state: Path | None) -> Iterator[OperatorClient]:
    """A line to the server. Raises ConfigError, PeerLost, PeerRefused."""
    # TLS is slow to import.
    from shoal.fleet.operator_client import OperatorClient, security_for  # noqa: PLC0415

    security = security_for(serving.control, state_folder(state))
    with OperatorClient(serving.control, security) as client:
        yield client


def move_work(
    move: Callable[[OperatorClient, Report], str],
    model: str | None,
    pid: int | None,
    state: Path | None,
) -> None:
    """Have the server move work; show what goes on, then what was done."""
    serving = find_server(model, pid, state)
    if not serving.control:
        raise ConfigError(
            f"{serving.model} (pid {serving.pid}) runs whole in one process: there is nothing to "
            "move. Stop it with Ctrl-C or SIGTERM; what is open may finish"
        )
    with called(serving, state) as client:
        try:
            with _progress() as report:
                text = move(client, report)
        except KeyboardInterrupt:
            note("the server goes on with it; 'shoal status' shows how far it is")
            raise
    out_console().print(text, soft_wrap=True, markup=False)


@contextmanager
def _progress() -> Iterator[Report]:
    """A line that changes on a terminal; else a line for each new text. On stderr."""
    console = err_console()
    if not console.is_terminal:
        yield _on_change(note)
        return
    with console.status("asking the server") as spinner:
        yield lambda text: spinner.update(escape(text))


def _on_change(say: Callable[[str], None]) -> Report:
    said: list[str] = []

    def report(text: str) -> None:
        if said[-1:] != [text]:
            said[:] = [text]
            say(text)

    return report
