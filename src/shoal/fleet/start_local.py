"""Splits a model over processes of this machine."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from shoal.cluster.placement import Placement, divide
from shoal.config import EngineConfig
from shoal.engine.assembly import usable_cores
from shoal.errors import UnsupportedByModel
from shoal.fleet.fleet import Fleet
from shoal.fleet.launch_local import LOCAL_NODE, LocalLauncher
from shoal.fleet.muster import Muster, shares_of
from shoal.fleet.reception import Reception
from shoal.models.config import decoder_config
from shoal.models.registry import model_kind
from shoal.parallel.endpoint import LocalOnly, listen
from shoal.weights.cache import Progress, silent
from shoal.weights.source import ModelFiles, open_source, resolve
from shoal.weights.tokenizer import load_tokenizer


def start_local_fleet(config: EngineConfig, *, report: Progress = silent) -> Fleet:
    """Fetch the model if need be, start its workers, and start stepping.

    Raises SourceError, ConfigError, OutOfMemory, PeerLost, UnsupportedByModel.
    """
    files = resolve(config.model, report=report)
    placement = _placement(config, files)
    tokenizer = load_tokenizer(files, report=report)
    cores = usable_cores()[: config.num_threads]
    shares = shares_of(placement.replicas, lambda _node: config.num_threads or len(cores))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-")))
        listener = listen(f"unix:{folder}/head.sock", LocalOnly())
        reception = Reception(listener, services={})
        stack.callback(reception.close)

        def on_exit(worker: str, status: int) -> None:
            reception.note_end(worker, f"exit status {status}")

        launcher = LocalLauncher(listener.address, folder, on_exit, cores=cores)
        stack.callback(launcher.close)
        muster = Muster(
            launcher,
            reception,
            config,
            shares=lambda _node: shares[LOCAL_NODE],
            path_on=lambda _node: str(files.path),
        )
        return Fleet(config, placement, muster, files, tokenizer, stack.pop_all())


def _placement(config: EngineConfig, files: ModelFiles) -> Placement:
    source = open_source(files)
    try:
        if model_kind(source.config) == "encoder":
            raise UnsupportedByModel(
                f"{files.name} is an encoder, which runs whole: leave --pipeline, --tensor and "
                "--replicas out"
            )
        return divide(decoder_config(source.config).dims, config.split, LOCAL_NODE)
    finally:
        source.close()
