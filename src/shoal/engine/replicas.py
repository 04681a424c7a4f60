"""Several whole copies of the model behind a router, seen from above as one engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from msgspec.structs import replace

from shoal.cluster.router import Router
from shoal.engine.api import EngineStats, Health, ModelInfo
from shoal.engine.dispatch import Dispatch, Place
from shoal.engine.job import Job
from shoal.engine.serving import ServingEngine
from shoal.engine.streams import AsyncStream, OnEnd, SyncStream
from shoal.errors import CallerError, EngineStopped, QueueFull
from shoal.request import SamplingParams
from shoal.weights.tokenizer import Tokenizer

_NOT_SUMS = ("replicas", "workers", "incidents", "recoveries")

StreamT = TypeVar("StreamT", AsyncStream, SyncStream)

_MAX_FULL_QUEUES = 4
"""How many replicas may refuse a request before its client is told to come again: when the least
loaded ones have no room, asking hundreds of others would only keep the event loop busy."""

MOVE_AFTER_S = 2.0
"""A replica without workers for so long hands its requests over. A spare takes over sooner, and
then they go on where much of them is in order; a new process or node takes longer than computing
them anew elsewhere."""
_MOST_MOVES = 3
"""A request that is wherever workers are lost may be the cause: one engine must find it out."""


class ReplicatedEngine:
    """An `AsyncEngine`, and all else that a `ServingEngine` is. Owns its replicas: close it.

    `router` must be new; it is used here only.
    """

    def __init__(
        self,
        replicas: Mapping[str, ServingEngine],
        router: Router,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engines = dict(replicas)
        self._dispatch = Dispatch(router, clock=clock)
        for name, engine in self._engines.items():
            self._dispatch.join(name, cache_blocks=engine.stats().num_blocks)
            engine.watch_recovery(partial(self._in_trouble, name))

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
        self._look_after()
        takers = self._dispatch.takers
        states = {name: engine.health() for name, engine in self._engines.items()}
        shown = {
            name: state if name in takers else _left_out(state) for name, state in states.items()
        }
        well = [state for state in shown.values() if state.ok]
        ill = {name: state for name, state in shown.items() if state.reason not in _CALM}
        reason = "working" if any(state.reason == "working" for state in well) else "idle"
        if ill:
            reasons = "; ".join(f"{name}: {state.reason}" for name, state in ill.items())
            reason = f"{len(shown) - len(ill)} of {len(shown)} replicas serve; {reasons}"
        ready = [state for state in shown.values() if state.ready]
        return Health(
            live=any(state.live for state in states.values()),
            ready=bool(ready),
            progressing=any(state.progressing for state in ready or states.values()),
            reason=reason,
            since_progress_s=min(state.since_progress_s for state in well or states.values()),
            replicas=shown,
        )

    def set_available(self, replica: str, is_available: bool) -> None:
        """Whether a replica gets new requests; those it has go on."""
        self._dispatch.withhold(replica, not is_available)

    def loads(self) -> dict[str, int]:
        """Open samples by replica."""
        return self._dispatch.loads

    def close(self) -> None:
        """Close every replica, whatever goes wrong with one."""
        for name in self._engines:
            self.set_available(name, False)
        with ExitStack() as stack:
            for engine in self._engines.values():
                stack.callback(engine.close)

    # ---- new requests ---------------------------------------------------------------------

    def _submit(
        self,
        prompt_tokens: list[int],
        num_samples: int,
        submit_to: Callable[[ServingEngine, OnEnd], StreamT],
    ) -> StreamT:
        """At the replica of the router's choice, or else at those with the most room."""
        self._look_after()
        full: list[str] = []
        stopped: list[str] = []
        refusal: QueueFull | EngineStopped = EngineStopped("no replica takes requests now")
        while len(full) < _MAX_FULL_QUEUES:
            besides = [*full, *stopped]
            place = self._dispatch.start(prompt_tokens, weight=num_samples, besides=besides)
            if place is None:
                break
            try:
                return self._submit_to(place, submit_to)
            except QueueFull as error:
                self._dispatch.pass_over(place)
                full.append(place.replica)
                refusal = error
            except EngineStopped as error:
                self._dispatch.refused(place, error)
                stopped.append(place.replica)
                refusal = error
            except BaseException:
                self._dispatch.pass_over(place)
                raise
        raise refusal

    def _submit_to(
        self, place: Place, submit_to: Callable[[ServingEngine, OnEnd], StreamT]
    ) -> StreamT:
        stream = submit_to(self._engines[place.replica], partial(self._dispatch.end, place))
        # Only now may it be moved; whoever would have moved it comes by again.
        place.job = stream.job
        return stream

    # ---- replicas that wait for workers ---------------------------------------------------

    def _look_after(self) -> None:
        troubled = self._dispatch.troubled
        self._dispatch.well([name for name in troubled if not self._engines[name].is_recovering])

    def _in_trouble(self, replica: str, since_s: float) -> None:
        """Called all the time by the engine of a replica that waits for workers."""
        if since_s < MOVE_AFTER_S:
            return
        self._dispatch.in_trouble(replica)
        self._look_after()
        full = {name for name, engine in self._engines.items() if engine.is_recovering}
        for place in self._dispatch.at(replica):
            if place.job is not None and place.num_moves < _MOST_MOVES:
                self._move(place, place.job, full)

    def _move(self, place: Place, job: Job, full: set[str]) -> None:
        """To whoever takes it, or it stays; who takes nobody is added to `full`."""
        source, too_small = self._engines[place.replica], set[str]()
        while (ticket := self._dispatch.move(place, full | too_small)) is not None:
            target = self._engines[ticket.replica]
            try:
                if source.hand_over(job, target, partial(self._dispatch.moved, place, ticket)):
                    return
            except (QueueFull, EngineStopped):
                full.add(ticket.replica)
            except CallerError:
                too_small.add(ticket.replica)
            else:  # it has ended meanwhile
                self._dispatch.not_moved(ticket)
                return
            self._dispatch.not_moved(ticket)


_CALM = ("working", "idle")


def _left_out(state: Health) -> Health:
    reason = "gets no new requests" if state.reason in _CALM else state.reason
    return replace(state, ready=False, reason=reason)


_NOTHING_CACHED: list[int] = []
"""The prompt that the router sees of an embedding: it reads nothing from the KV cache."""
