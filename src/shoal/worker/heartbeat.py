"""Tells the head several times a second that this process lives, whatever it computes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec

from shoal.config import HEARTBEAT_S
from shoal.errors import PeerLost
from shoal.parallel.channel import Channel
from shoal.parallel.control import Alive

_ALIVE = msgspec.msgpack.encode(Alive())


class Heartbeat:
    """Beats in a thread of its own until closed; `on_lost` is called there if the head is gone."""

    def __init__(self, reports: Channel, on_lost: Callable[[], None]) -> None:
        self._reports = reports
        self._on_lost = on_lost
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="shoal-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close `reports` before: a head that does not read may hold up a beat."""
        self._closed.set()
        self._thread.join()

    def _beat(self) -> None:
        try:
            while not self._closed.is_set():
                self._reports.send(_ALIVE)
                self._closed.wait(HEARTBEAT_S)
        except PeerLost:
            self._on_lost()
