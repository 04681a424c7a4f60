"""Splits a model over processes of this machine."""

from __future__ import annotations

from contextlib import ExitStack

import psutil

from shoal.cluster.goal import Goal
from shoal.cluster.hardware import Cluster
from shoal.cluster.planner import propose
from shoal.config import EngineConfig
from shoal.engine.assembly import usable_cores
from shoal.errors import UnsupportedByModel
from shoal.fleet.costing import cost_of
from shoal.fleet.fleet import Fleet
from shoal.fleet.launch_local import LOCAL_NODE, LocalLauncher
from shoal.fleet.muster import Muster
from shoal.fleet.operator import OperatorService
from shoal.fleet.reception import Reception
from shoal.fleet.session import open_session
from shoal.fleet.site import FixedSite, Node
from shoal.fleet.survey import BUDGET_S
from shoal.models.config import DecoderConfig, decoder_config
from shoal.models.registry import model_kind
from shoal.parallel.endpoint import LocalOnly, listen
from shoal.weights.cache import Progress, silent
from shoal.weights.source import ModelFiles, open_source, resolve
from shoal.weights.tokenizer import load_tokenizer
from shoal.worker.draft_model import check_draft_model
from shoal.worker.profile import profile_node

_SOCKET = "head.sock"
_ROWS = (1, 4, 16, 64)


def start_local_fleet(
    config: EngineConfig, *, session_key: str | None = None, report: Progress = silent
) -> Fleet:
    """Fetch the model if need be, start its workers, and start stepping.

    A head of the same `session_key` takes back the workers of the one before, if that did not end
    in order and `config.hold_s` has not passed.

    Raises SourceError, ConfigError, OutOfMemory, PeerLost, UnsupportedByModel.
    """
    files = resolve(config.model, report=report)
    model = decoder_of(files)
    tokenizer = load_tokenizer(files, report=report)
    check_draft_model(config, tokenizer)
    cores = usable_cores()[: config.num_threads]
    node = Node(
        name=LOCAL_NODE,
        address="this machine",
        num_cores=config.num_threads or len(cores),
        memory_bytes=psutil.virtual_memory().total,
    )
    with ExitStack() as stack:
        session = stack.enter_context(open_session(session_key))
        folder = session.folder
        # Of a head that was killed: the session is ours, so nobody listens there.
        (folder / _SOCKET).unlink(missing_ok=True)
        listener = listen(f"unix:{folder / _SOCKET}", LocalOnly())
        reception = Reception(listener, services={}, dead_after_s=config.dead_after_s)
        stack.callback(reception.close)

        def on_exit(worker: str, status: int) -> None:
            reception.note_end(worker, f"exit status {status}")

        launcher = LocalLauncher(
            reception.address, folder, on_exit, cores=cores, hold_s=config.hold_s
        )
        stack.callback(launcher.close)
        muster = Muster(
            launcher,
            reception,
            config,
            path_on=lambda _node: str(files.path),
            home=[LOCAL_NODE],
            first_number=session.first_number,
        )
        stack.callback(muster.spares.close)
        site = FixedSite(model, config.split, lambda: [node], "unix sockets of this user alone")
        fleet = Fleet(config, site, muster, files, tokenizer, stack.pop_all(), session)
        reception.offer("operator", OperatorService(fleet).serve)
        return fleet


def decoder_of(files: ModelFiles) -> DecoderConfig:
    """A model that can be divided. Raises UnsupportedByModel for an encoder."""
    source = open_source(files)
    try:
        if model_kind(source.config) == "encoder":
            raise UnsupportedByModel(
                f"{files.name} is an encoder, which runs whole: leave --pipeline, --tensor and "
                "--replicas out"
            )
        return decoder_config(source.config)
    finally:
        source.close()


def explain_this_machine(config: EngineConfig, goal: Goal) -> tuple[str, ...]:
    """What the planner says of this machine alone, measured now. Raises PlacementError."""
    cost = cost_of(resolve(config.model), config.dtype, config.quantize, config.kv_dtype)
    profile = profile_node(
        LOCAL_NODE,
        precisions=[cost.precision],
        rows=_ROWS,
        budget_s=BUDGET_S,
        num_threads=config.num_threads,
    )
    proposal = propose(Cluster(nodes=(profile,)), cost, goal)
    made = proposal.prediction
    expected = (
        f"predicted {made.one_stream:,.1f} tokens/s for one stream, {made.many_streams:,.0f} for "
        f"{made.num_streams}"
    )
    return (*proposal.reasons, expected)
