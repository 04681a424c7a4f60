"""A model split over worker processes: its replicas, and all that keeps them running."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from shoal.cluster.placement import Placement, ReplicaPlacement
from shoal.cluster.router import Router
from shoal.config import EngineConfig
from shoal.engine.assembly import assemble, model_info
from shoal.engine.replicas import ReplicatedEngine
from shoal.engine.serving import ServingEngine
from shoal.fleet.crew import Crew
from shoal.fleet.muster import Muster
from shoal.fleet.remote_executor import RemoteExecutor
from shoal.weights.source import ModelFiles
from shoal.weights.tokenizer import Tokenizer


class Fleet:
    """`engine` serves; `replicas` are its parts. Close it when done: it ends its workers."""

    def __init__(
        self,
        config: EngineConfig,
        placement: Placement,
        muster: Muster,
        files: ModelFiles,
        tokenizer: Tokenizer,
        resources: ExitStack,
    ) -> None:
        """Raises PlacementError, PeerLost, and what kept a worker from loading.

        `resources` are closed with the fleet, or when it cannot be made.
        """
        self._resources = resources
        self._config = config
        self._muster = muster
        try:
            self.executors = self._start_executors(placement.replicas)
            engines = [self._engine(each, files, tokenizer) for each in self.executors]
        except BaseException:
            resources.close()
            raise
        self.engine = _behind_one_door(engines, config)

    def close(self) -> None:
        self.engine.close()
        self._resources.close()

    def _start_executors(self, placements: Sequence[ReplicaPlacement]) -> list[RemoteExecutor]:
        with ThreadPoolExecutor(len(placements), "shoal-start") as pool:
            return list(pool.map(self._executor, placements))

    def _executor(self, placement: ReplicaPlacement) -> RemoteExecutor:
        return RemoteExecutor(
            self._muster.gather(placement),
            next_crew=self._muster.mend,
            dismiss=self._muster.dismiss,
            step_timeout_s=self._config.stall_s,
        )

    def _engine(
        self, executor: RemoteExecutor, files: ModelFiles, tokenizer: Tokenizer
    ) -> ServingEngine:
        capacity = executor.restart(0)
        loaded = next(iter(executor.crew.members.values())).loaded
        info = model_info(
            self._config,
            files,
            num_blocks=capacity.num_blocks,
            max_context=loaded.max_context,
            vocab_size=loaded.vocab_size,
            can_generate=True,
            description=f"{loaded.description}, {describe(executor.crew)}",
        )
        return assemble(self._config, executor, capacity, tokenizer, info)


def _behind_one_door(
    engines: Sequence[ServingEngine], config: EngineConfig
) -> ServingEngine | ReplicatedEngine:
    if len(engines) == 1:
        return engines[0]
    names = [f"r{index}" for index in range(len(engines))]
    router = Router(config.split.route, block_size=config.block_size)
    return ReplicatedEngine(dict(zip(names, engines, strict=True)), router)


def describe(crew: Crew) -> str:
    """Such as "2 stages of 15 and 15 layers, 2 ranks each"."""
    layers = [len(stage[0].shard.layers) for stage in crew.stages]
    ranks = {len(stage) for stage in crew.stages}
    text = f"{len(layers)} stages of {' + '.join(map(str, layers))} layers"
    if len(layers) == 1:
        text = f"1 stage of {layers[0]} layers"
    return text if ranks == {1} else f"{text}, {' or '.join(map(str, sorted(ranks)))} ranks each"
