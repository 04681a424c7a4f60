"""Tells the head how a worker's fetching of weights goes, a few times a second at most."""

from __future__ import annotations

import time
from collections.abc import Callable

from shoal.parallel.control import Fetching

_INTERVAL_S = 0.25


class ThinnedReport:
    """A `weights.cache.Progress`. The first and the last of each thing always get through."""

    def __init__(self, send: Callable[[Fetching], None]) -> None:
        self._send = send
        self._what = ""
        self._told_s = 0.0

    def __call__(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        now_s = time.monotonic()
        is_edge = what != self._what or done_bytes == total_bytes
        if is_edge or now_s - self._told_s >= _INTERVAL_S:
            self._what, self._told_s = what, now_s
            self._send(Fetching(what=what, done_bytes=done_bytes, total_bytes=total_bytes))
