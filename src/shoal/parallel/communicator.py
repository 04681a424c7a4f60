"""How the tensor ranks of one stage talk."""

from __future__ import annotations

from typing import Protocol

import torch


class Communicator(Protocol):
    """Collective calls: every rank makes the same ones, in the same order, with equal shapes
    (`gather` may differ in the last dim). Each raises PeerLost when a rank is gone or silent for
    too long; then the communicator is of no more use but to be closed.
    """

    rank: int
    num_ranks: int

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, added in rank order so that every rank holds the same bits."""
        ...

    def gather(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        """Every rank's part, in rank order, on rank 0; None on the others."""
        ...

    def close(self) -> None: ...


class Solo:
    """A stage of one worker: nothing to add up."""

    rank = 0
    num_ranks = 1

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        return partial

    def gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        return [part]

    def close(self) -> None:
        pass
