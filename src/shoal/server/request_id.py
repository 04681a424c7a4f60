"""The outermost layer: every response carries a request id, and no exception gets past it."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.server.errors import error_response, unexpected

HEADER = b"x-request-id"

# What a client sends is echoed and logged, so it must not be able to forge a header or a line.
_ACCEPTABLE = re.compile(rb"[\x21-\x7e]{1,128}")
_SCOPE_KEY = "shoal.request_id"

_logger = logging.getLogger(__name__)

CountResponse = Callable[[Scope, int], None]


def request_id_of(scope: Scope) -> str:
    return str(scope[_SCOPE_KEY])


class RequestIdMiddleware:
    """Counts responses through `count_response(scope, status)` as they begin."""

    def __init__(self, app: ASGIApp, count_response: CountResponse) -> None:
        self._app = app
        self._count_response = count_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _client_id(scope) or f"req-{uuid.uuid4().hex}"
        scope[_SCOPE_KEY] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (HEADER, request_id.encode())]
                self._count_response(scope, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            _logger.info("%s: the client left", request_id)
            if not started:
                self._count_response(scope, CLIENT_LEFT)
        except Exception:
            _logger.exception("%s: unexpected error", request_id)
            if started:
                raise
            await error_response(unexpected(request_id))(scope, receive, send_with_id)


# nginx's number for a client that did not wait; nobody is there to receive it.
CLIENT_LEFT = 499


def _client_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == HEADER and _ACCEPTABLE.fullmatch(value):
            return str(value, "ascii")
    return None
