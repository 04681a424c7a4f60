"""The head's HTTPS door for machines that want to join: `GET /ca` and `POST /join`, no more."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response

from shoal.errors import ConfigError, PeerRefused
from shoal.fleet.registrar import JoinRequest, Registrar
from shoal.fleet.state import StateFolder, bracketed
from shoal.parallel.identity import NODE_FILE, NODE_KEY_FILE

MAX_BODY_BYTES = 32 * 1024
BODY_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 64


class RefusalLimit:
    """How often a client may be refused within a window before it is not listened to."""

    def __init__(self, *, most: int = 10, window_s: float = 60.0, max_clients: int = 1000) -> None:
        self._most = most
        self._window_s = window_s
        self._max_clients = max_clients
        self._refusals: OrderedDict[str, deque[float]] = OrderedDict()

    def is_blocked(self, client: str, now_s: float) -> bool:
        times = self._refusals.get(client, deque())
        while times and times[0] <= now_s - self._window_s:
            times.popleft()
        return len(times) >= self._most

    def count(self, client: str, now_s: float) -> None:
        self._refusals.setdefault(client, deque(maxlen=self._most)).append(now_s)
        self._refusals.move_to_end(client)
        if len(self._refusals) > self._max_clients:
            self._refusals.popitem(last=False)


class Answer(Exception):
    """Ends a request early."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.response = _error(status, message, code)


def make_app(registrar: Registrar, report: Callable[[str], None], limit: RefusalLimit) -> FastAPI:
    """`report` is told who joined and who was refused."""
    app = FastAPI(openapi_url=None)

    @app.get("/ca")
    async def authority() -> Response:
        return Response(registrar.authority_pem(), media_type="application/x-pem-file")

    @app.post("/join")
    async def join(request: Request) -> Response:
        client = request.client.host if request.client else "unknown"
        if limit.is_blocked(client, time.monotonic()):
            return _error(429, "refused too often: wait a minute", "rate_limited")
        try:
            wanted = await _read_request(request)
            answer = await asyncio.to_thread(registrar.admit, wanted, time.time())
        except Answer as early:
            limit.count(client, time.monotonic())
            report(f"refused {client}: {early}")
            return early.response
        except (PeerRefused, ConfigError) as error:
            limit.count(client, time.monotonic())
            report(f"refused {client}, which calls itself {wanted.node!r}: {error.message}")
            return _error(403, error.message, error.code)
        report(f"{wanted.node} ({client}) has its certificate")
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return app


async def _read_request(request: Request) -> JoinRequest:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise Answer(413, f"more than {MAX_BODY_BYTES} bytes are no request to join")
        return msgspec.json.decode(body, type=JoinRequest)
    except TimeoutError:
        raise Answer(408, f"no whole request within {BODY_TIMEOUT_S:g} s") from None
    except msgspec.MsgspecError as error:
        raise Answer(400, f"this is no request to join: {error}") from error


def _error(status: int, message: str, code: str | None) -> Response:
    body = msgspec.json.encode({"error": {"message": message, "code": code}})
    return Response(body, status_code=status, media_type="application/json")


class EnrolmentDoor:
    """Runs the app in a thread of its own until closed."""

    def __init__(
        self,
        folder: StateFolder,
        registrar: Registrar,
        *,
        host: str,
        port: int,
        report: Callable[[str], None],
        limit: RefusalLimit | None = None,
    ) -> None:
        """Port 0 takes a free one. Raises ConfigError if the port is taken."""
        self._socket = _bind(host, port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            make_app(registrar, report, limit or RefusalLimit()),
            ssl_certfile=folder.identity / NODE_FILE,
            ssl_keyfile=folder.identity / NODE_KEY_FILE,
            log_config=None,
            access_log=False,
            lifespan="off",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=2,
        )
        config.load()
        assert config.ssl is not None
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="enrolment", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{host} is no address: {error}", param="address") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {bracketed(host, port)}: {error.strerror}; choose an address of "
            "this machine with --address, or another --port",
            param="port",
        ) from error
    return listener
