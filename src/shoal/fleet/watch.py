"""Listens for heartbeats: a worker that gives none for too long is lost."""

from __future__ import annotations

import logging
import threading
import time

from shoal.cluster.membership import Membership
from shoal.fleet.inbox import Lost
from shoal.fleet.worker_line import WorkerLine

log = logging.getLogger(__name__)

_TICK_S = 0.1


class Watch:
    """Looks at all lines in a thread of its own until closed."""

    def __init__(self, dead_after_s: float) -> None:
        self._membership = Membership(dead_after_s, _TICK_S)
        self._lines: dict[str, WorkerLine] = {}
        self._looked_s = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="shoal-watch", daemon=True)
        self._thread.start()

    def add(self, line: WorkerLine) -> None:
        with self._lock:
            self._lines[line.process] = line
            self._membership.join(line.process, line.heard_s)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._closed.wait(_TICK_S):
            with self._lock:
                lost = self._look(time.monotonic())
            for line, silence_s in lost:
                log.info("worker %s: no sign of life for %.2f s", line.worker, silence_s)
                reason = f"silent for {silence_s:.2f} s"
                line.lose(Lost(reason, noticed_by="heartbeat", silence_s=silence_s))

    def _look(self, now_s: float) -> list[tuple[WorkerLine, float]]:
        for name in [name for name, line in self._lines.items() if line.is_lost]:
            del self._lines[name]
            self._membership.leave(name)
        for name, line in self._lines.items():
            # Only what is new: for the membership, an old sign would be one of now.
            if line.heard_s > self._looked_s:
                self._membership.heard(name, line.heard_s)
        self._looked_s = now_s
        return [(self._lines[name], silence) for name, silence in self._membership.silent(now_s)]
