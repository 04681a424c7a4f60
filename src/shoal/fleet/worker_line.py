"""The head's two connections with one worker: commands go out, reports come in."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

import msgspec

from shoal.errors import PeerLost, ShoalError
from shoal.fleet.inbox import Inbox, Lost
from shoal.parallel.channel import Channel
from shoal.parallel.control import Fetching, FromWorker, Hello, Stop, ToWorker, Usage
from shoal.weights.cache import Progress, silent

log = logging.getLogger(__name__)

# A worker takes commands at once, whatever it computes, unless its process is frozen.
_SEND_S = 10.0


class WorkerLine:
    """`inbox` receives all that the worker reports but its usage, which is kept here, and how far
    it has come with fetching its weights, which `report` hears.

    Who sets `inbox` looks at `is_lost` afterwards: the report of the loss may have gone before.
    """

    def __init__(self, hello: Hello, commands: Channel, reports: Channel) -> None:
        self.worker = hello.caller
        self.address = hello.address
        self.peers = {commands.peer, reports.peer}
        self.inbox = Inbox()
        self.report: Progress = silent
        self.is_lost = False
        self.usage: Usage | None = None
        self._commands = commands
        self._reports = reports
        self._thread = threading.Thread(
            target=self._read, name=f"shoal-reports-{self.worker}", daemon=True
        )
        self._thread.start()

    def send(self, message: ToWorker) -> None:
        """Raises PeerLost."""
        self.send_encoded(msgspec.msgpack.encode(message))

    def send_encoded(self, message: bytes) -> None:
        """For what goes to several workers and is encoded once. Raises PeerLost."""
        try:
            self._commands.send(message, timeout_s=_SEND_S)
        except PeerLost:
            self.is_lost = True
            raise

    def dismiss(self) -> None:
        """Let the worker end, and hang up."""
        with suppress(PeerLost):
            self.send(Stop())
        self._commands.close()
        self._reports.close()
        self._thread.join()

    def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromWorker)
        try:
            while True:
                header, _ = self._reports.receive()
                message: FromWorker = decoder.decode(header)
                if isinstance(message, Usage):
                    self.usage = message
                elif isinstance(message, Fetching):
                    self.report(message.what, message.done_bytes, message.total_bytes)
                else:
                    self.inbox.put(self.worker, message)
        except Exception as error:
            if not isinstance(error, ShoalError | msgspec.MsgspecError):
                log.exception("what worker %s reports cannot be taken", self.worker)
            self.is_lost = True
            self.inbox.put(self.worker, Lost(str(error)))
