"""A process that has imported torch once, and forks a worker whenever it is told to.

Importing torch takes seconds, a fork of it milliseconds. Orders come as lines of JSON on stdin and
exits go out as lines of JSON on stdout; the end of stdin ends the nursery and its workers.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import selectors
import signal
import sys
from pathlib import Path

import msgspec

from shoal.errors import ShoalError
from shoal.parallel.address import parse_address
from shoal.parallel.endpoint import LocalOnly, MutualTls, Plaintext, Security
from shoal.parallel.identity import load_identity
from shoal.worker import process

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Start a worker on `cores` (all, if there are none), or end it if `stop` is set.

    `identity` is the folder of the certificate that a worker at a tls: address shows.
    """

    worker: str
    stop: bool = False
    head: str = ""
    listen: str = ""
    identity: str = ""
    num_threads: int = 1
    cores: list[int] = []


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker ended: an exit status, or minus the number of a signal."""

    worker: str
    status: int


class Nursery:
    def __init__(self) -> None:
        self._workers: dict[int, str] = {}
        self._died, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the head to handle

    def serve(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        selector.register(self._died, selectors.EVENT_READ)
        pending = b""
        while True:
            for key, _ in selector.select():
                data = os.read(key.fd, 65536)
                if key.fd == self._died:
                    self._reap()
                    continue
                if not data:
                    self._end_all()
                    return
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    self._obey(msgspec.json.decode(line, type=Order))

    def _obey(self, order: Order) -> None:
        if order.stop:
            for pid in [pid for pid, worker in self._workers.items() if worker == order.worker]:
                os.kill(pid, signal.SIGKILL)
            return
        pid = os.fork()
        if pid == 0:
            _be_worker(order)
        self._workers[pid] = order.worker

    def _reap(self) -> None:
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps({"worker": self._workers.pop(pid), "status": code}), flush=True)

    def _end_all(self) -> None:
        for pid in self._workers:
            os.kill(pid, signal.SIGKILL)


def _be_worker(order: Order) -> None:
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


def _security(order: Order) -> Security:
    scheme = parse_address(order.listen).scheme
    if scheme == "tls":
        return MutualTls(load_identity(Path(order.identity)))
    return Plaintext() if scheme == "tcp" else LocalOnly()


def die_with_parent() -> None:
    """Linux: SIGKILL for this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="shoal worker: %(message)s")
    die_with_parent()
    # What is imported by now is shared with every worker, as long as nobody touches it.
    gc.freeze()
    Nursery().serve()


if __name__ == "__main__":
    main()
