"""`shoal plan`: where a model would run on a cluster, how fast, and why there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from shoal.cli.console import note, out_console, write_json
from shoal.cli.fetching import fetch
from shoal.cli.options import (
    AcceptTermsOption,
    DTypeOption,
    JsonOption,
    KvDtypeOption,
    ModelArgument,
    QuantizeOption,
    usage_errors,
)
from shoal.cluster.cluster_file import decode_cluster
from shoal.cluster.drawing import draw, layers_of
from shoal.cluster.goal import Goal
from shoal.cluster.planner import propose
from shoal.cluster.prediction import Objective
from shoal.cluster.proposal import NodeUse, Proposal
from shoal.cluster.svg import as_svg
from shoal.config import DType, KVDType, Quantize
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.cluster.costs import ModelCost

EPILOG = """Examples:

  shoal profile -o one.json                 measure a machine first

  shoal plan smollm2-135m --cluster one.json

  shoal plan smollm2-135m --cluster examples/cluster.json --svg plan.svg

'shoal profile --merge' makes one file of those of several machines.
"""

_GIB = 2**30


def plan(
    model: ModelArgument,
    cluster: Annotated[
        Path,
        typer.Option(
            exists=True, dir_okay=False, metavar="FILE", help="What 'shoal profile' measured."
        ),
    ],
    objective: Annotated[
        Objective,
        typer.Option(
            help="latency: one stream; throughput: many; balanced: the geometric mean of both."
        ),
    ] = "balanced",
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Cache that every replica must have room for, all streams together. "
            "[dim]default: 4096[/]",
        ),
    ] = None,
    streams: Annotated[int, typer.Option(min=1, help="Streams at a time on a busy replica.")] = 32,
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    svg: Annotated[
        Path | None, typer.Option(dir_okay=False, metavar="FILE", help="Draw the placement there.")
    ] = None,
    accept_terms: AcceptTermsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose which machine holds which layers, from what was measured of them.

    Nothing is loaded: of the model only the header is read.

    A prediction leaves out time for scheduling and sampling, and prompts.
    """
    nodes = decode_cluster(cluster.read_bytes(), str(cluster))
    with usage_errors():
        goal = _goal(objective, context, streams)
    cost = _cost(model, dtype, quantize, kv_dtype, accept_terms=accept_terms)
    proposal = propose(nodes, cost, goal)
    if svg is not None:
        _write(svg, as_svg(proposal, model))
    if as_json:
        write_json(proposal)
        return
    _print(proposal, model, cost)
    if svg is not None:
        note(f"drawn in {svg}")


def _goal(objective: Objective, context: int | None, streams: int) -> Goal:
    if context is None:
        return Goal(objective=objective, num_streams=streams)
    return Goal(objective=objective, num_streams=streams, kv_tokens=context)


def _cost(
    model: str, dtype: DType, quantize: Quantize, kv_dtype: KVDType, *, accept_terms: bool
) -> ModelCost:
    files = fetch(model, accept_terms=accept_terms)
    # Reading a header imports torch, which `--help` must not wait for.
    from shoal.fleet.costing import cost_of  # noqa: PLC0415

    return cost_of(files, dtype, quantize, kv_dtype)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _print(proposal: Proposal, model: str, cost: ModelCost) -> None:
    console = out_console()
    goal, made = proposal.goal, proposal.prediction
    console.print(
        f"[bold]{escape(model)}[/], precision {cost.precision}, best for {goal.objective}",
        soft_wrap=True,
    )
    console.print()
    for line in draw(proposal, console.width):
        console.print(escape(line), no_wrap=True, crop=False, overflow="ignore")
    console.print()
    console.print(
        f"predicted: [bold]{made.one_stream:,.1f}[/] tokens/s for one stream, "
        f"[bold]{made.many_streams:,.0f}[/] for {made.num_streams} on each replica together"
    )
    console.print()
    console.print(_memory_table(proposal))
    _print_list("why", proposal.reasons)
    _print_list("not chosen", [f"{other.what}: {other.why}" for other in proposal.rejected])
    console.print(
        "[dim]every placement was looked at[/]"
        if proposal.is_optimal
        else "[dim]too many placements to look at all: searched for a good one[/]"
    )


def _memory_table(proposal: Proposal) -> Table:
    table = Table("node", "part", "heads", "weights", "embedding, head", "cache", "used", "has")
    for column in table.columns[2:]:
        column.justify = "right"
    table.title = f"memory in GiB, with a cache of {proposal.goal.kv_tokens:,} tokens a replica"
    table.title_justify = "left"
    for use in proposal.nodes:
        sizes = (use.weight_bytes, use.table_bytes, use.kv_bytes, use.used_bytes, use.memory_bytes)
        table.add_row(
            escape(use.node),
            _part(use, len(proposal.placement.replicas)),
            f"{use.num_query_heads} + {use.num_kv_heads}",
            *(f"{size / _GIB:,.2f}" for size in sizes),
        )
    return table


def _part(use: NodeUse, num_replicas: int) -> str:
    where = layers_of(use)
    return f"replica {use.replica + 1}, {where}" if num_replicas > 1 else where


def _print_list(title: str, lines: list[str] | tuple[str, ...]) -> None:
    if not lines:
        return
    console = out_console()
    console.print(f"[bold]{title}[/]")
    for line in lines:
        console.print(f"  • {escape(line)}", soft_wrap=True)
