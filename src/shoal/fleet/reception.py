"""Where workers and operators call the head: pairs their connections and passes them on."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping

import msgspec

from shoal.errors import PeerLost, PeerRefused
from shoal.fleet.worker_line import WorkerLine
from shoal.parallel.channel import Channel
from shoal.parallel.control import Hello
from shoal.parallel.listener import Listener

log = logging.getLogger(__name__)

_HELLO_S = 2.0

Service = Callable[[Channel, Channel], None]
"""Serves one caller over (down, up) until it leaves; runs in a thread of its own."""


class Reception:
    """Accepts in a thread until closed. `services` answer callers who are not workers."""

    def __init__(self, listener: Listener, services: Mapping[str, Service]) -> None:
        self._listener = listener
        self._services = dict(services)
        self._halves: dict[tuple[str, str], tuple[Hello, Channel]] = {}
        self._workers: dict[str, tuple[Hello, Channel, Channel]] = {}
        self._ended: dict[str, str] = {}
        self._serving: set[Channel] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="shoal-reception", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return self._listener.address

    def wait_for(self, worker: str, *, deadline_s: float) -> WorkerLine:
        """The line of a worker that was started. Raises PeerLost if it ends or is too late.

        `deadline_s` is a time of `time.monotonic`.
        """
        with self._changed:
            while worker not in self._workers:
                if worker in self._ended:
                    raise PeerLost(f"worker {worker} ended before it called: {self._ended[worker]}")
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or self._closed:
                    raise PeerLost(f"worker {worker} was started but did not call in time")
                self._changed.wait(left_s)
            hello, down, up = self._workers.pop(worker)
        return WorkerLine(hello, down, up)

    def offer(self, name: str, service: Service) -> None:
        """Answer callers of one more service from now on."""
        with self._changed:
            self._services[name] = service

    def note_end(self, worker: str, reason: str) -> None:
        """A worker's process is over: do not wait for it."""
        with self._changed:
            self._ended[worker] = reason
            called = self._workers.pop(worker, ())
            half = self._halves.pop(("worker", worker), ())
            for channel in (*called[1:], *half[1:]):
                channel.close()
            self._changed.notify_all()

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        self._thread.join()
        with self._changed:
            workers = [channel for _, down, up in self._workers.values() for channel in (down, up)]
            halves = [channel for _, channel in self._halves.values()]
            for channel in [*workers, *halves, *self._serving]:
                channel.close()
            self._changed.notify_all()

    def _accept(self) -> None:
        while not self._closed:
            # The listener has logged whom it refused; a closed one ends the loop.
            with contextlib.suppress(PeerLost, PeerRefused):
                self._welcome(self._listener.accept())

    def _welcome(self, channel: Channel) -> None:
        try:
            header, _ = channel.receive(_HELLO_S)
            hello = msgspec.msgpack.decode(header, type=Hello)
        except (PeerLost, PeerRefused, msgspec.MsgspecError) as error:
            log.warning("a connection from %s is dropped: %s", channel.peer, error)
            channel.close()
            return
        key = (hello.service, hello.caller)
        with self._changed:
            half = self._halves.pop(key, None)
            if half is None or half[0].direction == hello.direction:
                self._halves[key] = (hello, channel)
                if half is not None:
                    half[1].close()
                return
        down, up = (half[1], channel) if hello.direction == "up" else (channel, half[1])
        self._pass_on(hello, down, up)

    def _pass_on(self, hello: Hello, down: Channel, up: Channel) -> None:
        if hello.service == "worker":
            with self._changed:
                self._workers[hello.caller] = (hello, down, up)
                self._changed.notify_all()
            return
        service = self._services.get(hello.service)
        if service is None:
            log.warning("%s asks for '%s', which is not served here", down.peer, hello.service)
            down.close()
            up.close()
            return
        threading.Thread(
            target=self._serve,
            args=(service, down, up),
            name=f"shoal-{hello.service}-{hello.caller}",
            daemon=True,
        ).start()

    def _serve(self, service: Service, down: Channel, up: Channel) -> None:
        with self._changed:
            self._serving |= {down, up}
            if self._closed:
                down.close()
                up.close()
        try:
            service(down, up)
        except PeerLost as error:
            log.info("a caller left: %s", error)
        except Exception:
            log.exception("serving %s failed", down.peer)
        finally:
            with self._changed:
                self._serving -= {down, up}
            down.close()
            up.close()
