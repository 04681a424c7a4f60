"""Accepting connections. Each peer shakes hands on a thread of its own, so that one that is slow,
silent or foreign holds up nobody.
"""

from __future__ import annotations

import logging
import queue
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path

from shoal.errors import PeerLost, ShoalError
from shoal.parallel.address import HostAddress, UnixAddress, parse_address
from shoal.parallel.channel import Channel, hang_up, tune
from shoal.parallel.handshake import shake_hands, wrap

log = logging.getLogger(__name__)

# Whoever connects without end only drives out others that have not shown a certificate either.
_MAX_PENDING = 64
_PAUSE_S = 0.1


class Listener:
    """`address` holds the real port. Peers that are refused are logged, and never seen here."""

    def __init__(
        self,
        stream: socket.socket,
        address: str,
        *,
        context: ssl.SSLContext | None,
        plain_peer: str,
        handshake_s: float,
        unacked_s: float,
    ) -> None:
        self.address = address
        self._stream = stream
        self._context = context
        self._plain_peer = plain_peer
        self._handshake_s = handshake_s
        self._unacked_s = unacked_s
        self._closed = False
        self._ready: queue.SimpleQueue[Channel | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending: dict[socket.socket, threading.Thread] = {}
        self._thread = threading.Thread(target=self._run, name=f"listen {address}", daemon=True)
        self._thread.start()

    def accept(self, timeout_s: float | None = None) -> Channel:
        """The next peer that has shaken hands. Raises PeerLost at the deadline and once closed."""
        try:
            channel = self._ready.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerLost(f"nobody connected to {self.address} within {timeout_s} s") from None
        if channel is None:
            self._ready.put(None)  # for the next who asks
            raise PeerLost(f"the listener at {self.address} is closed")
        return channel

    def close(self) -> None:
        """Wakes `accept`, and hangs up on those who were not accepted yet."""
        if self._closed:
            return
        self._closed = True
        hang_up(self._stream)
        self._thread.join()
        self._stream.close()
        if isinstance(address := parse_address(self.address), UnixAddress):
            Path(address.path).unlink(missing_ok=True)
        with self._lock:
            pending = list(self._pending.items())
        for stream, thread in pending:
            hang_up(stream)
            thread.join()
        with suppress(queue.Empty):
            while channel := self._ready.get_nowait():
                channel.close()
        self._ready.put(None)

    def _run(self) -> None:
        while not self._closed:
            try:
                stream, peer_address = self._stream.accept()
                self._begin(stream, _readable(peer_address))
            except OSError as error:
                if not self._closed:
                    log.warning("%s cannot accept a connection: %s", self.address, error)
                    time.sleep(_PAUSE_S)  # out of file descriptors, it would fail again at once

    def _begin(self, raw: socket.socket, where: str) -> None:
        try:
            tune(raw, self._unacked_s)
            stream = wrap(raw, self._context, accepting=True)
        except OSError:
            raw.close()
            raise
        thread = threading.Thread(
            target=self._admit, args=(stream, where), name=f"handshake {where}", daemon=True
        )
        with self._lock:
            if len(self._pending) >= _MAX_PENDING:
                hang_up(next(iter(self._pending)))
            self._pending[stream] = thread
        thread.start()

    def _admit(self, stream: socket.socket, where: str) -> None:
        try:
            peer = shake_hands(stream, accepting=True, timeout_s=self._handshake_s)
            self._ready.put(Channel(stream, peer or self._plain_peer))
        except ShoalError as error:
            stream.close()
            log.warning("%s refused %s: %s", self.address, where, error)
        finally:
            with self._lock:
                del self._pending[stream]


def _readable(peer_address: object) -> str:
    match peer_address:
        case (str(host), int(port), *_):
            return str(HostAddress("peer", host, port)).removeprefix("peer:")
    return "a local process"
