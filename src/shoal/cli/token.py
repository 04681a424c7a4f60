"""`shoal token`: who may join the cluster that this machine is the head of."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from shoal.cli.cluster_options import StateOption, TtlOption
from shoal.cli.console import err_console, note, out_console
from shoal.errors import ConfigError
from shoal.fleet.durations import human_duration
from shoal.fleet.state import Membership, StateFolder, state_folder

CREATE_EPILOG = """Examples:

  shoal token create                       one machine, within an hour

  shoal token create --ttl 7d --uses 20    twenty machines, within a week
"""

token_app = typer.Typer(
    no_args_is_help=True, help="Create, list and revoke the tokens that let machines join."
)


@token_app.command(epilog=CREATE_EPILOG)
def create(
    ttl: TtlOption = 3600.0,
    uses: Annotated[
        int, typer.Option(min=0, metavar="N", help="Machines that may join with it; 0: any.")
    ] = 1,
    state: StateOption = None,
) -> None:
    """Print the command that lets a machine join, with a new token in it.

    Type it on the machine where 'shoal head' runs.
    """
    folder, membership = _head(state)
    print_join_command(folder, membership, ttl, uses or None)


@token_app.command("list")
def list_tokens(state: StateOption = None) -> None:
    """Show the tokens that still let someone in; their secrets are not kept."""
    from shoal.fleet.token_store import TokenStore  # noqa: PLC0415  # keeps --help quick

    now_s = time.time()
    table = Table("token", "uses left", "expires in", box=None)
    for record in TokenStore(_head(state)[0]).alive(now_s):
        uses = "any" if record.uses_left is None else str(record.uses_left)
        table.add_row(record.token_id, uses, human_duration(record.expires_s - now_s))
    out_console().print(table)


@token_app.command()
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As 'shoal token list' shows it.")],
    state: StateOption = None,
) -> None:
    """Make a token worthless at once. Machines that have joined with it stay."""
    from shoal.fleet.token_store import TokenStore  # noqa: PLC0415  # keeps --help quick

    TokenStore(_head(state)[0]).revoke(token_id)
    note(f"token {token_id} lets nobody in any more")


def print_join_command(
    folder: StateFolder, head: Membership, ttl_s: float, uses: int | None
) -> None:
    """A new token, as the line to paste on other machines; stdout, so that it can be piped."""
    from shoal.fleet.state import DEFAULT_PORT  # noqa: PLC0415
    from shoal.fleet.token_store import TokenStore  # noqa: PLC0415  # keeps --help quick
    from shoal.fleet.tokens import draw_token  # noqa: PLC0415
    from shoal.parallel.identity import CA_FILE, fingerprint  # noqa: PLC0415

    token = draw_token(fingerprint((folder.authority / CA_FILE).read_bytes()))
    TokenStore(folder).add(token, time.time(), ttl_s, uses)
    machines = {None: "any number of machines", 1: "one machine"}.get(uses, f"{uses} machines")
    err_console().print(f"For {machines}, within {human_duration(ttl_s)}:")
    port = "" if head.port == DEFAULT_PORT else f" --port {head.port}"
    out_console().print(
        f"shoal join {head.address}{port} --token {token}", soft_wrap=True, markup=False
    )


def _head(state: Path | None) -> tuple[StateFolder, Membership]:
    folder = state_folder(state)
    membership = folder.load()
    if not membership.is_head:
        raise ConfigError(
            f"tokens are made on the head, {membership.head_address}; this is {membership.node}"
        )
    return folder, membership
