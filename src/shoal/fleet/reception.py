"""Where workers and operators call the head: pairs their connections and passes them on."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping

import msgspec

from shoal.config import DEAD_AFTER_S
from shoal.errors import PeerLost, PeerRefused
from shoal.fleet.inbox import Called, Inbox, Lost
from shoal.fleet.watch import Watch
from shoal.fleet.worker_line import WorkerLine
from shoal.parallel.channel import Channel
from shoal.parallel.control import Hello
from shoal.parallel.listener import Listener

log = logging.getLogger(__name__)

_HELLO_S = 2.0

Service = Callable[[Channel, Channel], None]
"""Serves one caller over (down, up) until it leaves; runs in a thread of its own."""


class Reception:
    """Accepts in a thread until closed. `services` answer callers who are not workers.

    Workers are expected by name. Until `turn_away_strays`, those who lost their head and call the
    next one wait to be taken in; afterwards they are told to end, as all are whom nobody expects.
    """

    def __init__(
        self,
        listener: Listener,
        services: Mapping[str, Service],
        *,
        dead_after_s: float = DEAD_AFTER_S,
    ) -> None:
        """A worker of which nothing is heard for `dead_after_s` is lost."""
        self._listener = listener
        self._services = dict(services)
        self._watch = Watch(dead_after_s)
        self._halves: dict[tuple[str, str], tuple[Hello, Channel]] = {}
        self._expected: dict[str, Inbox] = {}
        self._lines: dict[str, WorkerLine] = {}
        """Of workers that have called and are not taken yet."""
        self._strays: dict[str, WorkerLine] = {}
        self._takes_strays = True
        self._serving: set[Channel] = set()
        self._changed = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="shoal-reception", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return self._listener.address

    def expect(self, worker: str, inbox: Inbox) -> None:
        """A worker is about to be started: `inbox` hears Called, or Lost if it ends before."""
        with self._changed:
            self._expected[worker] = inbox

    def take(self, worker: str) -> WorkerLine:
        """The line of a worker that has called."""
        with self._changed:
            return self._lines.pop(worker)

    def forget(self, worker: str) -> None:
        """Nobody waits for its call any more."""
        with self._changed:
            self._expected.pop(worker, None)
            line = self._lines.pop(worker, None)
        if line is not None:
            line.dismiss()

    def wait_for(self, worker: str, inbox: Inbox, *, deadline_s: float) -> WorkerLine:
        """The line of a worker that `inbox` hears of alone. Raises PeerLost if it ends or is late.

        `deadline_s` is a time of `time.monotonic`.
        """
        taken = inbox.take(deadline_s - time.monotonic())
        if taken is None:
            self.forget(worker)
            raise PeerLost(f"worker {worker} was started but did not call in time")
        if isinstance(taken[1], Lost):
            raise PeerLost(f"worker {worker} ended before it called: {taken[1].reason}")
        return self.take(worker)

    def strays(self) -> list[WorkerLine]:
        """Workers of an earlier head that have called by now; each is given out once."""
        with self._changed:
            found, self._strays = list(self._strays.values()), {}
            return found

    def turn_away_strays(self) -> None:
        with self._changed:
            self._takes_strays = False
        for line in self.strays():
            line.dismiss()

    def offer(self, name: str, service: Service) -> None:
        """Answer callers of one more service from now on."""
        with self._changed:
            self._services[name] = service

    def note_end(self, worker: str, reason: str) -> None:
        """A worker's process is over: do not wait for it."""
        with self._changed:
            half = self._halves.pop(("worker", worker), None)
            inbox = self._expected.pop(worker, None)
        if half is not None:
            half[1].close()
        if inbox is not None:
            inbox.put(worker, Lost(reason))

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        self._thread.join()
        with self._changed:
            halves = [channel for _, channel in self._halves.values()]
            for channel in [*halves, *self._serving]:
                channel.close()
            lines = [*self._lines.values(), *self._strays.values()]
        for line in lines:
            line.dismiss()
        self._watch.close()

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
            self._take_in(hello, down, up)
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

    def _take_in(self, hello: Hello, down: Channel, up: Channel) -> None:
        line = WorkerLine(hello, down, up)
        unwanted: WorkerLine | None = None
        with self._changed:
            inbox = self._expected.pop(hello.caller, None)
            if inbox is not None:
                self._lines[hello.caller] = line
            elif hello.shards and self._takes_strays:
                unwanted = self._strays.pop(hello.caller, None)  # from before it called again
                self._strays[hello.caller] = line
            else:
                log.info("worker %s called, which nobody expects: it is told to end", hello.caller)
                unwanted = line
        if unwanted is not None:
            unwanted.dismiss()
        if unwanted is not line:
            self._watch.add(line)
        if inbox is not None:
            inbox.put(hello.caller, Called())

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
