"""Frames over a blocking stream socket, plain or TLS.

After its greeting a connection is used in one direction only: an OpenSSL object must not be read
and written by two threads at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import ssl
import threading
import time
from types import TracebackType

from shoal.errors import FrameError, InternalError, PeerLost
from shoal.parallel.frames import PREFIX_BYTES, decode_prefix, encode_prefix

Buffer = bytes | bytearray | memoryview

# Below this, one copy is cheaper than one more TLS record and system call.
_JOINED_BYTES = 16 * 1024
# As much as TLS hands over at once.
_INBOX_BYTES = 16 * 1024
_PATIENCE_S = 30.0
# TLS does not tell the two apart.
_HUNG_UP = "it hung up, or its machine is gone"


class Channel:
    """One connection. `peer` is the node name in the other side's certificate, or what stands for
    it ("local", "plaintext"). `sent_bytes` counts frames, without what TLS and TCP add.

    Every call raises PeerLost when the connection is closed, reset, or silent past the deadline,
    and FrameError for bytes that break the wire format. Then the channel is of no more use but to
    be closed; only after a deadline that passed between two frames may `receive` be called again.
    """

    def __init__(self, stream: socket.socket, peer: str) -> None:
        self.peer = peer
        self.sent_bytes = 0
        self.sent_messages = 0
        self._received_messages = 0
        self._stream = stream
        # What arrived and is not taken yet lies at [_start, _stop).
        self._inbox = memoryview(bytearray(_INBOX_BYTES))
        self._start = self._stop = 0
        self._poll = select.poll()
        self._poll.register(stream, select.POLLIN)
        self._armed_s = stream.gettimeout()
        self._patient = False
        self._closed = False
        # Taken for a whole call, so that close() never frees a socket that a thread still reads.
        lock = threading.Lock()
        self._sending, self._receiving = _Turn(lock), _Turn(lock)
        self._sending.opposite, self._receiving.opposite = self._receiving, self._sending

    def send(self, header: bytes, body: Buffer = b"", *, timeout_s: float | None = None) -> None:
        """Send one frame; several threads may. Returns when the system has taken all of it."""
        body = memoryview(body).cast("B")
        with self._sending:
            prefix = encode_prefix(self.sent_messages, len(header), len(body))
            deadline = _Deadline(timeout_s)
            if len(header) + len(body) <= _JOINED_BYTES:
                self._write(b"".join((prefix, header, body)), deadline)
            else:
                self._be_patient()
                self._write(prefix + header, deadline)
                if body:
                    self._write(body, deadline)
            self.sent_messages += 1
            self.sent_bytes += len(prefix) + len(header) + len(body)

    def receive(self, timeout_s: float | None = None) -> tuple[bytes, bytearray]:
        """The next frame's header and body."""
        with self._receiving:
            deadline = _Deadline(timeout_s)
            header, body_bytes = self._receive_header(deadline)
            body = bytearray(body_bytes)
            self._fill(memoryview(body), deadline)
            return header, body

    def receive_into(
        self,
        buffer: bytearray | memoryview,
        timeout_s: float | None = None,
        *,
        poll_s: float = 0.0,
    ) -> bytes:
        """The next frame's header; its body fills `buffer` exactly, or FrameError is raised.

        `poll_s` is how long it looks for the frame, yielding its core, before it sleeps: to be
        woken takes tens of microseconds.
        """
        view = memoryview(buffer).cast("B")
        with self._receiving:
            deadline = _Deadline(timeout_s)
            self._look(poll_s)
            header, body_bytes = self._receive_header(deadline)
            if body_bytes != len(view):
                raise self._broken(f"a body of {body_bytes} bytes where {len(view)} are due")
            self._fill(view, deadline)
            return header

    def set_patience(self, unacked_s: float) -> None:
        """How long what was sent may wait for the peer's system before the peer counts as lost.

        The system cannot tell a machine that is gone from a program that does not read while the
        buffers are full. So the first frame above 16 KiB raises this to 30 s, unless it was set.
        """
        self._patient = True
        set_patience(self._stream, unacked_s)

    def close(self) -> None:
        """Wakes the thread that is in a call of this channel, if any; it raises PeerLost."""
        self._shut()
        with self._sending.lock:
            self._stream.close()

    def _be_patient(self) -> None:
        if not self._patient:
            self.set_patience(_PATIENCE_S)

    def _shut(self) -> None:
        self._closed = True
        hang_up(self._stream)

    def _look(self, poll_s: float) -> None:
        if self._stop > self._start:
            return
        end_s = time.monotonic() + poll_s
        while time.monotonic() < end_s and not self._poll.poll(0):
            os.sched_yield()

    def _receive_header(self, deadline: _Deadline) -> tuple[bytes, int]:
        if self._closed:
            raise PeerLost(f"the channel to {self.peer} is closed")
        self._gather(PREFIX_BYTES, deadline, between_frames=True)
        stop = self._start + PREFIX_BYTES
        try:
            header_bytes, body_bytes = decode_prefix(
                self._inbox[self._start : stop], sequence=self._received_messages
            )
        except FrameError as error:
            raise self._broken(error.message) from error
        self._received_messages += 1
        self._start = stop
        if header_bytes > _INBOX_BYTES:
            header = bytearray(header_bytes)
            self._fill(memoryview(header), deadline)
            return bytes(header), body_bytes
        self._gather(header_bytes, deadline)
        stop = self._start + header_bytes
        taken = self._inbox[self._start : stop].tobytes()
        self._start = stop
        return taken, body_bytes

    def _gather(self, num_bytes: int, deadline: _Deadline, *, between_frames: bool = False) -> None:
        """Have so many bytes in the inbox, at most _INBOX_BYTES; more may come with them."""
        held = self._stop - self._start
        if held >= num_bytes:
            return
        self._inbox[:held] = self._inbox[self._start : self._stop]
        self._start, self._stop = 0, held
        while self._stop < num_bytes:
            room = self._inbox[self._stop :]
            at_start = between_frames and self._stop == 0
            self._stop += self._read(room, deadline, between_frames=at_start)

    def _fill(self, view: memoryview, deadline: _Deadline) -> None:
        filled = min(len(view), self._stop - self._start)
        view[:filled] = self._inbox[self._start : self._start + filled]
        self._start += filled
        while filled < len(view):
            filled += self._read(view[filled:], deadline)

    def _read(self, view: memoryview, deadline: _Deadline, *, between_frames: bool = False) -> int:
        try:
            self._arm(deadline)
            count = self._stream.recv_into(view, len(view))
            if count == 0:
                raise ConnectionError(_HUNG_UP)
            return count
        except OSError as error:
            if between_frames and _is_deadline(error):
                raise PeerLost(_silent(self.peer, deadline.timeout_s)) from error
            raise self._failed(error, deadline.timeout_s) from error

    def _write(self, data: Buffer, deadline: _Deadline) -> None:
        try:
            self._arm(deadline)
            sent = self._stream.send(data)
            while sent < len(data):
                self._arm(deadline)
                sent += self._stream.send(memoryview(data)[sent:])
        except OSError as error:
            raise self._failed(error, deadline.timeout_s) from error

    def _arm(self, deadline: _Deadline) -> None:
        left_s = deadline.left_s()
        if left_s != self._armed_s:
            self._stream.settimeout(left_s)
            self._armed_s = left_s

    def _failed(self, error: OSError, timeout_s: float | None) -> PeerLost | FrameError:
        if self._closed:
            return PeerLost(f"the channel to {self.peer} is closed")
        if _is_deadline(error):
            self._shut()
            return PeerLost(_silent(self.peer, timeout_s))
        if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
            error = ConnectionError(_HUNG_UP)
        if isinstance(error, ssl.SSLError):
            return self._broken(f"bytes that are not TLS of this connection ({error.reason})")
        self._shut()
        return PeerLost(f"the connection to {self.peer} broke: {error.strerror or error}")

    def _broken(self, what: str) -> FrameError:
        self._shut()
        return FrameError(f"from {self.peer}: {what}; the connection is dropped")


class _Turn:
    """A lock that two calls share. Waiting for the opposite direction would be waiting forever."""

    def __init__(self, lock: threading.Lock) -> None:
        self.lock = lock
        self.opposite = self
        self.taken = False

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            if self.opposite.taken:
                raise InternalError("a channel is read and written by two threads at once")
            self.lock.acquire()
        self.taken = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.taken = False
        self.lock.release()


class _Deadline:
    """The first answer is the timeout itself, which a socket that is used again has set already."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._end_s = 0.0 if timeout_s is None else time.monotonic() + timeout_s
        self._asked = False

    def left_s(self) -> float | None:
        if self.timeout_s is None:
            return None
        if not self._asked:
            self._asked = True
            left_s = self.timeout_s
        else:
            left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s


def tune(stream: socket.socket, unacked_s: float) -> None:
    """Send small frames at once, and notice within seconds that the other machine is gone."""
    if stream.family == socket.AF_UNIX:
        return
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    set_patience(stream, unacked_s)


def hang_up(stream: socket.socket) -> None:
    """End the connection, and wake whoever waits for it; the socket stays open."""
    # Not SSLSocket.shutdown: that would drop the encryption and go on reading without it.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(stream, socket.SHUT_RDWR)


def set_patience(stream: socket.socket, unacked_s: float) -> None:
    if stream.family != socket.AF_UNIX:
        timeout_ms = max(1, round(unacked_s * 1000))
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)


def _is_deadline(error: OSError) -> bool:
    """Ours, rather than the system's verdict (ETIMEDOUT) that the other machine is gone."""
    return isinstance(error, TimeoutError) and error.errno != errno.ETIMEDOUT


def _silent(peer: str, timeout_s: float | None) -> str:
    return f"{peer} has been silent for {timeout_s} s"
