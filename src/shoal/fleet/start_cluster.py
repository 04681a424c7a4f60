"""Splits a model over the machines of the cluster that this one belongs to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from shoal.cluster.goal import Goal
from shoal.config import EngineConfig
from shoal.errors import ConfigError, PlacementError
from shoal.fleet.costing import cost_of
from shoal.fleet.fleet import Fleet
from shoal.fleet.muster import Muster
from shoal.fleet.operator import OperatorService
from shoal.fleet.ray_node import use_ray
from shoal.fleet.reception import Reception
from shoal.fleet.session import Session, open_session
from shoal.fleet.site import FixedSite, MeasuredSite, Node, Site
from shoal.fleet.start_local import decoder_of
from shoal.fleet.state import StateFolder
from shoal.fleet.survey import Survey
from shoal.parallel.address import HostAddress
from shoal.parallel.endpoint import MutualTls, Plaintext, Security, listen
from shoal.parallel.identity import load_identity
from shoal.parallel.listener import Listener
from shoal.weights.cache import Progress, cache_root, silent
from shoal.weights.provider import WeightsProvider
from shoal.weights.source import ModelFiles, resolve
from shoal.weights.tokenizer import load_tokenizer
from shoal.worker.draft_model import check_draft_model

if TYPE_CHECKING:
    from shoal.fleet.launch_ray import NodeView, RayLauncher

log = logging.getLogger(__name__)

_TRANSPORTS_OF_ONE_MACHINE = ("shared-memory", "nccl")


def start_cluster_fleet(
    config: EngineConfig,
    folder: StateFolder,
    goal: Goal | None,
    *,
    insecure_plaintext: bool = False,
    session_key: str | None = None,
    report: Progress = silent,
    say: Callable[[str], None] = lambda _text: None,
) -> Fleet:
    """Start a model on the cluster, placed by the planner for a goal, or as `config.split` says.

    Machines without the model's files get their shards' tensors from here. `say` hears what
    takes long. Raises SourceError, ConfigError, PlacementError, OutOfMemory, PeerLost.
    """
    membership = folder.load()
    security = _security(folder, insecure_plaintext)
    _check_transport(config, security)
    files = resolve(config.model, report=report)
    tokenizer = load_tokenizer(files, report=report)
    check_draft_model(config, tokenizer)
    use_ray(folder)
    # Only now: Ray reads its settings when it is imported, and is not needed on one machine.
    from shoal.fleet.launch_ray import NodeView, RayLauncher  # noqa: PLC0415

    with ExitStack() as stack:
        provider = WeightsProvider(files, cache_root(), report)
        stack.callback(provider.close)
        session = stack.enter_context(open_session(session_key))
        reception = Reception(
            _listen(session, membership.address, security),
            {"weights": provider.serve},
            dead_after_s=config.dead_after_s,
        )
        stack.callback(reception.close)

        launcher = RayLauncher(
            folder,
            reception.address,
            lambda worker, status: reception.note_end(worker, f"exit status {status}"),
            insecure_plaintext=insecure_plaintext,
            hold_s=config.hold_s,
        )
        stack.callback(launcher.close)
        site = _site(config, files, goal, folder, launcher, reception, NodeView(folder), say)

        muster = Muster(
            launcher,
            reception,
            config,
            path_on=lambda node: str(files.path) if node == membership.node else "",
            home=[membership.node],
            first_number=session.first_number,
            report=report,
        )
        stack.callback(muster.spares.close)
        fleet = Fleet(config, site, muster, files, tokenizer, stack.pop_all(), session)
        reception.offer("operator", OperatorService(fleet).serve)
        return fleet


def _security(folder: StateFolder, insecure_plaintext: bool) -> Security:
    return Plaintext() if insecure_plaintext else MutualTls(load_identity(folder.identity))


def _listen(session: Session, host: str, security: Security) -> Listener:
    """Where the workers of an earlier head call, if that can be had again."""
    scheme = "tcp" if isinstance(security, Plaintext) else "tls"
    before = session.address_before
    anywhere = str(HostAddress(scheme, host, 0))
    try:
        listener = listen(before if before.startswith(scheme) else anywhere, security)
    except ConfigError as error:
        log.warning("%s: the workers of the last head cannot come back", error)
        listener = listen(anywhere, security)
    session.note(address=listener.address)
    return listener


def _site(
    config: EngineConfig,
    files: ModelFiles,
    goal: Goal | None,
    folder: StateFolder,
    launcher: RayLauncher,
    reception: Reception,
    view: NodeView,
    say: Callable[[str], None],
) -> Site:
    security = "plaintext, open to the network" if _is_plain(reception) else "mutual TLS 1.3"

    def nodes() -> list[Node]:
        return [
            Node(
                name=each.name,
                start=each.ray_id,
                address=each.address,
                num_cores=each.num_cores,
                memory_bytes=each.memory_bytes,
                alive=each.alive,
            )
            for each in view.fleet()
        ]

    if goal is None:
        return FixedSite(decoder_of(files), config.split, nodes, security)
    cost = cost_of(files, config.dtype, config.quantize, config.kv_dtype)
    precision = cost.precision
    threads = f"-{config.num_threads}-threads" if config.num_threads else ""
    plain = "-plaintext" if _is_plain(reception) else ""
    path = folder.path / f"survey-{precision}{threads}{plain}.json"
    survey = Survey(launcher, reception, nodes, precision, config.num_threads, path, say)
    return MeasuredSite(cost, goal, survey, nodes, security)


def _is_plain(reception: Reception) -> bool:
    return reception.address.startswith("tcp:")


def _check_transport(config: EngineConfig, security: Security) -> None:
    transport = config.split.transport
    if transport == "gloo" and isinstance(security, MutualTls):
        raise ConfigError(
            "gloo cannot encrypt, and these machines talk over a network: leave --transport out, "
            "or give --insecure-plaintext too if everybody there may read and change the traffic"
        )
    if transport in _TRANSPORTS_OF_ONE_MACHINE:
        raise PlacementError(
            f"--transport {transport} works within one machine only: leave it out, and ranks on "
            "one machine use shared memory, others sockets"
        )
