"""Kills and freezes the workers of a running server, one every so often."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import psutil

from shoal.errors import ShoalError
from shoal.evaluate.chaos import How

log = logging.getLogger(__name__)

# Some wake up before anybody misses them, the others find their seat taken.
_FROZEN_S = (0.2, 4.0)
# In a worker's command line: forked from a nursery, or an actor of Ray's.
_WORKER_MARKS = ("shoal.fleet.nursery", "ray::")
_RETRY_S = 0.05


class Target(msgspec.Struct, frozen=True):
    """A worker of this machine."""

    worker: str
    pid: int


class Strike(msgspec.Struct, frozen=True, kw_only=True):
    """`at_s` is on the clock of `time.perf_counter`."""

    at_s: float
    how: Literal["kill", "freeze"]
    worker: str
    pid: int


class Striker:
    """A thread of its own, from `start` to `stop`.

    `targets` says which workers there are now; `is_worker` whether a process is one.
    """

    def __init__(
        self,
        targets: Callable[[], Sequence[Target]],
        *,
        how: How,
        every_s: float,
        seed: int,
        is_worker: Callable[[psutil.Process], bool] | None = None,
    ) -> None:
        self.strikes: list[Strike] = []
        self.trouble: str | None = None
        """Why it had to end early."""
        self._targets = targets
        self._how = how
        self._every_s = every_s
        self._draw = random.Random(seed)
        self._is_worker = is_worker or is_shoal_worker
        self._frozen: list[tuple[float, psutil.Process]] = []
        self._killed: set[psutil.Process] = set()
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shoal-strikes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """All that are frozen go on again."""
        self._enough.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._strike_on()
        except ShoalError as error:
            self.trouble = error.message
        finally:
            self._thaw(float("inf"))

    def _strike_on(self) -> None:
        next_s = self._next_s()
        while True:
            wake_s = min([next_s, *(until_s for until_s, _ in self._frozen)])
            if self._enough.wait(max(wake_s - time.perf_counter(), 0.0)):
                return
            self._thaw(time.perf_counter())
            if time.perf_counter() >= next_s:
                struck = self._strike()
                next_s = self._next_s() if struck else time.perf_counter() + _RETRY_S

    def _next_s(self) -> float:
        # Never in step with anything, so that every moment of a recovery is hit some time.
        return time.perf_counter() + self._every_s * self._draw.uniform(0.5, 1.5)

    def _strike(self) -> bool:
        """False if there is nobody to strike just now."""
        asleep = {process.pid for _, process in self._frozen}
        targets = [each for each in self._targets() if each.pid not in asleep]
        self._draw.shuffle(targets)
        for target in targets:
            process = running(target.pid)
            # One that was killed may take a while to go.
            if process is None or process in self._killed or not self._is_worker(process):
                continue
            return self._hit(target, process)
        return False

    def _hit(self, target: Target, process: psutil.Process) -> bool:
        how = self._draw.choice(("kill", "freeze")) if self._how == "mix" else self._how
        try:
            # psutil makes sure that the number has not gone to another process meanwhile.
            process.kill() if how == "kill" else process.suspend()
        except psutil.NoSuchProcess:
            return False
        at_s = time.perf_counter()
        if how == "freeze":
            self._frozen.append((at_s + self._draw.uniform(*_FROZEN_S), process))
        else:
            self._killed.add(process)
        self.strikes.append(Strike(at_s=at_s, how=how, worker=target.worker, pid=target.pid))
        return True

    def _thaw(self, now_s: float) -> None:
        due = [(until_s, process) for until_s, process in self._frozen if until_s <= now_s]
        self._frozen = [each for each in self._frozen if each not in due]
        for _, process in due:
            try:
                process.resume()
            except psutil.NoSuchProcess:
                log.debug("%s was replaced while it was frozen", process.pid)


def running(pid: int) -> psutil.Process | None:
    """None if there is no such process, or all of it that is left is its exit status."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def is_shoal_worker(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return any(mark in command for mark in _WORKER_MARKS)
