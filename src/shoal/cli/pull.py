"""`shoal pull`: fetch a model, so that the next start needs no network."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from shoal.cli.console import err_console, human_bytes
from shoal.cli.fetching import fetch
from shoal.cli.options import AcceptTermsOption
from shoal.cli.stored import size_of

EPILOG = """Examples:

  shoal pull smollm2-135m

  shoal pull gemma3-270m --accept-terms

  shoal pull Qwen/Qwen3-0.6B        from Hugging Face, where the network allows
"""


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A catalogue name (see 'shoal models'), a hub id or a URL.",
        ),
    ],
    accept_terms: AcceptTermsOption = False,
) -> None:
    """Fetch a model into the cache and check it.

    What is there already is not fetched again; a download cut short goes on where it stopped.
    The cache is ~/.cache/shoal, or the folder 'shoal' in $SHOAL_CACHE. The path is printed on
    stdout.
    """
    files = fetch(name, accept_terms=accept_terms)
    err_console().print(
        f"[green]ready[/] [bold]{escape(name)}[/] {human_bytes(size_of(files.path))}",
        soft_wrap=True,
    )
    typer.echo(files.path)
