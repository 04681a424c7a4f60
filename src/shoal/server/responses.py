"""All responses under way: computed by producers, kept in the journal, found again by clients.

A journal comes first: what clients see of a response, it has already.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec

from shoal.engine.api import AsyncEngine
from shoal.errors import EngineStopped, InternalError, InvalidRequest, RetryError, ShoalError
from shoal.journal.api import Accepted, Entry, Journal, Kept
from shoal.request import SamplingParams
from shoal.server.errors import UnknownResponse, unexpected
from shoal.server.gathered import Gathered
from shoal.server.generation import Generation
from shoal.server.metrics import Metrics
from shoal.server.response_log import ResponseLog

log = logging.getLogger(__name__)


class Responses:
    """Belongs to one event loop, which must run before the first call."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics, journal: Journal) -> None:
        self._engine = engine
        self._metrics = metrics
        self._journal = journal
        self._open: dict[str, ResponseLog] = {}
        self._keys: dict[str, ResponseLog] = {}
        self._producers: dict[str, asyncio.Task[None]] = {}

    @property
    def journal(self) -> Journal:
        return self._journal

    async def begin(
        self,
        *,
        response_id: str,
        endpoint: str,
        created_s: int,
        body: dict[str, Any],
        prompts: list[list[int]],
        params: SamplingParams,
        priority: int,
        key: str | None,
    ) -> ResponseLog:
        """A new response, or with a `key` that is in use the one that it names.

        Raises what `AsyncEngine.submit` raises.
        """
        accepted = Accepted(
            response_id=response_id,
            endpoint=endpoint,
            model=self._journal.model,
            created_s=created_s,
            body=body,
            prompts=prompts,
            params=[_with_seed(params) for _ in prompts],
            priority=priority,
            key=key,
        )
        if key is not None and key in self._keys:
            return self._repeated(self._keys[key], accepted)
        generation = Generation(self._engine, self._metrics, accepted)
        accepted = _with_limits(accepted, self._engine.info.max_context)
        response = ResponseLog(accepted, self._abandon)
        noted = asyncio.Event()

        def note(is_kept: bool) -> None:
            response.is_kept = is_kept
            noted.set()

        self._journal.accept(accepted, note)
        self._produce(response, generation)
        await noted.wait()
        return response

    async def find(self, response_id: str, endpoint: str) -> ResponseLog:
        """One that is under way, or that the journal has; an interrupted one goes on.

        Raises UnknownResponse, InvalidRequest for one of another endpoint, and for one that is to
        go on what `AsyncEngine.submit` raises.
        """
        response = self._open.get(response_id)
        if response is None:
            kept = await self._journal.find(response_id)
            if kept is None or kept.accepted.response_id != response_id:
                raise UnknownResponse(_unknown(response_id, self._journal))
            response = self._revive(kept, endpoint)
        _check_endpoint(response.accepted, endpoint)
        return response

    async def find_by_key(
        self, key: str, endpoint: str, body: dict[str, Any]
    ) -> ResponseLog | None:
        """What an earlier request with this key began. Raises InvalidRequest if that was another
        request, and what `find` raises."""
        response = self._keys.get(key)
        if response is None:
            kept = await self._journal.find(key)
            if kept is None or kept.accepted.key != key:
                return None
            _check_same(kept.accepted, endpoint, body)
            response = self._revive(kept, endpoint)
        _check_same(response.accepted, endpoint, body)
        return response

    async def restore(self) -> None:
        """Go on with what an earlier server has left unfinished."""
        response_ids = await self._journal.open_ids()
        if response_ids:
            log.warning("open responses of the last server go on: %d", len(response_ids))
        for response_id in response_ids:
            while response_id not in self._open:
                kept = await self._journal.find(response_id)
                if kept is None or kept.state != "open":
                    break
                try:
                    self._revive(kept, kept.accepted.endpoint)
                    break
                except RetryError as error:
                    log.info("%s waits: %s", response_id, error)
                    await asyncio.sleep(error.retry_after_s)
                except ShoalError as error:
                    log.warning("%s cannot go on: %s", response_id, error)
                    self._journal.mark(response_id, "failed", _no_matter, error=str(error))

    def suspend(self) -> None:
        """End what is open here and leave it open in the journal, for the next server."""
        for response_id, response in list(self._open.items()):
            where = f"{response.accepted.endpoint}/{response_id}"
            message = "the server is going down; send the request again"
            if response.is_kept:
                message = (
                    "the server is restarting, and goes on with this response when it is back: "
                    f"come back with the header Last-Event-ID, or ask for {where}"
                )
            self._forget(response)
            response.end(EngineStopped(message, code="server_restarting"))

    # ---- producing -------------------------------------------------------------------------

    def _revive(self, kept: Kept, endpoint: str) -> ResponseLog:
        accepted = kept.accepted
        if accepted.response_id in self._open:  # somebody else was quicker
            return self._open[accepted.response_id]
        _check_endpoint(accepted, endpoint)
        response = ResponseLog(accepted, self._abandon, kept.entries)
        response.is_kept = True
        emitted = Gathered(accepted, kept.entries).emitted()
        if kept.state == "failed":
            response.end(InternalError(kept.error or "it failed"))
        elif all(tokens is None for tokens in emitted):
            response.end(None)
        elif accepted.model != self._journal.model:
            raise InternalError(
                f"{accepted.response_id} was begun by '{accepted.model}' and cannot be ended by "
                f"'{self._journal.model}', which is served now: send the request again"
            )
        else:
            generation = Generation(self._engine, self._metrics, accepted, emitted)
            self._journal.mark(accepted.response_id, "open", _no_matter)
            self._produce(response, generation)
        return response

    def _produce(self, response: ResponseLog, generation: Generation) -> None:
        accepted = response.accepted
        self._open[accepted.response_id] = response
        if accepted.key is not None:
            self._keys[accepted.key] = response
        producer = asyncio.create_task(self._write(response, generation))
        self._producers[accepted.response_id] = producer

    async def _write(self, response: ResponseLog, generation: Generation) -> None:
        response_id = response.accepted.response_id
        num_written = len(response.entries)
        error: Exception | None = None
        try:
            async with aclosing(generation.deltas()) as deltas:
                async for entry in deltas:
                    self._journal.append(
                        response_id, num_written, [entry], partial(_add, response, entry)
                    )
                    num_written += 1
        except Exception as problem:
            error = problem
        finally:
            generation.close()
        self._finish(response, error)

    def _finish(self, response: ResponseLog, error: Exception | None) -> None:
        """Nobody hears of the end before the journal has it."""
        response_id = response.accepted.response_id
        del self._producers[response_id]
        if error is not None and not isinstance(error, ShoalError):
            log.error("%s: unexpected error", response_id, exc_info=error)
            error = unexpected(response_id)

        def then(_: bool) -> None:
            self._forget(response)
            response.end(error)

        if error is None:
            self._journal.mark(response_id, "finished", then)
        elif isinstance(error, RetryError):
            self._journal.mark(response_id, "interrupted", then)
        else:
            self._journal.mark(response_id, "failed", then, error=error.message)

    def _abandon(self, response: ResponseLog) -> None:
        """Its last client has left: it goes on when one comes back."""
        response_id = response.accepted.response_id
        if response_id in self._producers:
            self._forget(response)
            self._journal.mark(response_id, "interrupted", _no_matter)

    def _forget(self, response: ResponseLog) -> None:
        accepted = response.accepted
        self._open.pop(accepted.response_id, None)
        if accepted.key is not None:
            self._keys.pop(accepted.key, None)
        producer = self._producers.pop(accepted.response_id, None)
        if producer is not None:
            producer.cancel()

    def _repeated(self, response: ResponseLog, accepted: Accepted) -> ResponseLog:
        _check_same(response.accepted, accepted.endpoint, accepted.body)
        return response


def _add(response: ResponseLog, entry: Entry, is_kept: bool) -> None:
    response.add(entry, is_kept=is_kept)


def _no_matter(is_kept: bool) -> None:
    del is_kept


def _with_seed(params: SamplingParams) -> SamplingParams:
    """Drawn here, so that the journal knows it: the same prompt twice has two."""
    if params.seed is not None:
        return params
    return msgspec.structs.replace(params, seed=secrets.randbits(63))


def _with_limits(accepted: Accepted, max_context: int) -> Accepted:
    """The room that there is now: the next server may have another."""
    params = [
        msgspec.structs.replace(one, max_tokens=one.max_tokens or max_context - len(prompt))
        for one, prompt in zip(accepted.params, accepted.prompts, strict=True)
    ]
    return msgspec.structs.replace(accepted, params=params)


def _check_endpoint(accepted: Accepted, endpoint: str) -> None:
    if accepted.endpoint != endpoint:
        raise InvalidRequest(
            f"{accepted.response_id} is a response of {accepted.endpoint}, not of {endpoint}",
            code="wrong_endpoint",
        )


def _check_same(accepted: Accepted, endpoint: str, body: dict[str, Any]) -> None:
    if accepted.endpoint != endpoint or accepted.body != body:
        raise InvalidRequest(
            f"the Idempotency-Key {accepted.key} was sent with another request before: every "
            "request needs a key of its own",
            code="idempotency_key_reused",
        )


def _unknown(response_id: str, journal: Journal) -> str:
    why = "it may have expired, or not have been kept whole"
    if not journal.is_kept:
        why = "this server keeps no journal, so a response is gone with its client"
    return f"there is no response '{response_id:.100}': {why}; send the request again"
