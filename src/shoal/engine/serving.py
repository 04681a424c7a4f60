"""An engine with its own thread, open to asyncio and to plain threads at once."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Sequence

from shoal.engine.api import EngineStats, Health, ModelInfo
from shoal.engine.engine import Engine
from shoal.engine.job import Deliver, Job
from shoal.engine.streams import AsyncStream, OnEnd, Postman, SyncStream, telling, unwatched
from shoal.request import SamplingParams
from shoal.weights.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class ServingEngine:
    """Steps the engine whenever there is work. Close it when done."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._postmen: dict[asyncio.AbstractEventLoop, Postman] = {}
        self._thread = threading.Thread(target=self._run, name="shoal-engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    def submit(
        self,
        prompt_tokens: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        emitted: Sequence[list[int] | None] = (),
        on_end: OnEnd = unwatched,
    ) -> AsyncStream:
        """For the running event loop. Raises as `AsyncEngine.submit` says."""
        stream = AsyncStream(self._engine)
        deliver = telling(self._by_post(stream), on_end)
        stream.job = self._engine.submit(
            prompt_tokens,
            params,
            deliver,
            seed=_seed(params),
            priority=priority,
            emitted=emitted,
        )
        return stream

    def submit_embed(
        self, prompt_tokens: list[int], *, priority: int = 0, on_end: OnEnd = unwatched
    ) -> AsyncStream:
        stream = AsyncStream(self._engine)
        deliver = telling(self._by_post(stream), on_end)
        stream.job = self._engine.submit_pooling(prompt_tokens, deliver, priority=priority)
        return stream

    async def embed(self, prompt_tokens: list[int], *, priority: int = 0) -> list[float]:
        return await self.submit_embed(prompt_tokens, priority=priority).embedding()

    def submit_sync(
        self, prompt_tokens: list[int], params: SamplingParams, *, on_end: OnEnd = unwatched
    ) -> SyncStream:
        """For a plain thread. Raises as `AsyncEngine.submit` says."""
        stream = SyncStream(self._engine)
        deliver = telling(stream.box.put, on_end)
        stream.job = self._engine.submit(prompt_tokens, params, deliver, seed=_seed(params))
        return stream

    def submit_embed_sync(
        self, prompt_tokens: list[int], *, on_end: OnEnd = unwatched
    ) -> SyncStream:
        stream = SyncStream(self._engine)
        deliver = telling(stream.box.put, on_end)
        stream.job = self._engine.submit_pooling(prompt_tokens, deliver)
        return stream

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def health(self) -> Health:
        return self._engine.health()

    @property
    def is_recovering(self) -> bool:
        """Whether workers that were lost are awaited."""
        return self._engine.is_recovering

    def watch_recovery(self, in_trouble: Callable[[float], None]) -> None:
        """See `Engine.watch_recovery`."""
        self._engine.watch_recovery(in_trouble)

    def hand_over(self, job: Job, to: ServingEngine, moved: Callable[[], None]) -> bool:
        """See `Engine.hand_over`."""
        return self._engine.hand_over(job, to._engine, moved)

    def close(self) -> None:
        """End what is open with EngineStopped and wait for the step that computes."""
        self._engine.stop("the engine is shutting down")
        self._thread.join()
        self._engine.close()

    def _run(self) -> None:
        try:
            while self._engine.wait_for_work():
                self._engine.step()
        except BaseException:
            log.exception("the engine's thread died")
            self._engine.stop("the engine has failed; its log says why")
            raise

    def _by_post(self, stream: AsyncStream) -> Deliver:
        postman = self._postman()
        return lambda item: postman.post(stream.box, item)

    def _postman(self) -> Postman:
        loop = asyncio.get_running_loop()
        postman = self._postmen.get(loop)
        if postman is None:
            postman = Postman(loop)
            # Replaced, not changed: loops of other threads may be reading. At worst one of them
            # is forgotten and makes itself a second postman, which does no harm.
            still_open = {k: p for k, p in self._postmen.items() if not k.is_closed()}
            self._postmen = {**still_open, loop: postman}
        return postman


def _seed(params: SamplingParams) -> int:
    return secrets.randbits(63) if params.seed is None else params.seed
