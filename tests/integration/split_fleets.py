"""Many fleets over one nursery: what a split costs to start is mostly the import of torch."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from pretended_nodes import PretendedNodes

from shoal.config import EngineConfig, Split
from shoal.engine.assembly import usable_cores
from shoal.engine.local import start_engine
from shoal.engine.outputs import RequestOutput, gather
from shoal.fleet.deployment import AnyEngine
from shoal.fleet.fleet import Fleet
from shoal.fleet.launch_local import LOCAL_NODE, LocalLauncher
from shoal.fleet.muster import Muster
from shoal.fleet.reception import Reception
from shoal.fleet.site import FixedSite
from shoal.fleet.start_local import decoder_of
from shoal.parallel.endpoint import LocalOnly, listen
from shoal.request import SamplingParams
from shoal.weights.source import resolve
from shoal.weights.tokenizer import load_tokenizer

Asked = tuple[str, SamplingParams]


class Yard:
    """A launcher and a reception of this machine, for one fleet after the other."""

    def __init__(self, folder: Path, resources: ExitStack) -> None:
        listener = listen(f"unix:{folder}/head.sock", LocalOnly())
        self.reception = Reception(listener, services={})
        resources.callback(self.reception.close)

        def on_exit(worker: str, status: int) -> None:
            self.reception.note_end(worker, f"exit status {status}")

        cores = usable_cores()
        launcher = LocalLauncher(listener.address, folder, on_exit, cores=cores)
        resources.callback(launcher.close)
        self.folder = folder
        self.nodes = PretendedNodes(launcher, num_cores=len(cores))
        self._tokenizer = cache(load_tokenizer)
        # A launcher's workers never share a name, whichever fleet they are of.
        self._first_numbers = itertools.count(1, 10_000)

    @contextmanager
    def fleet(self, config: EngineConfig) -> Iterator[Fleet]:
        files = resolve(config.model)
        site = FixedSite(decoder_of(files), config.split, self.nodes.as_site, "unix sockets")
        muster = Muster(
            self.nodes,
            self.reception,
            config,
            path_on=lambda _node: str(files.path),
            home=[LOCAL_NODE],
            first_number=next(self._first_numbers),
        )
        resources = ExitStack()
        resources.callback(muster.spares.close)
        fleet = Fleet(config, site, muster, files, self._tokenizer(files), resources)
        try:
            yield fleet
        finally:
            fleet.close()


@contextmanager
def open_yard() -> Iterator[Yard]:
    with ExitStack() as resources:
        folder = resources.enter_context(tempfile.TemporaryDirectory(prefix="shoal-test-"))
        yield Yard(Path(folder), resources)


@contextmanager
def whole(config: EngineConfig) -> Iterator[AnyEngine]:
    """The single-process engine."""
    engine = start_engine(config)
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: AnyEngine, all_asked: Sequence[Asked]) -> list[RequestOutput]:
    """The answers of requests that are submitted together."""
    submitted = []
    for prompt, params in all_asked:
        tokens = engine.tokenizer.encode(prompt)
        submitted.append((tokens, params.n, engine.submit_sync(tokens, params)))
    return [gather(*each) for each in submitted]


def split_text(split: Split) -> str:
    """Such as `p2 t3 r1 70/30`."""
    parts = [f"p{split.pipeline}", f"t{split.tensor}", f"r{split.replicas}"]
    parts += ["/".join(map(str, numbers)) for numbers in (split.layers, split.shares) if numbers]
    return " ".join(parts)
