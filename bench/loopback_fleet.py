"""A fleet of this machine whose workers connect as those of different machines do, for measuring.

Over the loopback interface no cable costs anything: what is left is the price of the protocol.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import psutil

from shoal.config import EngineConfig
from shoal.engine.assembly import usable_cores
from shoal.fleet.fleet import Fleet
from shoal.fleet.launch_local import LOCAL_NODE, LocalLauncher
from shoal.fleet.muster import Muster
from shoal.fleet.reception import Reception
from shoal.fleet.site import FixedSite, Node
from shoal.fleet.start_local import decoder_of
from shoal.parallel.endpoint import LocalOnly, MutualTls, Security, listen
from shoal.parallel.identity import (
    Identity,
    create_authority,
    install,
    issue,
    make_request,
)
from shoal.weights.source import resolve
from shoal.weights.tokenizer import load_tokenizer

HOST = "127.0.0.1"


def make_identity(folder: Path) -> Identity:
    """A new authority, and one certificate for the head and all its workers."""
    ca_pem = create_authority(folder / "ca")
    request = make_request(folder / "node", "local")
    certificate = issue(folder / "ca", request, node="local", addresses=[HOST])
    return install(folder / "node", certificate, ca_pem)


def start_loopback_fleet(config: EngineConfig, security: Security) -> Fleet:
    """As `start_local_fleet`, with every connection over `security`."""
    files = resolve(config.model)
    model = decoder_of(files)
    tokenizer = load_tokenizer(files)
    cores = usable_cores()
    node = Node(
        name=LOCAL_NODE,
        address=HOST,
        num_cores=len(cores),
        memory_bytes=psutil.virtual_memory().total,
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-")))
        reception = Reception(listen(_address(folder, security), security), services={})
        stack.callback(reception.close)
        launcher = LocalLauncher(
            reception.address,
            folder,
            lambda worker, status: reception.note_end(worker, f"exit status {status}"),
            cores=cores,
            security=security,
        )
        stack.callback(launcher.close)
        muster = Muster(launcher, reception, config, path_on=lambda _node: str(files.path))
        site = FixedSite(model, config.split, lambda: [node], "over the loopback interface")
        return Fleet(config, site, muster, files, tokenizer, stack.pop_all())


def _address(folder: Path, security: Security) -> str:
    if isinstance(security, LocalOnly):
        return f"unix:{folder}/head.sock"
    return f"{'tls' if isinstance(security, MutualTls) else 'tcp'}:{HOST}:0"
