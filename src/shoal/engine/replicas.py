"""Several whole copies of the model behind a router, seen from above as one engine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from msgspec.structs import replace

from shoal.cluster.router import Router, Ticket
from shoal.engine.api import EngineStats, Health, ModelInfo
from shoal.engine.serving import ServingEngine
from shoal.engine.streams import AsyncStream, OnEnd, SyncStream
from shoal.errors import EngineStopped, QueueFull
from shoal.request import SamplingParams
from shoal.weights.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_NOT_SUMS = ("replicas", "workers", "incidents", "recoveries")

StreamT = TypeVar("StreamT", AsyncStream, SyncStream)

_MAX_FULL_QUEUES = 4
"""How many replicas may refuse a request before its client is told to come again: when the least
loaded ones have no room, asking hundreds of others would only keep the event loop busy."""


class ReplicatedEngine:
    """An `AsyncEngine`, and all else that a `ServingEngine` is. Owns its replicas: close it.

    `router` must be new; it is used here only.
    """

    def __init__(self, replicas: Mapping[str, ServingEngine], router: Router) -> None:
        self._engines = dict(replicas)
        self._router = router
        # Held for the router's bookkeeping only. Engines report ends inside their own lock, so no
        # engine is called while this one is held.
        self._lock = threading.Lock()
        for name, engine in self._engines.items():
            router.join(name, cache_blocks=engine.stats().num_blocks)

    @property
    def info(self) -> ModelInfo:
        """`max_context` is what fits every replica."""
        infos = [engine.info for engine in self._engines.values()]
        return replace(infos[0], max_context=min(info.max_context for info in infos))

    @property
    def tokenizer(self) -> Tokenizer:
        return next(iter(self._engines.values())).tokenizer

    def submit(
        self,
        prompt_tokens: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        emitted: Sequence[list[int] | None] = (),
    ) -> AsyncStream:
        """Raises QueueFull when the replicas with the most room are full."""

        def submit_to(engine: ServingEngine, on_end: OnEnd) -> AsyncStream:
            return engine.submit(
                prompt_tokens, params, priority=priority, emitted=emitted, on_end=on_end
            )

        return self._submit(prompt_tokens, params.n, submit_to)

    async def embed(self, prompt_tokens: list[int], *, priority: int = 0) -> list[float]:
        def submit_to(engine: ServingEngine, on_end: OnEnd) -> AsyncStream:
            return engine.submit_embed(prompt_tokens, priority=priority, on_end=on_end)

        return await self._submit(_NOTHING_CACHED, 1, submit_to).embedding()

    def submit_sync(self, prompt_tokens: list[int], params: SamplingParams) -> SyncStream:
        def submit_to(engine: ServingEngine, on_end: OnEnd) -> SyncStream:
            return engine.submit_sync(prompt_tokens, params, on_end=on_end)

        return self._submit(prompt_tokens, params.n, submit_to)

    def submit_embed_sync(self, prompt_tokens: list[int]) -> SyncStream:
        def submit_to(engine: ServingEngine, on_end: OnEnd) -> SyncStream:
            return engine.submit_embed_sync(prompt_tokens, on_end=on_end)

        return self._submit(_NOTHING_CACHED, 1, submit_to)

    def stats(self) -> EngineStats:
        replicas = {name: engine.stats() for name, engine in self._engines.items()}
        numbers = [name for name in EngineStats.__struct_fields__ if name not in _NOT_SUMS]
        sums = {name: sum(getattr(one, name) for one in replicas.values()) for name in numbers}
        return EngineStats(**sums, replicas=replicas)

    def health(self) -> Health:
        """`ok` while at least one replica is well and takes requests; the reason names the rest."""
        with self._lock:
            available = self._router.available
        states = {name: engine.health() for name, engine in self._engines.items()}
        well = [state for name, state in states.items() if state.ok and name in available]
        complaints = [
            f"{name}: {'takes no new requests' if state.ok else state.reason}"
            for name, state in states.items()
            if not state.ok or name not in available
        ]
        reason = "working" if any(state.reason == "working" for state in well) else "idle"
        if complaints:
            reason = f"{len(well)} of {len(states)} replicas serve; {'; '.join(complaints)}"
        since_s = min(state.since_progress_s for state in well or states.values())
        return Health(ok=bool(well), reason=reason, since_progress_s=since_s)

    def set_available(self, replica: str, is_available: bool) -> None:
        """Whether a replica gets new requests; those it has go on."""
        with self._lock:
            self._router.set_available(replica, is_available)

    def loads(self) -> dict[str, int]:
        """Open samples by replica."""
        with self._lock:
            return self._router.loads

    def close(self) -> None:
        """Close every replica, whatever goes wrong with one."""
        for name in self._engines:
            self.set_available(name, False)
        with ExitStack() as stack:
            for engine in self._engines.values():
                stack.callback(engine.close)

    def _submit(
        self,
        prompt_tokens: list[int],
        num_samples: int,
        submit_to: Callable[[ServingEngine, OnEnd], StreamT],
    ) -> StreamT:
        """At the replica of the router's choice, or else at those with the most room."""
        full: list[str] = []
        refusal: QueueFull | EngineStopped = EngineStopped("no replica takes requests now")
        while len(full) < _MAX_FULL_QUEUES:
            ticket = self._start(prompt_tokens, num_samples, full)
            if ticket is None:
                break
            on_end = partial(self._finish, ticket)
            try:
                return submit_to(self._engines[ticket.replica], on_end)
            except QueueFull as error:
                on_end()
                full.append(ticket.replica)
                refusal = error
            except EngineStopped as error:
                on_end()
                self._take_out(ticket.replica, error)
            except BaseException:
                on_end()
                raise
        raise refusal

    def _start(
        self, prompt_tokens: list[int], num_samples: int, full: Collection[str]
    ) -> Ticket | None:
        with self._lock:
            return self._router.start(prompt_tokens, weight=num_samples, besides=full)

    def _finish(self, ticket: Ticket) -> None:
        with self._lock:
            self._router.finish(ticket)

    def _take_out(self, replica: str, error: EngineStopped) -> None:
        # An engine that has stopped does not start again: with nothing open it would look idle
        # and draw every request.
        log.error("%s takes no more requests: %s", replica, error)
        self.set_available(replica, False)


_NOTHING_CACHED: list[int] = []
"""The prompt that the router sees of an embedding: it reads nothing from the KV cache."""
