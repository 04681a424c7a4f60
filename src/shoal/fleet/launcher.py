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

    def stop(self, worker: str) -> None:
        """End a worker that may no longer listen; unknown and dead ones are ignored."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...
