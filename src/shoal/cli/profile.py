"""`shoal profile`: what this machine can do, for the planner."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from shoal.cli.cluster_options import NameOption, StateOption
from shoal.cli.console import err_console, note, out_console, write_json
from shoal.cli.options import JsonOption, ThreadsOption
from shoal.cli.profile_table import links_table, node_table, noisy_figures, rates_table
from shoal.cluster.hardware import Cluster, Link, NodeProfile
from shoal.cluster.merge import merge_clusters
from shoal.config import Quantize
from shoal.errors import ConfigError, PeerLost
from shoal.fleet.state import Membership, StateFolder, state_folder

if TYPE_CHECKING:
    from shoal.parallel.endpoint import Security

LINK_PANEL = "Links to other machines"

EPILOG = """Examples:

  shoal profile                   measure this machine, print a table

  shoal profile -o a.json         keep it, for 'shoal plan --cluster a.json'

  shoal profile --merge a.json b.json -o cluster.json

Links are measured between two machines. On one, until Ctrl-C:

  shoal profile --answer tls:0.0.0.0:8480

On the other:

  shoal profile --link-to tls:10.0.0.2:8480 -o a.json

Certificates are those of 'shoal head' and 'shoal join'. Without a cluster:
tcp: addresses, and --insecure-plaintext on both sides.

'shoal serve --cluster' measures its machines itself: this is to plan ahead.
"""

FilesArgument = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[FILE]...", exists=True, dir_okay=False, help="For --merge."),
]
MergeOption = Annotated[
    bool, typer.Option("--merge", help="Measure nothing; put what FILEs hold into one.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", dir_okay=False, metavar="FILE", help="Keep the result here."),
]
OnlyQuantizeOption = Annotated[
    Quantize | None,
    typer.Option("--quantize", help="Only this one. [dim]default: all that run here[/]"),
]
SecondsOption = Annotated[
    float, typer.Option(min=1, max=600, help="How long to measure; less is noisier.")
]
DeviceOption = Annotated[Literal["cpu", "cuda"], typer.Option(help="What to measure.")]
LinkToOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ADDRESS",
        help="Measure the links to the machine that answers there; again for more.",
        rich_help_panel=LINK_PANEL,
    ),
]
AnswerOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Measure nothing; answer other machines' --link-to, until Ctrl-C.",
        rich_help_panel=LINK_PANEL,
    ),
]
InsecureOption = Annotated[
    bool,
    typer.Option(
        "--insecure-plaintext",
        help="Links without encryption, and no check of who connects (tcp: addresses).",
        rich_help_panel=LINK_PANEL,
    ),
]


def profile(
    files: FilesArgument = None,
    merge: MergeOption = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
    name: NameOption = None,
    quantize: OnlyQuantizeOption = None,
    seconds: SecondsOption = 12.0,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    link_to: LinkToOption = None,
    answer: AnswerOption = None,
    state: StateOption = None,
    insecure_plaintext: InsecureOption = False,
) -> None:
    """Measure this machine for 'shoal plan': memory, matrices in each precision, links.

    Takes some 15 s. Other programs that run meanwhile spoil the figures.
    """
    _check_usage(files, merge=merge, answer=answer, link_to=link_to)
    if merge:
        _show(merge_clusters([_read(path) for path in files or []]), output, as_json=as_json)
        return
    folder = state_folder(state)
    membership = folder.find()
    here = name or (membership.node if membership else socket.gethostname())
    if answer is not None:
        _answer(answer, _security(folder, membership, insecure=insecure_plaintext), here)
        return
    links: list[Link] = []
    if link_to:
        # Before the matrices: a wrong address should not show after twelve seconds.
        security = _security(folder, membership, insecure=insecure_plaintext)
        links = _measure_links(link_to, security, here)
    node = _measure(here, quantize, seconds=seconds, threads=threads, device=device)
    _show(Cluster(nodes=(node,), links=tuple(links)), output, as_json=as_json)


def _check_usage(
    files: list[Path] | None, *, merge: bool, answer: str | None, link_to: list[str] | None
) -> None:
    if merge != bool(files):
        raise typer.BadParameter("--merge and FILEs go together")
    if sum((merge, answer is not None, bool(link_to))) > 1:
        raise typer.BadParameter("--merge, --answer and --link-to exclude each other")


def _measure(
    here: str,
    precision: Quantize | None,
    *,
    seconds: float,
    threads: int | None,
    device: str,
) -> NodeProfile:
    # Imports torch, which --help and --merge must not wait for.
    from shoal.worker.profile import profile_node  # noqa: PLC0415

    return profile_node(
        here,
        precisions=(precision,) if precision else None,
        budget_s=seconds,
        num_threads=threads,
        device=device,
        report=note,
    )


def _security(folder: StateFolder, membership: Membership | None, *, insecure: bool) -> Security:
    # Imports cryptography, which --help must not wait for.
    from shoal.parallel.endpoint import LocalOnly, MutualTls, Plaintext  # noqa: PLC0415
    from shoal.parallel.identity import load_identity  # noqa: PLC0415

    if insecure:
        err_console().print(
            "[bold red]INSECURE:[/] links in plain text: anyone on the way can read and change "
            "what is sent, anyone may connect. Only for measuring, on a network you trust."
        )
        return Plaintext()
    return MutualTls(load_identity(folder.identity)) if membership else LocalOnly()


def _measure_links(addresses: list[str], security: Security, here: str) -> list[Link]:
    from shoal.cli.link_meeting import measure_links_to  # noqa: PLC0415  imports cryptography

    links: list[Link] = []
    for address in addresses:
        note(f"measuring the links to {address}")
        links += measure_links_to(address, security, here=here)
    return links


def _answer(address: str, security: Security, here: str) -> None:
    from shoal.cli.link_meeting import answer_links  # noqa: PLC0415  imports cryptography
    from shoal.parallel.endpoint import listen  # noqa: PLC0415

    listener = listen(address, security)
    note(f"{here} answers at {listener.address}; Ctrl-C ends it")
    try:
        answer_links(listener, security, here=here, report=note)
    except (KeyboardInterrupt, PeerLost):
        note("stopped")
    finally:
        listener.close()


def _read(path: Path) -> Cluster:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Cluster)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is no result of 'shoal profile': {error}") from error


def _show(cluster: Cluster, output: Path | None, *, as_json: bool) -> None:
    if output is not None:
        try:
            output.write_bytes(msgspec.json.format(msgspec.json.encode(cluster), indent=2) + b"\n")
        except OSError as error:
            raise ConfigError(f"cannot write {output}: {error.strerror}") from error
    if as_json:
        write_json(cluster)
        return
    console = out_console()
    for node in cluster.nodes:
        console.print(node_table(node), "", rates_table(node), "", sep="\n")
        if noisy := noisy_figures(node):
            note(f"noisy, measure again when the machine is quiet: {', '.join(noisy)}")
    if cluster.links:
        console.print(links_table(cluster.links))
