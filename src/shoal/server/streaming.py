"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.errors import ShoalError
from shoal.server.errors import error_body, unexpected
from shoal.server.request_id import request_id_of
from shoal.server.response_log import Follower

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"

_logger = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()


def event(data: Any, place: bytes = b"") -> bytes:
    """One server-sent event. JSON has no raw line breaks, so it always fits one line."""
    return place + b"data: " + _encoder.encode(data) + b"\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """`work`'s result; it is cancelled when the client leaves. Raises ClientDisconnect then."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.wait((working, watching))
    return working.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that sends `events` as they come, then `[DONE]`.

    An error after the first byte can no longer be a status: it becomes an event. However it
    ends, `follower` is closed.
    """

    media_type = "text/event-stream"

    def __init__(
        self, follower: Follower, events: AsyncGenerator[bytes, None], headers: dict[str, str]
    ) -> None:
        # A proxy that buffers would hold the tokens back (nginx reads the second header).
        no_waiting = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=no_waiting | headers)
        del self.headers["content-length"]
        self._follower = follower
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(scope, send))
        except (ClientDisconnect, OSError):
            _logger.info("%s: the client left", request_id_of(scope))
        finally:
            self._follower.close()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            try:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except OSError:
                raise
            except ShoalError as error:
                await self._send_error(error, send)
            except Exception:
                request_id = request_id_of(scope)
                _logger.exception("%s: unexpected error in a stream", request_id)
                await self._send_error(unexpected(request_id), send)
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _send_error(self, error: ShoalError, send: Send) -> None:
        body = event(error_body(error))
        await send({"type": "http.response.body", "body": body, "more_body": True})
