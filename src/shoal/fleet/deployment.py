"""A served model, whole in this process or split over workers, behind one interface."""

from __future__ import annotations

from typing import Protocol

from shoal.config import EngineConfig
from shoal.engine.local import start_engine
from shoal.engine.replicas import ReplicatedEngine
from shoal.engine.serving import ServingEngine
from shoal.weights.cache import Progress, silent

AnyEngine = ServingEngine | ReplicatedEngine


class Deployment(Protocol):
    """Close it when done: that ends its engine and its workers."""

    @property
    def engine(self) -> AnyEngine: ...

    @property
    def control(self) -> str:
        """Where operators call; "" where there is nothing to operate."""
        ...

    def forecast(self) -> str:
        """What the planner expected beside what was measured; "" if nothing was predicted."""
        ...

    def close(self) -> None: ...


class InProcess:
    """A whole model in this process."""

    def __init__(self, engine: ServingEngine) -> None:
        self.engine = engine
        self.control = ""

    def forecast(self) -> str:
        return ""

    def close(self) -> None:
        self.engine.close()


def deploy(
    config: EngineConfig, *, session_key: str | None = None, report: Progress = silent
) -> Deployment:
    """Start a model on this machine, divided as `config.split` says.

    Workers of an earlier head of the same `session_key` are taken back: see `start_local_fleet`.

    Raises SourceError (no such model, a broken file, no network), ConfigError, OutOfMemory,
    UnsupportedByModel, PeerLost.
    """
    if config.split.num_workers == 1 and not config.spares:
        return InProcess(start_engine(config, report=report))
    # A tenth of a second to import, for workers that one process does without.
    from shoal.fleet.start_local import start_local_fleet  # noqa: PLC0415

    return start_local_fleet(config, session_key=session_key, report=report)
