"""The head's two connections with one worker: commands go out, reports come in."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from shoal.errors import PeerLost, ShoalError
from shoal.fleet.inbox import Inbox, Lost
from shoal.parallel.channel import Channel
from shoal.parallel.control import Alive, Fetching, FromWorker, Hello, Stop, ToWorker, Usage
from shoal.weights.cache import Progress, silent

log = logging.getLogger(__name__)

# A worker takes commands at once, whatever it computes, unless its process is frozen.
_SEND_S = 10.0


def _unwatched() -> None:
    pass


class WorkerLine:
    """`worker` is its name in its seat, `process` the one it was started under.

    What it reports goes to the inbox of `report_to`, but for its usage, which is kept here, its
    signs of life, and how far it has come with fetching its weights, which `report` hears.
    `on_lost` is called once, from any thread.
    """

    def __init__(self, hello: Hello, commands: Channel, reports: Channel) -> None:
        self.worker = self.process = hello.caller
        self.address = hello.address
        self.pid = hello.pid
        self.shards = hello.shards
        self.epoch = hello.epoch
        self.peers = {commands.peer, reports.peer}
        self.report: Progress = silent
        self.on_lost: Callable[[], None] = _unwatched
        self.heard_s = time.monotonic()
        self.is_lost = False
        self.usage: Usage | None = None
        self._loss: Lost | None = None
        self._inbox = Inbox()
        self._lock = threading.Lock()
        self._commands = commands
        self._reports = reports
        self._thread = threading.Thread(
            target=self._read, name=f"shoal-reports-{self.worker}", daemon=True
        )
        self._thread.start()

    def report_to(self, inbox: Inbox, on_lost: Callable[[], None] = _unwatched) -> None:
        """A loss that has come to light already is told again."""
        with self._lock:
            self._inbox, self.on_lost = inbox, on_lost
            if self._loss is not None:
                inbox.put(self.worker, self._loss)

    def send(self, message: ToWorker) -> None:
        """Raises PeerLost."""
        self.send_encoded(msgspec.msgpack.encode(message))

    def send_encoded(self, message: bytes) -> None:
        """For what goes to several workers and is encoded once. Raises PeerLost."""
        try:
            self._commands.send(message, timeout_s=_SEND_S)
        except PeerLost as error:
            self.lose(Lost(error.message))
            raise

    def lose(self, loss: Lost) -> None:
        """It is not to be used any more; only the first reason counts."""
        with self._lock:
            if self.is_lost:
                return
            self.is_lost = True
            self._loss = loss
            self._inbox.put(self.worker, loss)
            on_lost = self.on_lost
        # Whoever is still sending to it would wait until its buffers are read, or for _SEND_S.
        self._commands.close()
        on_lost()

    def dismiss(self) -> None:
        """Let the worker end, and hang up."""
        if not self.is_lost:
            with suppress(PeerLost):
                self.send(Stop())
        self._commands.close()
        self._reports.close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromWorker)
        try:
            while True:
                header, _ = self._reports.receive()
                self.heard_s = time.monotonic()
                message: FromWorker = decoder.decode(header)
                if isinstance(message, Alive):
                    continue
                if isinstance(message, Usage):
                    self.usage = message
                elif isinstance(message, Fetching):
                    self.report(message.what, message.done_bytes, message.total_bytes)
                else:
                    self._inbox.put(self.worker, message)
        except Exception as error:
            if not isinstance(error, ShoalError | msgspec.MsgspecError):
                log.exception("what worker %s reports cannot be taken", self.worker)
            self.lose(Lost(str(error)))
