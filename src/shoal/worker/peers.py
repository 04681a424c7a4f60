"""Connections that other workers open to this one, kept until they are asked for."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

import msgspec

from shoal.errors import FrameError, PeerLost, PeerRefused
from shoal.parallel.channel import Channel
from shoal.parallel.control import Greeting, Role
from shoal.parallel.listener import Listener

log = logging.getLogger(__name__)

_GREETING_S = 2.0

Key = tuple[Role, int, int]
"""(role, epoch, sender's rank)"""


class Peers:
    """Accepts in a thread of its own until closed; whoever does not greet properly is dropped."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._arrived: dict[Key, Channel] = {}
        self._changed = threading.Condition()
        self._first_epoch = 0
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="shoal-peers", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return self._listener.address

    def wait_for(self, role: Role, epoch: int, sender: int, *, timeout_s: float) -> Channel:
        """The connection that a peer opened for an epoch.

        Raises PeerLost if it does not come in time, or not before the epoch is over.
        """
        key = (role, epoch, sender)
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while key not in self._arrived:
                if self.is_over(epoch):
                    raise PeerLost(f"nobody waits for rank {sender} of epoch {epoch} any more")
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise PeerLost(
                        f"rank {sender} did not connect as '{role}' within {timeout_s:.0f} s"
                    )
                self._changed.wait(left_s)
            return self._arrived.pop(key)

    def is_over(self, epoch: int) -> bool:
        return self._closed or epoch < self._first_epoch

    def forget_before(self, epoch: int) -> None:
        """Epochs before this one are over: close what came for them, wake who waits for more."""
        with self._changed:
            self._first_epoch = max(epoch, self._first_epoch)
            self._changed.notify_all()
            for key in [key for key in self._arrived if key[1] < epoch]:
                self._arrived.pop(key).close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._listener.close()
        self._thread.join()
        with self._changed:
            for channel in self._arrived.values():
                channel.close()
            self._arrived.clear()

    def _accept(self) -> None:
        while not self._closed:
            # The listener has logged whom it refused; a closed one ends the loop.
            with contextlib.suppress(PeerLost, PeerRefused):
                self._greet(self._listener.accept())

    def _greet(self, channel: Channel) -> None:
        try:
            header, _ = channel.receive(_GREETING_S)
            greeting = msgspec.msgpack.decode(header, type=Greeting)
        except (PeerLost, FrameError, msgspec.MsgspecError) as error:
            log.warning("a connection from %s is dropped: %s", channel.peer, error)
            channel.close()
            return
        key = (greeting.role, greeting.epoch, greeting.sender)
        with self._changed:
            if self.is_over(greeting.epoch):
                channel.close()
                return
            older = self._arrived.pop(key, None)
            if older is not None:
                older.close()  # its sender has given it up and dialled again
            self._arrived[key] = channel
            self._changed.notify_all()
