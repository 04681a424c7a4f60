"""Running the app with uvicorn until a signal, and ending without cutting off open streams."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from shoal.engine.api import AsyncEngine
from shoal.errors import ConfigError
from shoal.journal.api import Journal
from shoal.server.app import create_app
from shoal.server.responses import Responses

GRACE_S = 30
FLUSH_S = 3
"""For clients to hear that what they wait for goes on later."""
KEEP_ALIVE_S = 75
BACKLOG = 2048
MAX_PORT = 65535

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """uvicorn's server, which returns after a signal instead of raising it again.

    So the caller can stop the engine. After a signal open requests have `grace_s`; a second one
    does not wait for them. What is open then is left to the next server, if there is a journal.
    """

    def __init__(self, config: uvicorn.Config, responses: Responses, grace_s: int) -> None:
        super().__init__(config)
        self._responses = responses
        self._grace_s = grace_s
        self._restoring: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._restoring = asyncio.create_task(self._responses.restore())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._restoring is not None:
            self._restoring.cancel()
        if self._responses.journal.is_kept:
            loop = asyncio.get_running_loop()
            loop.call_later(self._grace_s, self._responses.suspend)
        await super().shutdown(sockets)
        # Before the end of their tasks, which would look like clients that leave.
        self._responses.suspend()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handled = []
        for number in _SIGNALS:
            # Only the main thread can; a server in another is stopped through `should_exit`.
            with contextlib.suppress(ValueError, RuntimeError):
                loop.add_signal_handler(number, self._stop)
                handled.append(number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


async def serve(
    engine: AsyncEngine,
    host: str,
    port: int,
    *,
    listener: socket.socket | None = None,
    on_ready: Callable[[str], None] | None = None,
    grace_s: int = GRACE_S,
    journal: Journal | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let open requests finish for up to `grace_s` seconds.

    Port 0 takes a free one; `on_ready` hears the URL. `listener`, from `bind`, is used instead of
    a new one, for who wants to know before loading a model. With a `journal`, what its last server
    left open goes on, and what is open here at the end is left in it.

    Raises ConfigError when the address cannot be had.
    """
    listener = listener or bind(host, port)
    server = make_server(create_app(engine, journal=journal), grace_s=grace_s)
    if on_ready is not None:
        on_ready(url_of(listener))
    await server.serve(sockets=[listener])


def make_server(app: FastAPI, *, grace_s: int = GRACE_S) -> Server:
    responses = app.state.service.responses
    flush_s = FLUSH_S if responses.journal.is_kept else 0
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        backlog=BACKLOG,
        # Longer than clients keep idle connections, so that it is they who close them.
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=grace_s + flush_s,
    )
    return Server(config, responses, grace_s)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError saying what to do."""
    if not 0 <= port <= MAX_PORT:
        # The resolver would take the port modulo 65536.
        raise ConfigError(f"port {port} is not in [0, {MAX_PORT}]; choose another with --port")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"'{host}' port {port} is no address of this machine: {error}") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port} ({error}); stop what uses that port, or choose "
            "another with --port"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine finds it."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
