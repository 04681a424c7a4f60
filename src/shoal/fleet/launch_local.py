"""Workers as processes of this machine, each on cores of its own while there are enough."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from shoal.errors import PlacementError
from shoal.fleet.nursery import OUTLIVE_HEAD, Close, Exit, Kill, Order, Start
from shoal.parallel.endpoint import LocalOnly, MutualTls, Security

log = logging.getLogger(__name__)

LOCAL_NODE = "local"

_UNIX_SOCKETS = LocalOnly()
_LOOPBACK = "127.0.0.1"
_NURSERY_PAUSE_S = 0.5
# It has ended by itself, or this launcher was closed.
_NURSERY_GONE = (BrokenPipeError, ValueError)

OnExit = Callable[[str, int], None]
"""(worker, exit status)"""


class LocalLauncher:
    """`folder` is where workers listen: only this user may enter it."""

    def __init__(
        self,
        head: str,
        folder: Path,
        on_exit: OnExit,
        *,
        cores: list[int],
        security: Security = _UNIX_SOCKETS,
        hold_s: float = 0.0,
    ) -> None:
        """`cores` are those that workers are given in turn; [] leaves them to the system.

        With `hold_s` workers may outlive this process, and end without another head after that.
        Other security than unix sockets is for measuring: it goes over the loopback interface.
        """
        self._head = head
        self._security = security
        self._folder = folder
        self._on_exit = on_exit
        self._cores = cores
        self._outlive_head = hold_s > 0
        self._taken: dict[str, list[int]] = {}
        self._adopted: dict[str, psutil.Process] = {}
        self._started: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        started: Future[subprocess.Popen[bytes]] = Future()
        # Linux ends the nursery with the thread that has started it, so that has to be a lasting
        # one, whoever makes a launcher.
        self._thread = threading.Thread(
            target=self._keep_nursery, args=(started,), name="shoal-nursery", daemon=True
        )
        self._thread.start()
        self._nursery = started.result()

    def nodes(self) -> list[str]:
        return [LOCAL_NODE]

    def start(self, worker: str, node: str, *, num_threads: int) -> None:
        assert node == LOCAL_NODE, f"{node} is another machine"
        with self._lock:
            cores = self._taken[worker] = self._free_cores(num_threads)
        self._start(worker, num_threads, cores)

    def start_spare(self, worker: str, node: str) -> None:
        assert node == LOCAL_NODE, f"{node} is another machine"
        self._start(worker, 1, [])

    def place(self, worker: str, num_threads: int) -> tuple[int, ...]:
        with self._lock:
            cores = self._taken.pop(worker, [])
            if len(cores) != num_threads:
                cores = self._free_cores(num_threads)
            self._taken[worker] = cores
        return tuple(cores)

    def adopt(self, worker: str, node: str, pid: int) -> None:
        assert node == LOCAL_NODE, f"{node} is another machine"
        try:
            process = psutil.Process(pid)
        except psutil.NoSuchProcess:
            raise PlacementError(
                f"worker {worker} is not there any more: no process {pid}"
            ) from None
        with self._lock:
            self._adopted[worker] = process

    def stop(self, worker: str) -> None:
        with self._lock:
            self._taken.pop(worker, None)
            adopted = self._adopted.pop(worker, None)
        if adopted is not None:
            _kill(adopted)
            return
        with suppress(*_NURSERY_GONE):  # and its workers with it
            self._order(Kill(worker=worker))

    def close(self) -> None:
        with self._lock:
            self._closed.set()
        assert self._nursery.stdin is not None
        with suppress(*_NURSERY_GONE):
            self._order(Close())
        with suppress(BrokenPipeError):
            self._nursery.stdin.close()
        self._nursery.wait()
        self._thread.join()
        for process in self._adopted.values():
            _kill(process)

    def _start(self, worker: str, num_threads: int, cores: list[int]) -> None:
        order = Start(
            worker=worker,
            head=self._head,
            listen=self._listen_address(worker),
            identity=self._identity(),
            num_threads=num_threads,
            cores=cores,
        )
        self._started.add(worker)
        try:
            self._order(order)
        except _NURSERY_GONE:
            self._started.discard(worker)
            raise PlacementError(
                f"worker {worker} cannot be started now: the process that starts workers has ended "
                f"(exit status {self._nursery.poll()}), and another is on its way"
            ) from None

    def _listen_address(self, worker: str) -> str:
        if isinstance(self._security, LocalOnly):
            return f"unix:{self._socket_of(worker)}"
        scheme = "tls" if isinstance(self._security, MutualTls) else "tcp"
        return f"{scheme}:{_LOOPBACK}:0"

    def _socket_of(self, worker: str) -> Path:
        return self._folder / f"{worker}.sock"

    def _identity(self) -> str:
        return str(self._security.identity.folder) if isinstance(self._security, MutualTls) else ""

    def _free_cores(self, number: int) -> list[int]:
        """The cores that the fewest workers use; none where every worker would share."""
        if len(self._cores) < number:
            return []
        num_users = {core: 0 for core in self._cores}
        for cores in self._taken.values():
            for core in cores:
                num_users[core] += 1
        return sorted(self._cores, key=lambda core: (num_users[core], core))[:number]

    def _order(self, order: Order) -> None:
        assert self._nursery.stdin is not None
        with self._lock:
            self._nursery.stdin.write(msgspec.json.encode(order) + b"\n")
            self._nursery.stdin.flush()

    def _keep_nursery(self, started: Future[subprocess.Popen[bytes]]) -> None:
        options = [OUTLIVE_HEAD] if self._outlive_head else []
        try:
            nursery = _start_nursery(options)
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(nursery)
        current: subprocess.Popen[bytes] | None = nursery
        while current is not None:
            self._hear_of_exits(current)
            if self._closed.is_set():
                return
            self._bury(current)
            current = self._another_nursery(options)

    def _bury(self, nursery: subprocess.Popen[bytes]) -> None:
        """Its workers went with it."""
        log.error("the process that starts workers has ended (exit status %d)", nursery.wait())
        assert nursery.stdin is not None
        with suppress(BrokenPipeError):
            nursery.stdin.close()
        for worker in self._started.copy():
            self._note_end(worker, -signal.SIGKILL)

    def _another_nursery(self, options: list[str]) -> subprocess.Popen[bytes] | None:
        """None, if this launcher is closed first."""
        while not self._closed.wait(_NURSERY_PAUSE_S):
            with self._lock:
                if self._closed.is_set():
                    break
                try:
                    self._nursery = _start_nursery(options)
                except OSError as error:
                    log.error("the process that starts workers cannot be started: %s", error)
                else:
                    return self._nursery
        return None

    def _hear_of_exits(self, nursery: subprocess.Popen[bytes]) -> None:
        """Until it ends."""
        assert nursery.stdout is not None
        with nursery.stdout as lines:
            for line in lines:
                left = msgspec.json.decode(line, type=Exit)
                self._note_end(left.worker, left.status)

    def _note_end(self, worker: str, status: int) -> None:
        with self._lock:
            self._started.discard(worker)
            self._taken.pop(worker, None)
        # Whoever was killed has left the name of its socket.
        self._socket_of(worker).unlink(missing_ok=True)
        self._on_exit(worker, status)


def _kill(process: psutil.Process) -> None:
    """Nothing, if another process has its number by now."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _start_nursery(options: list[str]) -> subprocess.Popen[bytes]:
    # A library's thread pool would not survive the fork; workers set their own.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "shoal.fleet.nursery", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
