"""What starts worker processes, here or on other machines."""

from __future__ import annotations

from typing import Protocol


class Launcher(Protocol):
    """Starts workers, which then dial the head. Names of workers are never used twice."""

    def nodes(self) -> list[str]:
        """The nodes that can take workers now."""
        ...

    def start(self, worker: str, node: str, *, num_threads: int) -> None:
        """Start a worker process. Returns before it has dialled. Raises PlacementError."""
        ...

    def start_spare(self, worker: str, node: str) -> None:
        """The same for one that has no cores of its own until it is placed."""
        ...

    def place(self, worker: str, num_threads: int) -> tuple[int, ...]:
        """The cores of a worker that takes a seat: its own or, if they are not as many, others.

        () leaves them to the system.
        """
        ...

    def adopt(self, worker: str, node: str, pid: int) -> None:
        """Answer for a worker that an earlier head has started. Raises PlacementError."""
        ...

    def stop(self, worker: str) -> None:
        """End a worker that may no longer listen; unknown and dead ones are ignored."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...
