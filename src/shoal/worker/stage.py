"""One worker's part of each step: from tokens or a neighbour's states to states or results."""

from __future__ import annotations

import time

import torch

from shoal.messages import Plan, StepResult
from shoal.models.decoder import Decoder
from shoal.parallel.communicator import Communicator
from shoal.parallel.control import Usage
from shoal.worker.batch import Batch
from shoal.worker.hidden_states import Inlet, Outlet
from shoal.worker.kv_cache import KVCache
from shoal.worker.runner import DecoderRunner


class Stage:
    """A shard with its cache and its neighbours, for one epoch.

    `inlet` is None for the first layers, `outlet` for the last.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        *,
        communicator: Communicator,
        block_size: int,
        inlet: Inlet | None,
        outlet: Outlet | None,
        timeout_s: float,
    ) -> None:
        self._decoder = decoder
        self._runner = DecoderRunner(decoder, cache, block_size=block_size)
        self._communicator = communicator
        self._block_size = block_size
        self._inlet = inlet
        self._outlet = outlet
        self._timeout_s = timeout_s
        self._num_steps = 0
        self._step_s = 0.0
        self._waiting_s = 0.0

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepResult | None:
        """A result from rank 0 of the last stage, None from all others.

        Raises PeerLost when a neighbour is gone or silent for longer than the timeout.
        """
        start_s = time.perf_counter()
        result = self._compute(plan)
        self._step_s += time.perf_counter() - start_s
        self._num_steps += 1
        return result

    def usage(self, epoch: int) -> Usage:
        outlet, communicator = self._outlet, self._communicator
        return Usage(
            epoch=epoch,
            busy_s=self._step_s - self._waiting_s,
            waiting_s=self._waiting_s,
            num_steps=self._num_steps,
            stage_bytes=outlet.sent_bytes if outlet else 0,
            stage_messages=outlet.sent_messages if outlet else 0,
            rank_bytes=communicator.sent_bytes,
            rank_messages=communicator.sent_messages,
        )

    def _compute(self, plan: Plan) -> StepResult | None:
        batch = Batch(plan.chunks, self._block_size)
        if self._inlet is None:
            x_TE = self._decoder.embed(batch.tokens)
        else:
            x_TE = self._receive(self._inlet, plan)
        states = self._runner.forward(batch, x_TE)
        if self._outlet is not None:
            self._outlet.send(plan, states)
            return None
        results = self._runner.finish(batch, states)
        if self._decoder.shard.rank != 0:
            return None
        return StepResult(epoch=plan.epoch, step=plan.step, results=results)

    def _receive(self, inlet: Inlet, plan: Plan) -> torch.Tensor:
        start_s = time.perf_counter()
        x_TE = inlet.receive(plan, timeout_s=self._timeout_s)
        self._waiting_s += time.perf_counter() - start_s
        return x_TE

    def close(self) -> None:
        """Wakes a thread that waits for a neighbour: its call raises PeerLost."""
        self._communicator.close()
        for part in (self._inlet, self._outlet):
            if part is not None:
                part.close()
