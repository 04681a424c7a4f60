"""A process that has imported torch once, and forks a worker whenever it is told to.

Importing torch takes seconds, a fork of it milliseconds. Orders come as lines of JSON on stdin and
exits go out as lines of JSON on stdout. The end of stdin ends the nursery and its workers, unless
these may wait for another head: then the nursery ends with the last of them.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import selectors
import signal
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from shoal.errors import ShoalError
from shoal.parallel.address import parse_address
from shoal.parallel.endpoint import LocalOnly, MutualTls, Plaintext, Security
from shoal.parallel.identity import load_identity
from shoal.worker import process

log = logging.getLogger(__name__)

OUTLIVE_HEAD = "--outlive-head"

_PR_SET_PDEATHSIG = 1


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start", forbid_unknown_fields=True):
    """Start a worker on `cores`; all, if there are none.

    `identity` is the folder of the certificate that a worker at a tls: address shows.
    """

    worker: str
    head: str
    listen: str
    identity: str = ""
    num_threads: int
    cores: list[int]


class Kill(msgspec.Struct, frozen=True, kw_only=True, tag="kill", forbid_unknown_fields=True):
    """End a worker, if it still runs."""

    worker: str


class Close(msgspec.Struct, frozen=True, tag="close", forbid_unknown_fields=True):
    """End all workers, and the nursery."""


Order = Start | Kill | Close


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker ended: an exit status, or minus the number of a signal."""

    worker: str
    status: int


class Nursery:
    def __init__(self, *, outlives_head: bool) -> None:
        self._outlives_head = outlives_head
        self._has_head = True
        self._workers: dict[int, str] = {}
        self._pending = b""
        self._died, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the head to handle

    def serve(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        selector.register(self._died, selectors.EVENT_READ)
        while self._has_head or (self._outlives_head and self._workers):
            for key, _ in selector.select():
                data = os.read(key.fd, 65536)
                if key.fd == self._died:
                    self._reap()
                elif data:
                    self._take_orders(data)
                else:
                    self._has_head = False
                    selector.unregister(key.fd)
        for pid in self._workers:
            os.kill(pid, signal.SIGKILL)

    def _take_orders(self, data: bytes) -> None:
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            order: Order = msgspec.json.decode(line, type=Order)
            match order:
                case Start():
                    self._start(order)
                case Kill(worker=worker):
                    self._kill(worker)
                case Close():
                    self._has_head = self._outlives_head = False

    def _start(self, order: Start) -> None:
        pid = os.fork()
        if pid == 0:
            _be_worker(order)
        self._workers[pid] = order.worker

    def _kill(self, worker: str) -> None:
        for pid in [pid for pid, name in self._workers.items() if name == worker]:
            os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            left = Exit(worker=self._workers.pop(pid), status=os.waitstatus_to_exitcode(status))
            with suppress(BrokenPipeError):  # no head hears of it any more
                os.write(sys.stdout.fileno(), msgspec.json.encode(left) + b"\n")


def _be_worker(order: Start) -> None:
    """In the forked child; never returns."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with_parent()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # stdout is the nursery's, for exits
        if order.cores:
            os.sched_setaffinity(0, order.cores)
        process.run(order.head, order.worker, _security(order), order.listen, order.num_threads)
        status = 0
    except ShoalError as error:
        log.error("worker %s ends: %s", order.worker, error)
    except BaseException:
        log.exception("worker %s ends", order.worker)
    finally:
        os._exit(status)


def _security(order: Start) -> Security:
    scheme = parse_address(order.listen).scheme
    if scheme == "tls":
        return MutualTls(load_identity(Path(order.identity)))
    return Plaintext() if scheme == "tcp" else LocalOnly()


def die_with_parent() -> None:
    """Linux: SIGKILL for this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="shoal worker: %(message)s")
    outlives_head = OUTLIVE_HEAD in sys.argv[1:]
    if not outlives_head:
        die_with_parent()
    # What is imported by now is shared with every worker, as long as nobody touches it.
    gc.freeze()
    Nursery(outlives_head=outlives_head).serve()


if __name__ == "__main__":
    main()
