"""This machine as several nodes, which may take no worker for a while, or hear no order."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.errors import PlacementError
from shoal.fleet.launch_local import LOCAL_NODE, LocalLauncher
from shoal.fleet.site import Node


class PretendedNodes:
    """A Launcher. `names` may be replaced at any time. Nodes that are `full` take nobody; with
    `is_deaf` none ends a worker that is told to.
    """

    def __init__(self, launcher: LocalLauncher, num_cores: int) -> None:
        self.names: Sequence[str] = [LOCAL_NODE]
        self.full: set[str] = set()
        self.is_deaf = False
        self._launcher = launcher
        self._num_cores = num_cores

    def nodes(self) -> list[str]:
        return list(self.names)

    def as_site(self) -> list[Node]:
        return [
            Node(name=name, address="", num_cores=self._num_cores, memory_bytes=0)
            for name in self.names
        ]

    def start(self, worker: str, node: str, *, num_threads: int) -> None:
        self._check(node)
        self._launcher.start(worker, LOCAL_NODE, num_threads=num_threads)

    def start_spare(self, worker: str, node: str) -> None:
        self._check(node)
        self._launcher.start_spare(worker, LOCAL_NODE)

    def place(self, worker: str, num_threads: int) -> tuple[int, ...]:
        return self._launcher.place(worker, num_threads)

    def adopt(self, worker: str, node: str, pid: int) -> None:
        self._check(node)
        self._launcher.adopt(worker, LOCAL_NODE, pid)

    def stop(self, worker: str) -> None:
        if not self.is_deaf:
            self._launcher.stop(worker)

    def close(self) -> None:
        self._launcher.close()

    def _check(self, node: str) -> None:
        if node in self.full:
            raise PlacementError(f"{node} takes no worker now")
