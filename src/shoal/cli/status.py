"""`shoal status`: what a running server does, and with which machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import RenderableType

from shoal.cli.client import network_errors
from shoal.cli.cluster_options import StateOption
from shoal.cli.console import note, out_console, write_json
from shoal.cli.group import EXIT_FAILED
from shoal.cli.operating import PidOption, ServedModelOption, called, find_server
from shoal.cli.status_rates import WINDOW_S, Rates, RateWindow, is_idle
from shoal.cli.status_table import fleet_view, load_text, whole_view

if TYPE_CHECKING:
    from shoal.fleet.serving_file import Serving
    from shoal.fleet.status import FleetStatus

EPILOG = """Examples:

  shoal status

  shoal status --watch                 until Ctrl-C

  shoal status --model smollm2-135m --json

Exit status: 1 if there is no server, or it cannot serve.
"""

_REFRESH_S = 1.0
# Names need not be cut short where nobody has to see them on a screen.
_PIPED_COLUMNS = 160


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a server. `fleet` is None if it has no workers, else `health` is.

    `tokens_per_s` is that of the last seconds.
    """

    serving: Serving
    ok: bool
    fleet: FleetStatus | None = None
    tokens_per_s: float | None = None
    health: dict[str, object] | None = None


Shown = tuple[Look, RenderableType]


def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Refresh every second until Ctrl-C.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON; with --watch one every second.")
    ] = False,
    model: ServedModelOption = None,
    pid: PidOption = None,
    state: StateOption = None,
) -> None:
    """Show a running server: nodes, who holds which layers, load, speed and health.

    Type it on the machine where 'shoal serve' runs.
    """
    serving = find_server(model, pid, state)
    looks = _fleet_looks(serving, state, watch) if serving.control else _whole_looks(serving, watch)
    ok = True
    # Ctrl-C is how --watch ends, also while it waits for an answer.
    with suppress(KeyboardInterrupt) if watch else nullcontext(), _screen(watch, as_json) as show:
        for look, view in looks:
            show(look, view)
            ok = look.ok
    if not ok and not watch:
        raise typer.Exit(EXIT_FAILED)


def _fleet_looks(serving: Serving, state: Path | None, watch: bool) -> Iterator[Shown]:
    """Without end to watch; else one, after two looks if there is a speed to measure."""
    window = RateWindow(5 * _REFRESH_S if watch else WINDOW_S)
    with called(serving, state) as client:
        fleet = client.status(note)
        rates = window.add(fleet)
        if not watch:
            if not is_idle(fleet):
                time.sleep(WINDOW_S)
            fleet = client.status(note)
            yield _fleet_look(serving, fleet, window.add(fleet))
            return
        while True:
            yield _fleet_look(serving, fleet, rates)
            time.sleep(_REFRESH_S)
            fleet = client.status()
            rates = window.add(fleet)


def _fleet_look(serving: Serving, fleet: FleetStatus, rates: Rates) -> Shown:
    speed = sum(rates.tokens_per_s.values()) if rates.tokens_per_s else None
    ok = any(replica.ok for replica in fleet.replicas)
    look = Look(serving=serving, ok=ok, fleet=fleet, tokens_per_s=speed)
    return look, fleet_view(serving, fleet, rates)


def _whole_looks(serving: Serving, watch: bool) -> Iterator[Shown]:
    yield _whole_look(serving)
    while watch:
        time.sleep(_REFRESH_S)
        yield _whole_look(serving)


def _whole_look(serving: Serving) -> Shown:
    import httpx  # noqa: PLC0415  # keeps --help quick

    with network_errors(serving.url):
        health = httpx.get(f"{serving.url}/health", timeout=5.0).json()
    look = Look(serving=serving, ok=health["ok"], health=health)
    load = load_text(health["running"], health["waiting"])
    return look, whole_view(serving, ok=health["ok"], reason=health["reason"], load=load)


@contextmanager
def _screen(watch: bool, as_json: bool) -> Iterator[Callable[[Look, RenderableType], None]]:
    """Shows one look after another: as JSON, on the same place of a terminal, or below it."""
    console = out_console()
    if not console.is_terminal:
        console.width = max(console.width, _PIPED_COLUMNS)
    if as_json:
        yield lambda look, _view: write_json(look)
    elif watch and console.is_terminal:
        from rich.live import Live  # noqa: PLC0415  # keeps --help quick

        with Live(console=console, auto_refresh=False) as live:
            yield lambda _look, view: live.update(view, refresh=True)
    else:
        yield lambda _look, view: console.print(view)
