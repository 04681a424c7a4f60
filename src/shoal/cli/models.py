"""`shoal models`: what can be had by name, and what is here already."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from shoal.cli.console import human_bytes, note, out_console, write_json
from shoal.cli.options import JsonOption
from shoal.cli.stored import StoredModel, known_models
from shoal.weights.cache import cache_root

EPILOG = """Examples:

  shoal models

  shoal models --json | jq '.\\[].name'
"""


def models(as_json: JsonOption = False) -> None:
    """List the catalogue and the models in the cache."""
    known = known_models()
    if as_json:
        write_json(known)
        return
    out_console().print(_table(known))
    note(f"cache: {cache_root()}; fetch a model with 'shoal pull NAME'")


def _table(known: list[StoredModel]) -> Table:
    table = Table("model", "size", "licence", "what it is", "where", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    table.columns[4].overflow = "fold"
    for model in known:
        where = escape(model.path) if model.path else "[dim]not fetched[/]"
        table.add_row(
            f"[bold]{escape(model.name)}[/]",
            human_bytes(model.num_bytes),
            escape(model.licence),
            escape(model.description),
            where,
        )
    return table
