"""This machine as several nodes, which can be unplugged: then no worker starts there."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.errors import PlacementError
from shoal.fleet.launch_local import LOCAL_NODE, LocalLauncher
from shoal.fleet.site import Node


class PretendedNodes:
    """A Launcher. `names` may be replaced at any time; `unplugged` nodes take nobody."""

    def __init__(self, launcher: LocalLauncher, num_cores: int) -> None:
        self.names: Sequence[str] = [LOCAL_NODE]
        self.unplugged: set[str] = set()
        self.num_refused = 0
        self._launcher = launcher
        self._num_cores = num_cores

    def nodes(self) -> list[str]:
        return [name for name in self.names if name not in self.unplugged]

    def as_site(self) -> list[Node]:
        return [
            Node(name=name, address="", num_cores=self._num_cores, memory_bytes=0)
            for name in self.nodes()
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
        self._launcher.stop(worker)

    def close(self) -> None:
        self._launcher.close()

    def _check(self, node: str) -> None:
        if node in self.unplugged:
            self.num_refused += 1
            raise PlacementError(f"{node} takes no worker now")
